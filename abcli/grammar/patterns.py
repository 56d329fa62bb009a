"""Regular expressions as JSON Schema writes them (ECMA-262), rewritten for llguidance, which reads Rust's.

The two agree in most things and differ silently in some: `[[a]`, `a&&b` in a class, `\\<`, `\\a` and `.` mean others.
Where readers of JSON disagree (`\\w`, `\\d`, `\\s` and their opposites), the result allows only what all of them do.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from abcli.errors import GrammarError

MAX_CHARACTERS = 100_000
MAX_NESTING = 200
MAX_REPETITIONS = 100_000  # how often the innermost part must be repeated, all repetitions around it multiplied

_SPACES = r"\t\n\x0b\x0c\r\x20\u{a0}\u{1680}\u{2000}-\u{200a}\u{2028}\u{2029}\u{202f}\u{205f}\u{3000}"
# What everybody counts as a digit, a word's letter or a space, and what anybody does: for use within [...].
_SURE = {"d": "0-9", "w": "0-9A-Za-z_", "s": _SPACES}
_POSSIBLE = {
    "d": r"\p{Nd}",
    "w": r"\p{Alphabetic}\p{M}\p{N}\p{Pc}\u{200c}\u{200d}",
    "s": _SPACES + r"\x1c-\x1f\u{85}\u{feff}",
}
_DOT = r"[^\n\r\u{2028}\u{2029}]"
_CONTROL = {"t": 0x09, "n": 0x0A, "v": 0x0B, "f": 0x0C, "r": 0x0D, "0": 0}
_ESCAPE = re.compile(
    r"\\(?:u(?P<high>[dD][89abAB][0-9a-fA-F]{2})\\u(?P<low>[dD][c-fC-F][0-9a-fA-F]{2})"
    r"|u(?P<four>[0-9a-fA-F]{4})|u\{(?P<braces>[0-9a-fA-F]{1,6})\}|x(?P<two>[0-9a-fA-F]{2})|c(?P<control>[A-Za-z])"
    r"|(?P<property>[pP])\{(?P<name>[A-Za-z0-9_=]{1,60})\}|(?P<class>[dDwWsS])|(?P<single>.))",
    re.DOTALL,
)
_QUANTIFIER = re.compile(r"(?:[*+?]|\{(?P<least>[0-9]+)(?P<range>,(?P<most>[0-9]*))?\})\??")
_GROUP = re.compile(r"\((?P<kind>\?(?:(?P<flags>i)(?P<scope>[:)])|:|P?<[A-Za-z_]\w*>|.?.?))?", re.DOTALL)


@dataclass
class _Level:
    """A parenthesis that is open, or the whole; `repeated` is how often its innermost part is repeated so far."""

    repeated: int = 1
    last: int = 0  # repetitions of the part before, 0 where there is none that could be repeated
    at_start: bool = True
    anchored: bool = False


@dataclass
class _Reader:
    text: str
    whole: bool
    position: int = 0
    parts: list[str] = field(default_factory=list)
    levels: list[_Level] = field(default_factory=lambda: [_Level()])

    def read(self) -> str:
        while self.position < len(self.text):
            self._next()
        if len(self.levels) > 1:
            raise self._error("a '(' is never closed")
        return "".join(self.parts)

    def _next(self) -> None:
        character, level = self.text[self.position], self.levels[-1]
        if character == "(":
            self._open()
        elif character == ")":
            self._close()
        elif character == "|":
            self._advance("|", 1)
            level.last, level.at_start, level.anchored = 0, True, False
        elif character in "^$":
            self._anchor(character)
        elif (quantifier := _QUANTIFIER.match(self.text, self.position)) is not None:
            self._repeat(quantifier)
        elif re.match(r"\{,[0-9]+\}", self.text[self.position :]):
            raise self._error("'{,' means different things to different readers")
        elif character == "[":
            self._atom(self._class())
        elif character == "\\":
            self._atom(self._escape_outside())
        else:
            self.position += 1
            self._atom(_DOT if character == "." else _literal(character))

    def _advance(self, part: str, length: int) -> None:
        self.parts.append(part)
        self.position += length

    def _atom(self, part: str, repeated: int = 1) -> None:
        level = self.levels[-1]
        if level.anchored and self.whole:
            raise self._error("'$' can only stand at the end")
        self.parts.append(part)
        level.last, level.at_start = repeated, False
        level.repeated = max(level.repeated, repeated)

    def _open(self) -> None:
        match = _GROUP.match(self.text, self.position)
        kind = match["kind"] or "" if match else ""
        flags = match["flags"] if match else None
        if match and flags and match["scope"] == ")":
            if self.position:
                raise self._error(f"{match.group()!r} can only stand at the beginning")
            self._advance(match.group(), len(match.group()))
            return
        if match is None or not (not kind or kind == "?:" or flags or kind.endswith(">")):
            raise self._error(f"'(?{kind[1:3]}', which looks ahead, behind or is unknown, cannot be enforced")
        if len(self.levels) > MAX_NESTING:
            raise self._error(f"there are more than {MAX_NESTING} parentheses in one another")
        self._advance(f"(?{flags}:" if flags else "(?:", len(match.group()))
        self.levels.append(_Level())

    def _close(self) -> None:
        if len(self.levels) == 1:
            raise self._error("a ')' closes nothing")
        self.position += 1
        inner = self.levels.pop()
        self._atom(")", inner.repeated)

    def _anchor(self, character: str) -> None:
        """Where the whole answer has to match, an anchor at its edge says nothing new."""
        level = self.levels[-1]
        self.position += 1
        if not self.whole:
            self.parts.append(character)
            level.last = 0
        elif len(self.levels) > 1 or (character == "^" and not level.at_start):
            raise self._error(f"{character!r} can only stand at the {'beginning' if character == '^' else 'end'}")
        else:
            level.last, level.anchored = 0, level.anchored or character == "$"

    def _repeat(self, quantifier: re.Match[str]) -> None:
        level, shown = self.levels[-1], quantifier.group()
        if not level.last:
            raise self._error(f"there is nothing that {shown[:40]!r} could repeat")
        if quantifier["least"] is not None:
            least, most = quantifier["least"].lstrip("0") or "0", quantifier["most"]
            if len(least) > 9 or (most and len(most) > 9):
                raise self._error(f"{shown[:40]} repeats too often")
            if most and int(most) < int(least):
                raise self._error(f"{shown} ends before it begins")
            level.last *= max(1, int(least))
            level.repeated = max(level.repeated, level.last)
            if level.repeated > MAX_REPETITIONS:
                raise self._error(f"more than {MAX_REPETITIONS:,} repetitions are asked for")
        # What is taken first makes no difference to what matches.
        self._advance(shown.removesuffix("?") if len(shown) > 1 else shown, len(shown))
        level.last = 0

    def _escape(self) -> re.Match[str]:
        match = _ESCAPE.match(self.text, self.position)
        if match is None:
            raise self._error("it ends with a backslash")
        self.position = match.end()
        return match

    def _escape_outside(self) -> str:
        match = self._escape()
        if match["class"]:
            return _shorthand(match["class"], outside=True)
        if match["property"]:
            return match.group()
        if match["single"] in ("b", "B"):
            raise self._error(f"\\{match['single']}, a word's edge, cannot be enforced")
        if (match["single"] or "0") in "123456789k":
            raise self._error(f"\\{match['single']}, which repeats what matched before, cannot be enforced")
        return _literal(chr(self._code(match)))

    def _code(self, match: re.Match[str]) -> int:
        """The character that an escape stands for."""
        if match["high"]:
            return 0x10000 + ((int(match["high"], 16) - 0xD800) << 10) + int(match["low"], 16) - 0xDC00
        digits = match["four"] or match["braces"] or match["two"]
        if digits:
            code = int(digits, 16)
        elif match["control"]:
            code = ord(match["control"].upper()) - 64
        elif match["single"] in _CONTROL:
            code = _CONTROL[match["single"]]
        elif match["single"].isascii() and match["single"].isalnum():
            raise self._error(f"\\{match['single']} is not known")
        else:
            code = ord(match["single"])
        if 0xD800 <= code < 0xE000 or code > 0x10FFFF:
            raise self._error(f"{match.group()} is not a character")
        return code

    def _class(self) -> str:
        start = self.position
        self.position += 1
        negated = self.text.startswith("^", self.position)
        self.position += negated
        parts: list[str] = []
        while not self.text.startswith("]", self.position):
            if self.position >= len(self.text):
                raise self._error("a '[' is never closed")
            low = self._member(negated)
            if isinstance(low, int) and self._range_follows():
                self.position += 1
                high = self._member(negated)
                if isinstance(high, int):
                    if high < low:
                        raise self._error(f"the range {chr(low)}-{chr(high)} ends before it begins")
                    parts.append(f"{_in_class(low)}-{_in_class(high)}")
                    continue
                parts += [_in_class(low), "\\-", high]
                continue
            parts.append(_in_class(low) if isinstance(low, int) else low)
        self.position += 1
        if not parts:
            if negated:
                return "(?s:.)"
            raise self._error(f"{self.text[start : self.position]} allows no character")
        return f"[{'^' if negated else ''}{''.join(parts)}]"

    def _range_follows(self) -> bool:
        following = self.text[self.position : self.position + 2]
        return len(following) == 2 and following[0] == "-" and following[1] != "]"

    def _member(self, negated: bool) -> int | str:
        """A character's code, or a set to stand within [...]."""
        if self.position >= len(self.text):
            raise self._error("a '[' is never closed")
        if self.text[self.position] != "\\":
            self.position += 1
            return ord(self.text[self.position - 1])
        match = self._escape()
        if match["class"]:
            return _shorthand(match["class"], outside=False, negated=negated)
        if match["property"]:
            return match.group()
        return 8 if match["single"] == "b" else self._code(match)

    def _error(self, what: str) -> GrammarError:
        return GrammarError(what, "write it differently")


def _shorthand(letter: str, *, outside: bool, negated: bool = False) -> str:
    """`\\d` and the like; within a negated class the larger set leaves the smaller one allowed."""
    opposite = letter.isupper()
    inner = (_POSSIBLE if opposite != negated else _SURE)[letter.lower()]
    if outside or opposite:
        return f"[{'^' if opposite else ''}{inner}]"
    return inner


def _in_class(code: int) -> str:
    character = chr(code)
    return character if character.isascii() and character.isalnum() else f"\\u{{{code:x}}}"


def _literal(character: str) -> str:
    return character if character.isalnum() or character in " _" else f"\\u{{{ord(character):x}}}"


def translate(pattern: str, *, whole: bool = False) -> str:
    """The pattern in Rust's dialect; with `whole` the text has to match from beginning to end, else anywhere in it.

    Raises GrammarError, whose message says what is wrong, for what is no regular expression or cannot be enforced:
    looking ahead or behind, references back, edges of words.
    """
    if len(pattern) > MAX_CHARACTERS:
        raise GrammarError(f"it has {len(pattern):,} characters, more than {MAX_CHARACTERS:,}", "shorten it")
    try:
        pattern.encode()
    except UnicodeEncodeError as error:
        raise GrammarError(f"it has half a character at {error.start:,}", "remove it") from None
    return _Reader(pattern, whole).read()
