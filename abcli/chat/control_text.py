"""Finding the control tokens that a text spells out, and breaking them up where they must stay text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Marks:
    """Four characters that occur in none of the texts concerned.

    `inside`, put behind the first character of "<|im_end|>", leaves nothing that reads as that token; `edge`
    stands where a message begins, `inner_edge` where its thought or the name of a call does. Taking them out gives the
    old text. `anchor` is for `WindowedRendering`.
    """

    inside: str
    edge: str
    inner_edge: str
    anchor: str

    def remove(self, text: str) -> str:
        """`text` without marks."""
        for mark in (self.inside, self.edge, self.inner_edge):
            text = text.replace(mark, "").replace(_spelled(mark), "")
        return text

    def spelled(self, text: str) -> str:
        """`text` with its marks as templates write them that spell out what is not ASCII."""
        for mark in (self.inside, self.edge, self.inner_edge):
            text = text.replace(mark, _spelled(mark))
        return text


class ControlText:
    """The control tokens of one vocabulary as text."""

    def __init__(self, tokens: Mapping[str, int]) -> None:
        """`tokens`: text -> token."""
        self._tokens = {text: token for text, token in tokens.items() if text}
        lengths: dict[str, set[int]] = {}
        for text in self._tokens:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {first: sorted(found, reverse=True) for first, found in lengths.items()}
        firsts = "".join(re.escape(first) for first in self._lengths)
        self._first = re.compile(f"[{firsts}]") if firsts else None

    def split(self, text: str, marks: Marks | None = None) -> list[str | int]:
        """`text` as control tokens and the text between them (never empty), longest token first."""
        mark = marks.inside if marks else ""
        parts: list[str | int] = []
        end = 0
        for start, found in self._occurrences(text, mark):
            if start > end:
                parts.append(text[end:start])
            parts.append(self._tokens[found])
            end = start + len(found)
        if end < len(text):
            parts.append(text[end:])
        return parts

    def break_tokens(self, text: str, marks: Marks) -> str:
        """`text` with every control token in it broken up."""
        pieces = []
        end = 0
        for start, _found in self._occurrences(text, ""):
            pieces += [text[end : start + 1], marks.inside]
            end = start + 1
        return "".join([*pieces, text[end:]])

    def break_everywhere(self, text: str, marks: Marks, edge: str) -> str:
        """`text` broken up so that no part of it can be a part of a control token, whatever stands around it.

        `edge` is the one of the marks that stands where the text begins.
        """
        broken = self._first.sub(lambda first: first.group() + marks.inside, text) if self._first else text
        # Behind leading white space, which templates like to strip.
        body = broken.lstrip()
        return broken[: len(broken) - len(body)] + edge + body if body else broken

    def _occurrences(self, text: str, mark: str) -> Iterator[tuple[int, str]]:
        """(position, token text) from left to right, without overlaps."""
        position = 0
        while self._first is not None and (first := self._first.search(text, position)):
            start = first.start()
            found = self._longest(text, start, mark)
            if found:
                yield start, found
            position = start + (len(found) or 1)

    def _longest(self, text: str, start: int, mark: str) -> str:
        for length in self._lengths[text[start]]:
            candidate = text[start : start + length]
            # A token of one character has no inside to break up: the mark behind it counts.
            single = length == 1 and mark and text.startswith(mark, start + 1)
            if candidate in self._tokens and not single:
                return candidate
        return ""


def unused_marks(text: str) -> Marks | None:
    """Marks that `text` does not contain; None if it has every character there is for that."""
    used = set(text)

    def is_unused(character: str) -> bool:
        return character not in used and _spelled(character) not in text

    # Noncharacters, then the private-use areas: no tokenizer, template or case mapping gives them a meaning.
    ranges = (range(0xFDD0, 0xFDF0), range(0xE000, 0xF900), range(0xF0000, 0x10FFFE))
    unused = (chr(code) for codes in ranges for code in codes if is_unused(chr(code)))
    chosen = [next(unused, "") for _ in range(4)]
    return Marks(*chosen) if all(chosen) else None


def _spelled(mark: str) -> str:
    """A mark in Python's and JSON's ASCII."""
    return ascii(mark)[1:-1]
