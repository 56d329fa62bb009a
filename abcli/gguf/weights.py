"""Looks through a model's weights for what is no finite number, without llama.cpp and in little memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from abcli.errors import ModelFileError
from abcli.gguf.cursor import FETCH_AGAIN
from abcli.gguf.header import TENSOR_TYPES, Header, TensorInfo

_CHUNK_BYTES = 4 << 20
# Integers whose bits `mask` are all set are no finite numbers: exponents of ones.
_FLOATS: dict[str, tuple[str, int]] = {
    "f32": ("<u4", 0x7F800000),
    "f16": ("<u2", 0x7C00),
    "bf16": ("<u2", 0x7F80),
    "f64": ("<u8", 0x7FF0000000000000),
}
# Where the f16 scales of a block lie, in bytes from its start (ggml/src/ggml-common.h). iq1_m spreads its scale over
# the bits of others, so its blocks are not looked at.
_HALF_SCALES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("q4_0", "q5_0", "q8_0", "iq4_nl", "iq4_xs", "q1_0", "q2_0"), (0,)),
    **dict.fromkeys(("iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq1_s"), (0,)),
    **dict.fromkeys(("q4_1", "q5_1", "q4_K", "q5_K"), (0, 2)),
    "q2_K": (80, 82),
    "q3_K": (108,),
    "q6_K": (208,),
    "tq1_0": (52,),
    "tq2_0": (64,),
}
# Scales of one byte, and the byte that is no number.
_BYTE_SCALES: dict[str, tuple[tuple[int, ...], int]] = {"mxfp4": ((0,), 0xFF), "nvfp4": ((0, 1, 2, 3), 0x7F)}
_SHOWN = 3
_VISIBLE = {*_FLOATS, *_HALF_SCALES, *_BYTE_SCALES}


@dataclass(frozen=True)
class Scan:
    """How many bytes were looked through or, for types whose scales cannot be seen alone, left out."""

    scanned: int
    skipped: int
    bad: tuple[tuple[str, int], ...]
    """Tensors with NaN or infinity among their numbers or scales, and how many of them."""


def check_finite(headers: Iterable[Header], on_bytes: Callable[[int], None] | None = None) -> list[Scan]:
    """The scans of files, which hold finite numbers only. Raises ModelFileError that names the tensors with others."""
    scans = [(header.path, scan_weights(header, on_bytes)) for header in headers]
    bad = [one for _path, scan in scans for one in scan.bad]
    if bad:
        path = next(path for path, scan in scans if scan.bad)
        shown = ", ".join(f"{name} ({count:,})" for name, count in bad[:_SHOWN])
        more = f" and {len(bad) - _SHOWN} more tensors" if len(bad) > _SHOWN else ""
        raise ModelFileError(f"{path}: there are NaN or infinite numbers in {shown}{more}", FETCH_AGAIN)
    return [scan for _path, scan in scans]


def scan_weights(header: Header, on_bytes: Callable[[int], None] | None = None) -> Scan:
    """Read the tensors of one file to the end; `on_bytes` gets the size of each piece.

    Raises ModelFileError if the file cannot be read.
    """
    scanned = skipped = 0
    bad: list[tuple[str, int]] = []
    try:
        with header.path.open("rb", buffering=0) as file:
            for tensor in header.tensors:
                if tensor.type_name not in _VISIBLE:
                    skipped += tensor.size_bytes
                    continue
                count = _bad_numbers(file, header.data_offset + tensor.offset, tensor, on_bytes)
                scanned += tensor.size_bytes
                if count:
                    bad.append((tensor.name, count))
    except OSError as error:
        reason = error.strerror or str(error)
        raise ModelFileError(
            f"cannot read {header.path}: {reason}", "check the disk, or fetch the file again"
        ) from error
    return Scan(scanned, skipped, tuple(bad))


def _bad_numbers(file: BinaryIO, offset: int, tensor: TensorInfo, on_bytes: Callable[[int], None] | None) -> int:
    block = TENSOR_TYPES[tensor.type_id][2]
    size = _CHUNK_BYTES // block * block
    file.seek(offset, os.SEEK_SET)
    left, found = tensor.size_bytes, 0
    while left:
        data = _read(file, min(size, left), tensor.name)
        found += _count(data, tensor.type_name, block)
        left -= len(data)
        if on_bytes is not None:
            on_bytes(len(data))
    return found


def _read(file: BinaryIO, count: int, name: str) -> bytes:
    """Exactly `count` bytes: a read may give fewer."""
    parts = []
    while count:
        part = file.read(count)
        if not part:
            raise ModelFileError(f"the file ends within the tensor {name!r}", FETCH_AGAIN)
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _count(data: bytes, type_name: str, block: int) -> int:
    if type_name in _FLOATS:
        code, mask = _FLOATS[type_name]
        return _unfinite(np.frombuffer(data, code), mask)
    blocks = np.frombuffer(data, np.uint8).reshape(-1, block)
    if type_name in _BYTE_SCALES:
        places, wrong = _BYTE_SCALES[type_name]
        return int(np.count_nonzero(blocks[:, list(places)] == wrong))
    return sum(
        _unfinite(np.ascontiguousarray(blocks[:, place : place + 2]).view("<u2"), _FLOATS["f16"][1])
        for place in _HALF_SCALES[type_name]
    )


def _unfinite(bits: NDArray[np.unsignedinteger], mask: int) -> int:
    limit = bits.dtype.type(mask)
    return int(np.count_nonzero((bits & limit) == limit))
