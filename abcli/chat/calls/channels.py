"""Answers that are a row of messages, each with a header that says to whom it is: gpt-oss, Muse, Functionary."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

Kind = Literal["said", "thought", "call", "ignored"]

_SAID_TO = ("", "all", "user")
_THOUGHT_TO = ("self",)
_THOUGHT_CHANNEL = "analysis"
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")


@dataclass(frozen=True)
class Channels:
    """A message is a header, `message`, a text and one of `ends`; after `begin` the next one's header comes.

    `recipient` is a pattern whose group is the recipient in a header; functions are recipients after `functions`. What
    is said to `others` than the person and the functions is ignored, or they are no recipients.
    """

    begin: str
    message: str
    ends: tuple[str, ...]
    recipient: str
    functions: str = ""
    others: Kind = "ignored"

    def kind(self, header: str, functions: frozenset[str]) -> tuple[Kind, str]:
        """What a message with this header is, and the function that it calls, or what of its header is said."""
        found = re.search(self.recipient, header)
        recipient = found.group(1) if found else ""
        channels = _CHANNEL.findall(header)
        name = recipient.removeprefix(self.functions)
        if name in functions or (self.functions and recipient.startswith(self.functions)):
            return "call", name
        if recipient in _THOUGHT_TO or (channels and channels[-1] == _THOUGHT_CHANNEL):
            return "thought", ""
        if recipient in _SAID_TO:
            return "said", "" if recipient or channels else header
        return self.others, header if self.others == "said" else ""


HARMONY = Channels(
    "<|start|>", "<|message|>", ("<|end|>", "<|call|>", "<|return|>"), r"\bto=([^\s<]+)", functions="functions."
)
MUSE = Channels("<|start|>", "<|message|>", ("<|eom|>", "<|eot|>"), r"\bto=([^\s<]+)")
FUNCTIONARY = Channels(">>>", "\n", (">>>",), r"\A\s*(\S+)\s*\Z", others="said")
