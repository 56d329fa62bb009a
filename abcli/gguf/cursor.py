"""A cursor over the start of a GGUF file: numbers, names, strings and arrays, all of them bounded.

The file may come from a stranger: every count and length is checked against the file's size and a limit
before anything is allocated, so that a damaged file costs neither memory nor time.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from abcli.errors import ModelFileError

# Real files stay far below: a vocabulary of 262,144 tokens with its merges makes a header of 15 MB.
MAX_HEADER_BYTES = 128 * 2**20
MAX_STRING_BYTES = 16 * 2**20
MAX_ARRAY_ITEMS = 16 * 2**20

FETCH_AGAIN = "the file is damaged or was not downloaded completely: fetch it again"

STRING, ARRAY = 8, 9
SCALARS: dict[int, tuple[str, str]] = {
    0: ("u8", "<u1"),
    1: ("i8", "<i1"),
    2: ("u16", "<u2"),
    3: ("i16", "<i2"),
    4: ("u32", "<u4"),
    5: ("i32", "<i4"),
    6: ("f32", "<f4"),
    7: ("bool", "?"),
    10: ("u64", "<u8"),
    11: ("i64", "<i8"),
    12: ("f64", "<f8"),
}


@dataclass(frozen=True)
class ArrayValue:
    """An array of the metadata, kept as the file's bytes and decoded when asked for."""

    element_type: str
    count: int
    data: bytes = field(repr=False)

    def numbers(self) -> npt.NDArray[Any]:
        """The elements as a vector; raises TypeError for an array of strings."""
        codes = dict(SCALARS.values())
        if self.element_type not in codes:
            raise TypeError(f"an array of {self.element_type} holds no numbers")
        return np.frombuffer(self.data, codes[self.element_type], self.count)

    def strings(self) -> Iterator[bytes]:
        """The elements one by one, as the file has them; raises TypeError for an array of numbers."""
        if self.element_type != "string":
            raise TypeError(f"an array of {self.element_type} holds no strings")
        data, position = self.data, 0
        for _ in range(self.count):
            start = position + 8
            position = start + int.from_bytes(data[position:start], "little")
            yield data[start:position]


class Cursor:
    """Reads on only as far as it is asked to; `position` counts bytes from the start of the file."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.path = path
        self.size = size
        self.position = 0
        self._file = file
        self._buffer = bytearray()

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        end = self.position + count
        if end > len(self._buffer):
            self._load(end)
        taken = bytes(self._buffer[self.position : end])
        self.position = end
        return taken

    def unsigned(self, size: int) -> int:
        """An unsigned little-endian number of `size` bytes."""
        return int.from_bytes(self.take(size), "little")

    def name(self, what: str, limit: int) -> str:
        """A name of 1..`limit` bytes without control characters."""
        text = self._text(f"the name of {what}", limit)
        if not text.isprintable() or not text:
            raise self.damaged(f"gives {what} the name {text[:40]!r}")
        return text

    def value(self, key: str) -> tuple[str, bool | int | float | str | ArrayValue]:
        """A metadata value with its type before it, as (name of the type, value)."""
        kind = self.unsigned(4)
        if kind == ARRAY:
            array = self._array(key)
            return f"array of {array.element_type}", array
        if kind == STRING:
            return "string", self._text(f"the value of {key!r}", MAX_STRING_BYTES)
        if kind not in SCALARS:
            raise self.damaged(f"gives {key!r} the unknown type {kind}")
        name, code = SCALARS[kind]
        return name, np.frombuffer(self.take(np.dtype(code).itemsize), code)[0].item()

    def damaged(self, what: str) -> ModelFileError:
        """The error that says what is wrong with the file."""
        return ModelFileError(f"{self.path} {what}", FETCH_AGAIN)

    def _array(self, key: str) -> ArrayValue:
        kind, count = self.unsigned(4), self.unsigned(8)
        if count > MAX_ARRAY_ITEMS:
            raise self.damaged(f"claims that {key!r} has {count} items")
        if kind in SCALARS:
            name, code = SCALARS[kind]
            return ArrayValue(name, count, self.take(count * np.dtype(code).itemsize))
        if kind != STRING:
            raise self.damaged(f"gives the items of {key!r} the unknown type {kind}")
        start = self.position
        self._skip_strings(key, count)
        return ArrayValue("string", count, bytes(self._buffer[start : self.position]))

    def _skip_strings(self, key: str, count: int) -> None:
        # The only loop over all tokens of a vocabulary, so its locals are kept at hand.
        length_at = struct.Struct("<Q").unpack_from
        position, available = self.position, len(self._buffer)
        for _ in range(count):
            if position + 8 > available:
                available = self._load(position + 8)
            length = length_at(self._buffer, position)[0]
            if length > MAX_STRING_BYTES:
                raise self.damaged(f"claims that an item of {key!r} has {length} bytes")
            position += 8 + length
            if position > available:
                available = self._load(position)
        self.position = position

    def _text(self, what: str, limit: int) -> str:
        length = self.unsigned(8)
        if length > limit:
            raise self.damaged(f"claims that {what} has {length} bytes")
        return self.take(length).decode("utf-8", errors="backslashreplace")

    def _load(self, end: int) -> int:
        """Read on until the buffer reaches `end`; returns the new length of the buffer."""
        if end > self.size:
            raise self.damaged("ends in the middle of its header")
        if end > MAX_HEADER_BYTES:
            raise self.damaged(f"has a header of more than {MAX_HEADER_BYTES >> 20} MiB")
        ahead = max(end - len(self._buffer), len(self._buffer), 2**16)
        self._buffer += self._file.read(min(ahead, self.size - len(self._buffer)))
        if end > len(self._buffer):
            raise self.damaged("ends in the middle of its header")
        return len(self._buffer)
