"""Text that arrives in pieces, read by generators that wait where they need more."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Generator, Sequence
from functools import lru_cache
from typing import TypeVar

_Result = TypeVar("_Result")
Steps = Generator[None, None, _Result]
"""A generator that yields when it needs more text; what is read depends on the text alone, never on its pieces."""

Hear = Callable[[str], object]

_SPACE = re.compile(r"\s*")
_SCALAR = re.compile(r"[-+.\w]*")
_INTERESTING = re.compile(r'["\\{}\[\]\x00-\x1f]')


class NotACallError(Exception):
    """The text is not what the format wants here."""


class Source:
    """The text of one answer."""

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._mark: int | None = None
        self.closed = False
        self.cut = False

    def close(self, cut: bool) -> None:
        """Nothing more comes; `cut`: the answer did not end by itself."""
        self.closed, self.cut = True, cut

    def ended(self) -> Steps[bool]:
        """Whether the answer has ended here, by itself."""
        if self._at < len(self._text) or (yield from self.more()):
            return False
        return not self.cut

    def feed(self, text: str) -> None:
        """Add a piece."""
        keep = self._at if self._mark is None else self._mark
        self._text = self._text[keep:] + text
        self._at -= keep
        self._mark = None if self._mark is None else 0

    @property
    def rest(self) -> str:
        """What has come and is not read."""
        return self._text[self._at :]

    def mark(self, back: int = 0) -> None:
        """Remember this place, or one that many characters before."""
        self._mark = self._at - back

    def since_mark(self) -> str:
        """What was read since the place that was remembered, which is then forgotten."""
        text = self._text[self._mark : self._at]
        self._mark = None
        return text

    def skip(self) -> None:
        """Pass over all that has come."""
        self._at = len(self._text)

    def more(self) -> Steps[bool]:
        """Wait for a further piece; False at the end of the answer."""
        left = len(self._text) - self._at
        while len(self._text) - self._at == left and not self.closed:
            yield
        return len(self._text) - self._at > left

    def space(self) -> Steps[str]:
        """Read white space."""
        return (yield from self.run(_SPACE))

    def sees(self, text: str) -> Steps[bool]:
        """Whether `text` comes next."""
        while text.startswith(self._text[self._at : self._at + len(text)]):
            if len(self._text) - self._at >= len(text):
                return True
            if not (yield from self.more()):
                return False
        return False

    def peek(self) -> Steps[str]:
        """The next character, empty at the end of the answer."""
        if self._at == len(self._text):
            yield from self.more()
        return self._text[self._at : self._at + 1]

    def back(self, length: int) -> None:
        """Have the last characters read again."""
        self._at -= length

    def took(self, text: str) -> Steps[bool]:
        """Read `text` if it comes next."""
        if not (yield from self.sees(text)):
            return False
        self._at += len(text)
        return True

    def optional(self, pieces: Sequence[str]) -> Steps[bool]:
        """Read the pieces of a marker as `expect` does, if they come next; of one that is cut off, what there is."""
        for number, piece in enumerate(pieces):
            yield from self.space()
            if not (yield from self.took(piece)):
                if self.closed and piece.startswith(self._text[self._at :]):
                    self._at = len(self._text)
                return number > 0
        return True

    def expect(self, pieces: Sequence[str]) -> Steps[None]:
        """Read the pieces of a marker, with any white space before each. Raises NotACallError if they do not come."""
        for piece in pieces:
            yield from self.space()
            if not (yield from self.took(piece)):
                raise NotACallError

    def run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """Read as far as a pattern matches, one of single characters that are repeated."""
        found = ""
        while True:
            match = pattern.match(self._text, self._at)
            found += match.group() if match else ""
            self._at += len(match.group()) if match else 0
            if self._at < len(self._text) or not (yield from self.more()):
                return found

    def until(self, markers: Sequence[str], hear: Hear) -> Steps[str]:
        """Read up to the first of the markers and over it; empty at the end of the answer.

        `hear` gets the text before. A beginning of a marker is held back until it is clear what it is, and of two that
        begin alike the longer one is found.
        """
        whole, partial = _patterns(tuple(markers))
        while True:
            found = whole.search(self._text, self._at)
            begun = partial.search(self._text, self._at)
            if found and (not begun or found.start() < begun.start() or self.closed):
                self._pass(found.start(), hear)
                self._at = found.end()
                return found.group()
            self._pass(begun.start() if begun and not self.closed else len(self._text), hear)
            if self.closed:
                return ""
            yield from self.more()

    def _pass(self, end: int, hear: Hear) -> None:
        if end > self._at:
            hear(self._text[self._at : end])
            self._at = end

    def json(self, hear: Hear) -> Steps[str]:
        """Read a JSON value; `hear` gets its text as it comes. Raises NotACallError if it is none.

        Control characters within texts, which JSON does not allow and models write, are escaped.
        """
        value = ""

        def heard(text: str) -> None:
            nonlocal value
            value += text
            hear(text)

        yield from self.space()
        if (yield from self.sees("{")) or (yield from self.sees("[")) or (yield from self.sees('"')):
            yield from self._nested(heard)
        else:
            heard((yield from self.run(_SCALAR)))
        if not is_json(value):
            raise NotACallError
        return value

    def text(self) -> Steps[str]:
        """Read a JSON text and return what it means. Raises NotACallError if none comes next."""
        if not (yield from self.sees('"')):
            raise NotACallError
        return whole(str(json.loads((yield from self.json(unheard)))))

    def _nested(self, hear: Hear) -> Steps[None]:
        depth, in_text = 0, False
        while True:
            found = _INTERESTING.search(self._text, self._at)
            self._pass(found.start() if found else len(self._text), hear)
            if found is None:
                if not (yield from self.more()):
                    raise NotACallError
                continue
            character = found.group()
            if character == "\\":
                # With what it escapes.
                while len(self._text) < self._at + 2:
                    if not (yield from self.more()):
                        raise NotACallError
                self._pass(self._at + 2, hear)
                continue
            self._at += 1
            hear(json.dumps(character)[1:-1] if in_text and character < " " else character)
            if character == '"':
                in_text = not in_text
            elif not in_text:
                depth += (character in "{[") - (character in "}]")
            if depth == 0 and not in_text:
                return


def whole(text: str) -> str:
    """`text`, which escapes can give halves of characters. Raises NotACallError if they did."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise NotACallError from None
    return text


def is_json(text: str) -> bool:
    """Whether `text` is one JSON value."""
    try:
        json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse(name: str) -> object:
    raise ValueError(name)


def unheard(_text: str) -> None:
    """Pass over a text."""


@lru_cache(64)
def _patterns(markers: tuple[str, ...]) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What finds the first marker, and the first beginning of one at the end of the text."""
    ordered = sorted(filter(None, markers), key=len, reverse=True)
    beginnings = sorted({marker[:length] for marker in ordered for length in range(1, len(marker))}, key=len)[::-1]
    never = "(?!)"
    return (
        re.compile("|".join(map(re.escape, ordered)) or never),
        re.compile(f"(?:{'|'.join(map(re.escape, beginnings)) or never})\\Z"),
    )
