"""The file of one stored prompt prefix: written piece by piece, and read without trusting a byte of it.

Layout (little-endian; the index comes last because it describes pieces that are written as they arrive):
   0  8 bytes   magic
   8  u32       version of this layout
  12  u32       size of the index in bytes
  16  u32       number of tokens
  20  u32       0
  24  u64       offset of the tokens
  32  32 bytes  SHA-256 of bytes 0 to 32, the tokens and the index
  64  pieces, each at a multiple of 64: the bytes of `llama_state_seq_get_data` for a range of tokens
   .  tokens, i32 each
   .  index, JSON: {"key": {name: text}, "model": name, "pieces": [{"start", "end", "offset", "size", "sha256"}]}
The file ends with the index. Pieces are not compressed: half-precision keys and values shrink by 8 % at most.
The digests find damage; they do not protect against somebody who may write to the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abcli.errors import AbcliError
from abcli.native.rotating.keys import aligned_bytes

VERSION = 1
_MAGIC = b"ABCLIPFX"
_PREFIX = struct.Struct("<8sIIIIQ")
_DIGEST_BYTES = 32
_ALIGNMENT = 64
_FIRST_PIECE = _PREFIX.size + _DIGEST_BYTES
_TOKEN = np.dtype("<i4")
# Far more than any context, so that a forged length cannot ask for much memory.
_MAX_TOKENS = 1 << 24
_MAX_INDEX_BYTES = 1 << 26
_PIECE_FIELDS = {"start": int, "end": int, "offset": int, "size": int, "sha256": str}


class DamagedFileError(AbcliError):
    """A file that is truncated, changed, or no stored prefix at all."""


class TooLargeError(AbcliError):
    """An entry that would be larger than the whole cache may be."""


@dataclass(frozen=True)
class Piece:
    """State bytes (uint8 [n], 64-byte aligned when read from a file) of the tokens `start` to `end`."""

    start: int
    end: int
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class PieceInfo:
    """Where in a file a piece lies: `size` bytes at `offset`, whose SHA-256 is `digest` (hex)."""

    start: int
    end: int
    offset: int
    size: int
    digest: str


@dataclass(frozen=True)
class Index:
    """What a file says about itself: its key, the model's name, tokens int32 [n] and the pieces, which tile them."""

    key: dict[str, str]
    model: str
    tokens: NDArray[np.int32]
    pieces: tuple[PieceInfo, ...]


def read_index(file: BufferedReader) -> Index | None:
    """The checked index of an open file; None for a file of another version of the layout.

    Raises DamagedFileError, and OSError if the system cannot read. No piece is read.
    """
    file_size = os.fstat(file.fileno()).st_size
    file.seek(0)
    prefix = _read(file, _PREFIX.size)
    digest = _read(file, _DIGEST_BYTES)
    magic, version, index_bytes, count, _zero, tokens_offset = _PREFIX.unpack(prefix)
    if magic != _MAGIC:
        raise DamagedFileError(f"it begins with {magic!r}")
    if version != VERSION:
        return None
    if count > _MAX_TOKENS or index_bytes > _MAX_INDEX_BYTES:
        raise DamagedFileError(f"it announces {count} tokens and an index of {index_bytes} bytes")
    announced = tokens_offset + count * _TOKEN.itemsize + index_bytes
    if announced != file_size or tokens_offset < _FIRST_PIECE:
        raise DamagedFileError(f"it has {file_size} bytes, but announces {announced}")
    file.seek(tokens_offset)
    tokens = _read(file, count * _TOKEN.itemsize)
    index = _read(file, index_bytes)
    if _index_digest(prefix, tokens, index) != digest:
        raise DamagedFileError("the digest of its index does not fit")
    return _parse_index(index, np.frombuffer(tokens, _TOKEN).astype(np.int32), tokens_offset)


def read_piece(file: BufferedReader, info: PieceInfo) -> Piece:
    """One piece of an open file, its digest checked. Raises DamagedFileError, and OSError."""
    data = aligned_bytes(info.size)
    file.seek(info.offset)
    if file.readinto(data.data) != info.size:
        raise DamagedFileError(f"it ends within tokens {info.start} to {info.end}")
    if hashlib.sha256(data.data).hexdigest() != info.digest:
        raise DamagedFileError(f"the digest of tokens {info.start} to {info.end} does not fit")
    return Piece(info.start, info.end, data)


def write_entry(
    file: BufferedWriter,
    key: Mapping[str, str],
    model: str,
    tokens: Sequence[int],
    pieces: Iterable[Piece],
    limit_bytes: int,
) -> None:
    """Write a whole entry to an empty file. The pieces tile the tokens in order, else ValueError.

    Raises TooLargeError as soon as the pieces so far, at their size per token, lead beyond `limit_bytes`; OSError
    if the system cannot write. The caller drops the file then.
    """
    stored = np.asarray(tokens, _TOKEN).tobytes()
    table: list[dict[str, int | str]] = []
    done, offset = 0, _FIRST_PIECE
    file.write(bytes(_FIRST_PIECE))
    for piece in pieces:
        if piece.start != done or not done < piece.end <= len(tokens) or piece.data.dtype != np.uint8:
            raise ValueError(f"a piece of tokens {piece.start} to {piece.end} follows token {done} of {len(tokens)}")
        data = np.ascontiguousarray(piece.data).data
        done, size = piece.end, len(data)
        if (offset + size) * len(tokens) > limit_bytes * done:
            raise TooLargeError(f"it needs more than {limit_bytes} bytes")
        file.write(data)
        file.write(bytes(-size % _ALIGNMENT))
        digest = hashlib.sha256(data).hexdigest()
        table.append({"start": piece.start, "end": done, "offset": offset, "size": size, "sha256": digest})
        offset += size + -size % _ALIGNMENT
    if done != len(tokens):
        raise ValueError(f"the pieces end at token {done} of {len(tokens)}")
    index = json.dumps({"key": dict(key), "model": model, "pieces": table}).encode()
    prefix = _PREFIX.pack(_MAGIC, VERSION, len(index), len(tokens), 0, offset)
    file.write(stored)
    file.write(index)
    if file.tell() > limit_bytes:
        raise TooLargeError(f"it needs more than {limit_bytes} bytes")
    file.seek(0)
    file.write(prefix)
    file.write(_index_digest(prefix, stored, index))
    file.flush()


def _read(file: BufferedReader, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise DamagedFileError(f"it ends {size - len(data)} bytes too early")
    return data


def _index_digest(prefix: bytes, tokens: bytes, index: bytes) -> bytes:
    digest = hashlib.sha256(prefix)
    digest.update(tokens)
    digest.update(index)
    return digest.digest()


def _parse_index(text: bytes, tokens: NDArray[np.int32], tokens_offset: int) -> Index:
    """A sound digest does not make the contents sound: a stranger's program may have written them."""
    try:
        data: Any = json.loads(text)
        key, model, table = data["key"], data["model"], data["pieces"]
        texts = [model, *key, *key.values()]
        pieces = tuple(_piece_info(item) for item in table)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DamagedFileError("its index is not of the expected form") from None
    if not all(isinstance(text, str) for text in texts):
        raise DamagedFileError("its index has a key that is no text")
    done, offset = 0, _FIRST_PIECE
    for piece in pieces:
        fits = piece.start == done < piece.end and piece.size > 0 and piece.offset % _ALIGNMENT == 0
        if not fits or not offset <= piece.offset <= tokens_offset - piece.size:
            raise DamagedFileError(f"its piece of tokens {piece.start} to {piece.end} is out of place")
        done, offset = piece.end, piece.offset + piece.size
    if done != len(tokens):
        raise DamagedFileError(f"its pieces end at token {done} of {len(tokens)}")
    return Index(dict(key), model, tokens, pieces)


def _piece_info(item: Any) -> PieceInfo:
    values = [item[name] for name in _PIECE_FIELDS]
    # `type` and not `isinstance`: True is no number here.
    if any(type(value) is not kind for value, kind in zip(values, _PIECE_FIELDS.values(), strict=True)):
        raise TypeError
    return PieceInfo(*values)
