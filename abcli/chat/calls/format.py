"""How a model writes its calls of tools and its thoughts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from abcli.chat.calls.channels import Channels

Notation = Literal["json", "python", "gemma"]

# Stand in the texts of a format for what differs from call to call: an id, the number of the call, a key,
# the function's name.
ID = "\ufdd4"
NUMBER = "\ufdd5"
KEY = "\ufdd6"
NAME = "\ufdd7"
_NAMED = re.compile(r"<\w+=")
# Where a marker is taken apart: white space, behind a tag, and at the brackets of JSON at its edges.
_BETWEEN_PIECES = re.compile(
    rf"\s+|(?<=[^\]]>)(?=<|functions\.)|(?<=^[\]}}])(?=[^<]|<[^\]])|(?<=.)(?=[\[{{]+$)"
    rf"|(?<=[{ID}{NUMBER}])(?=.)|(?<=.)(?=[{ID}{NUMBER}])"
)


@dataclass(frozen=True)
class Thoughts:
    """What stands before and after a thought, without white space around it."""

    begin: str = "<think>"
    end: str = "</think>"

    def opened_by(self, prompt: str) -> bool:
        """Whether the answer to a rendered prompt begins inside a thought, because the template has opened it."""
        return prompt.rstrip().endswith(self.begin)


@dataclass(frozen=True)
class Tags:
    """Arguments that are written one by one: `key_begin` KEY `key_end` VALUE `value_end`.

    A text is written as it is, anything else as JSON. Where the template says which it is, `kinds` has its word for
    each of JSON's types, which stands between `key_end` and `kind_end`. With KEY in `value_end`, lists and objects are
    tags within tags.
    """

    key_begin: str
    key_end: str
    value_end: str
    kinds: tuple[tuple[str, str], ...] = ()
    kind_end: str = ""

    @property
    def nested(self) -> bool:
        """Whether a value that is not plain consists of tags."""
        return KEY in self.value_end

    def end_of(self, key: str) -> str:
        """What ends the value of a key."""
        return self.value_end.replace(KEY, key)


@dataclass(frozen=True)
class CallFormat:
    """What a template writes around calls, character by character.

    `section_begin`, calls with `between` from one to the next, `section_end`; each call is `call_begin` NAME `name_end`
    ARGUMENTS `call_end`. Arguments are the text of a JSON object, `tags`, or members in another `notation`. Where all
    of a call is one JSON object, `keys` are those of its name and its arguments, and the texts around contain its
    braces. `framing` are markers around what is said, which say nothing; with `channels` the answer is messages.
    `bare_begin` is what may come before a call that is otherwise recognised by its JSON alone, `quote` what texts are
    between in Gemma's notation. Without `thoughts` what is thought is taken for something said.
    """

    name: str
    call_begin: str
    name_end: str
    call_end: str
    section_begin: str = ""
    section_end: str = ""
    between: str = ""
    keys: tuple[str, str] | None = None
    tags: Tags | None = None
    notation: Notation = "json"
    channels: Channels | None = None
    bare_begin: str = ""
    quote: str = ""
    several: bool = True
    thoughts: Thoughts | None = Thoughts()
    framing: tuple[str, ...] = ()
    fallback: bool = False
    """Whether the template knows no tools, so that the system message has to list them (`fallback.tools_text`)."""

    @cached_property
    def object_begin(self) -> str:
        """What comes before the JSON object that is all of a call."""
        key = self.call_begin.rfind(f'"{self.keys[0]}"') if self.keys else -1
        return self.call_begin[: self.call_begin.rfind("{", 0, key)]

    @cached_property
    def object_end(self) -> str:
        """What comes after it."""
        return self.call_end[self.call_end.find("}") + 1 :]

    @cached_property
    def around_name(self) -> tuple[str, str]:
        """What comes before and after the name in the first call of an answer, its number and an id filled in."""
        before, named, rest = self.call_begin.partition(NAME)
        texts = self.section_begin + before, rest if named else self.name_end
        first, second = (text.replace(ID, "call00000").replace(NUMBER, "0") for text in texts)
        return first, second

    @cached_property
    def call_marker(self) -> str:
        """What comes before the name of a call, or before its object; empty if there is nothing."""
        return self.object_begin if self.keys else self.call_begin

    @cached_property
    def bare(self) -> bool:
        """Whether a call is nothing but a JSON object, with which the answer begins."""
        return self.keys is not None and not self.section_begin.strip() and not self.object_begin.strip()

    @cached_property
    def openers(self) -> tuple[str, ...]:
        """What begins calls, each without white space."""
        if self.bare:
            return (self.bare_begin,) if self.bare_begin else ()
        first = [*parts(self.section_begin)[:1], *parts(self.call_marker)[:1]]
        # Qwen's models leave out what comes before this.
        return tuple(dict.fromkeys([*first, *filter(_NAMED.fullmatch, parts(self.call_marker))]))


def parts(marker: str) -> list[str]:
    """A marker as the pieces between which models may set white space; placeholders are pieces."""
    return [piece for piece in _BETWEEN_PIECES.split(marker) if piece]


HERMES = CallFormat(
    "JSON in <tool_call> tags",
    call_begin='<tool_call>\n{"name": "',
    name_end='", "arguments": ',
    call_end="}\n</tool_call>",
    between="\n",
    keys=("name", "arguments"),
)
