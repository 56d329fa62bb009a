"""gzip and zstd, read as a stream that notices a missing end, and written by a file's suffix."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, BinaryIO, Literal, Protocol, cast

from abcli.errors import BatchError, PromptError, UsageError

Compression = Literal["gzip", "zstd"]

SUFFIXES: dict[str, Compression] = {".gz": "gzip", ".zst": "zstd"}
_MAGIC: dict[Compression, tuple[bytes, ...]] = {
    "gzip": (b"\x1f\x8b",),
    # A frame, and the sixteen kinds of skippable frame.
    "zstd": (b"\x28\xb5\x2f\xfd", *(bytes([0x50 + kind]) + b"\x2a\x4d\x18" for kind in range(16))),
}
_READ_BYTES = 1 << 16
# Some bytes of zstd can stand for 100,000: what one of these pieces becomes still fits into memory.
_PIECE_BYTES = 1 << 11
_GZIP_HEADER_AND_TRAILER = 31
_GZIP_LEVEL = 6


class DamagedError(PromptError):
    """Compressed data that is damaged or ends too early."""


class _Decompressor(Protocol):
    """Of one gzip member or zstd frame."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def compression_of(path: Path) -> Compression | None:
    """What the suffix of `path` says."""
    return SUFFIXES.get(path.suffix.lower())


def plain_suffix(path: Path) -> str:
    """The suffix below that of a compression, in lower case: ".jsonl" of "prompts.jsonl.gz"."""
    return (Path(path.stem) if compression_of(path) else path).suffix.lower()


def check_available(path: Path) -> None:
    """Raise UsageError if `path` ends in .zst and the library for it is not installed."""
    if compression_of(path) == "zstd":
        _zstandard()


def read_chunks(file: BinaryIO, name: str, expected: Compression | None = None) -> Iterator[bytes]:
    """The bytes of `file`, decompressed if they begin as gzip or zstd; several members or frames are joined.

    Memory stays bounded. Raises UsageError without a library for zstd, PromptError if it is not of the `expected`
    compression, DamagedError where it ends too early or is damaged, and BatchError if it cannot be read.
    """
    chunks = _raw_chunks(file, name)
    first = b""
    for chunk in chunks:
        first += chunk
        if len(first) >= 4:
            break
    found = _recognise(first)
    if expected and first and found != expected:
        raise PromptError(f"{name} is not {expected} data", "rename it, or compress it again")
    whole = chain([first] if first else [], chunks)
    yield from whole if found is None else _decompressed(_pieces(whole), found, name)


@contextmanager
def compressing(file: IO[bytes], path: Path) -> Iterator[IO[bytes]]:
    """A writer into `file`, which stays open, compressed as the suffix of `path` says.

    Raises UsageError without a library for zstd.
    """
    kind = compression_of(path)
    if kind == "gzip":
        # Neither name nor time: the same results make the same file.
        with gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as packed:
            yield cast("IO[bytes]", packed)
    elif kind == "zstd":
        with _zstandard().ZstdCompressor().stream_writer(file, closefd=False) as writer:
            yield cast("IO[bytes]", writer)
    else:
        yield file


def _recognise(beginning: bytes) -> Compression | None:
    for kind, marks in _MAGIC.items():
        if beginning.startswith(marks):
            return kind
    return None


def _raw_chunks(file: BinaryIO, name: str) -> Iterator[bytes]:
    # Of a pipe, what there is: its writer may wait for answers.
    read = getattr(file, "read1", file.read)
    while True:
        try:
            chunk = read(_READ_BYTES)
        except OSError as error:
            raise BatchError(f"cannot read {name}: {error.strerror}", "check the disk it is on") from error
        if not chunk:
            return
        yield chunk


def _pieces(chunks: Iterable[bytes]) -> Iterator[bytes]:
    for chunk in chunks:
        yield from (chunk[at : at + _PIECE_BYTES] for at in range(0, len(chunk), _PIECE_BYTES))


def _decompressed(pieces: Iterator[bytes], kind: Compression, name: str) -> Iterator[bytes]:
    make, failure = _decompressors(kind)
    current: _Decompressor | None = None
    for piece in pieces:
        data = piece
        while data:
            if current is None:
                # gzip allows zeros after its members: tapes were filled up with them.
                data = data.lstrip(b"\0") if kind == "gzip" else data
                if not data:
                    break
                current = make()
            try:
                plain = current.decompress(data)
            except failure as error:
                raise DamagedError(f"{name} is damaged {kind} data: {error}", "make or fetch it again") from None
            if plain:
                yield plain
            data = b""
            if current.eof:
                data, current = current.unused_data, None
    if current is not None:
        raise DamagedError(f"{name} ends within its {kind} data", "it may be incomplete: make or fetch it again")


def _decompressors(kind: Compression) -> tuple[Callable[[], _Decompressor], type[Exception]]:
    if kind == "gzip":
        return lambda: zlib.decompressobj(_GZIP_HEADER_AND_TRAILER), zlib.error
    library = _zstandard()
    return lambda: cast("_Decompressor", library.ZstdDecompressor().decompressobj()), library.ZstdError


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError:
        raise UsageError("reading and writing zstd needs a library", "pip install 'abcli[zstd]'") from None
    return zstandard
