"""Lark rules, put together."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from abcli.chat.calls.format import ID, NUMBER
from abcli.chat.control_text import ControlText

_PLACEHOLDERS = re.compile(f"([{ID}{NUMBER}])")
# What may stand for the placeholders of a format; Mistral's models write ids of nine letters or digits.
_PLACED = {ID: "/[A-Za-z0-9]{9}/", NUMBER: "/[0-9]{1,3}/"}
_TEXT = r"TEXT: /(.|\n)*/"


class Rules:
    """The rules of one grammar; the texts in them are written with the vocabulary's special tokens."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self._control = ControlText(special_tokens)
        self._rules: list[str] = []

    def grammar(self, start: str) -> str:
        """All rules, with what the answer is."""
        return "\n".join([f"start: {start}", *self._rules, _TEXT])

    def rule(self, body: str, *, name: str = "", lazy: bool = False) -> str:
        """Add a rule and return its name."""
        name = name or f"rule_{len(self._rules)}"
        self._rules.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name

    def written(self, text: str) -> str:
        """A text that has to come, its special tokens as such."""
        found = []
        for piece in _PLACEHOLDERS.split(text):
            if piece in _PLACED:
                found.append(_PLACED[piece])
                continue
            parts = self._control.split(piece)
            found += [f"<[{part}]>" if isinstance(part, int) else json.dumps(part) for part in parts]
        return " ".join(found)

    def until(self, marker: str) -> str:
        """Any text up to a marker, and the marker, white space before it being part of the text."""
        marker = marker.lstrip()
        first = self._control.split(marker)[0]
        if isinstance(first, int):
            return f"TEXT {self.written(marker)}"
        # What has no white space in it is what the text ends with.
        word = first.split()[0]
        name = self.rule(f"TEXT {json.dumps(word)}", lazy=True)
        return f"{name} {self.written(marker[len(word) :])}"

    def listed(self, items: Sequence[tuple[str, bool]], separator: str) -> str:
        """Items in their order, (rule, whether it has to come), with separators between those that come."""
        first, rest = "", ""
        for item, required in reversed(items):
            with_rest = f"{item} {rest}"
            first = self.rule(with_rest if required else f"{with_rest} | {first}")
            following = f"{self.written(separator)} {item}"
            rest = self.rule(f"{following if required else f'({following})?'} {rest}")
        return first
