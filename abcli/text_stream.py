"""Text from the bytes of tokens as they come, up to a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from abcli.errors import UsageError


class TextStream:
    """Bytes in, text out: decodes UTF-8 across tokens and holds back what may become a stop string.

    A character of which the end never comes is left out; bytes that cannot be UTF-8 become U+FFFD.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        """`stop` lists the strings that end the text; they are not part of it."""
        if any(not text for text in stop):
            raise UsageError("a stop string is empty", "give `stop` some text")
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stop = tuple(stop)
        self._held = ""
        self.stopped_by = ""
        """The stop string that ended the text, if one did."""

    @property
    def stopped(self) -> bool:
        """Whether a stop string has ended the text."""
        return bool(self.stopped_by)

    def feed(self, data: bytes, *, final: bool = False) -> str:
        """The text that is certain after `data`; with `final`, all of it. Empty once `stopped`."""
        if self.stopped:
            return ""
        self._held += self._decode(data)
        found = [(index, text) for text in self._stop if (index := self._held.find(text)) >= 0]
        if found:
            index, self.stopped_by = min(found)
            certain, self._held = self._held[:index], ""
            return certain
        keep = 0 if final else self._possible_stop()
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def _possible_stop(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = max((len(text) for text in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-length:]) for text in self._stop):
                return length
        return 0
