"""How a model writes its calls of tools and its thoughts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Thoughts:
    """What stands before and after a thought, without white space around it."""

    begin: str
    end: str

    def opened_by(self, prompt: str) -> bool:
        """Whether the answer to a rendered prompt begins inside a thought, because the template has opened it."""
        return prompt.rstrip().endswith(self.begin)


@dataclass(frozen=True)
class Tags:
    """Arguments that are written one by one: `key_begin` KEY `key_end` VALUE `value_end`.

    A value is a text as it is, unless the schema says that it is something else: then it is JSON.
    """

    key_begin: str
    key_end: str
    value_end: str


@dataclass(frozen=True)
class CallFormat:
    """What a template writes around calls, character by character.

    `section_begin`, calls with `between` from one to the next, `section_end`; each call is `call_begin` NAME `name_end`
    ARGUMENTS `call_end`. Arguments are the text of a JSON object, or `tags`. Where all of a call is one JSON object,
    `keys` are those of its name and its arguments, and the texts around contain its braces.
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
    several: bool = True
    thoughts: Thoughts | None = None
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
    def call_marker(self) -> str:
        """What a call is recognised by, if it has anything before its name or its object."""
        return self.object_begin if self.keys else self.call_begin

    @cached_property
    def openers(self) -> tuple[str, ...]:
        """What begins calls, each a text without white space."""
        markers = (self.section_begin.split()[:1], self.call_marker.split()[:1])
        return tuple(dict.fromkeys(marker[0] for marker in markers if marker))


HERMES = CallFormat(
    "JSON in <tool_call> tags",
    call_begin='<tool_call>\n{"name": "',
    name_end='", "arguments": ',
    call_end="}\n</tool_call>",
    between="\n",
    keys=("name", "arguments"),
)
