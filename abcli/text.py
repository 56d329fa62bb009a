"""Words that several rooms put together, and how they say how far they are."""

from __future__ import annotations

import re
from collections.abc import Callable

# Called with (what is done, how much of it, of how much).
StageProgress = Callable[[str, int, int], None]
_GIB = 1 << 30
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|([nrt'\"\\]))")
_CHARACTERS = {b"n": b"\n", b"r": b"\r", b"t": b"\t"}


def counted(count: int, what: str) -> str:
    """A number of things for people: "1 bucket", "6 buckets", "1,000 buckets"."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def unescaped(text: str) -> str:
    r"""`text` with \n, \r, \t, \', \", \\ and \xHH replaced by what they stand for; \xHH is a byte of UTF-8.

    As llama.cpp's string_process_escapes (common/common.cpp) does; other backslashes stay. Raises ValueError for bytes
    that are not UTF-8.
    """

    def character(match: re.Match[bytes]) -> bytes:
        return bytes.fromhex(match[1].decode()) if match[1] else _CHARACTERS.get(match[2], match[2])

    return _ESCAPE.sub(character, text.encode("utf-8", "surrogateescape")).decode("utf-8")


def gibibytes(size: int) -> str:
    """A number of bytes for people, in binary units: "1.5 GiB", "20 MiB"."""
    if size >= _GIB:
        return f"{size / _GIB:.1f} GiB" if size < 10 * _GIB else f"{size / _GIB:,.0f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"
