"""Breaks a streamed answer at words where a line of the terminal ends."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

from rich.cells import cell_len

_TAB = 8
_PIECES = re.compile(r"\n|[ \t]+|[^ \t\n]+")


class WordWrap:
    """Takes text piece by piece and gives it back with line breaks; a word is held back until it is whole.

    Only what is yet to be shown is broken: after a resize the new width counts for what follows.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        """`width` gives the columns of the terminal now; 0 is none, and nothing is broken."""
        self._width = width
        self._column = 0
        self._blanks = ""
        self._word = ""

    def add(self, text: str) -> str:
        """What can be shown now that `text` has come."""
        return "".join(self._added(text))

    def flush(self) -> str:
        """What is held back, at the end of the answer."""
        return self._placed() + self._taken_blanks()

    def _added(self, text: str) -> Iterator[str]:
        for piece in _PIECES.findall(text):
            if piece == "\n":
                yield self.flush() + "\n"
                self._column = 0
            elif piece.isspace():
                yield self._placed()
                self._blanks += piece
            else:
                yield from self._lengthened(piece)

    def _lengthened(self, letters: str) -> Iterator[str]:
        """Add letters to the word."""
        if letters.isascii() and not (self._word and _is_ideograph(self._word[-1])):
            self._word += letters
            yield self._without_excess()
            return
        for letter in letters:
            # A line may end beside an ideograph, but not before a full stop or a closing bracket.
            after = self._word and _is_ideograph(self._word[-1]) and letter.isalnum()
            if after or _is_ideograph(letter):
                yield self._placed()
            self._word += letter
            yield self._without_excess()

    def _without_excess(self) -> str:
        """The beginning of a word that no line can hold."""
        width, shown = self._width(), ""
        while width and cell_len(self._word) > width:
            whole, taken = self._word, 1
            # The last column may be too narrow for a wide letter.
            while cell_len(whole[: taken + 1]) <= width:
                taken += 1
            self._word = whole[:taken]
            shown += self._placed()
            self._word = whole[taken:]
        return shown

    def _placed(self) -> str:
        """The word so far behind its blanks, on the next line if it has no room on this one."""
        if not self._word:
            return ""
        word, size, width = self._word, cell_len(self._word), self._width()
        begin = self._after(self._blanks)
        if width and self._column and begin + size > width:
            self._blanks, self._word, self._column = "", "", size
            return "\n" + word
        blanks = self._taken_blanks()
        self._word, self._column = "", begin + size
        return blanks + word

    def _taken_blanks(self) -> str:
        blanks, self._column, self._blanks = self._blanks, self._after(self._blanks), ""
        return blanks

    def _after(self, blanks: str) -> int:
        column = self._column
        for blank in blanks:
            column += _TAB - column % _TAB if blank == "\t" else 1
        return column


def _is_ideograph(letter: str) -> bool:
    return unicodedata.category(letter) == "Lo" and unicodedata.east_asian_width(letter) == "W"
