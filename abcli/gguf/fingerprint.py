"""Tells models apart by what they compute, not by where their file lies."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence

from abcli.config import UNTUNED, Tuning
from abcli.gguf.header import Header
from abcli.gguf.lora import Adapter

_EDGE_SAMPLE = 1 << 16
_TENSOR_SAMPLE = 1 << 12


def fingerprint(files: Sequence[Header], adapters: Sequence[Adapter] = (), tuning: Tuning = UNTUNED) -> str:
    """SHA-256 (hex) of a model: for each of its `files` the header's bytes, the size, and samples of the weights.

    Adapters count with their files, taken in the same way, and their scales; their order does not. So does a
    `tuning` of its heads.

    The samples are 64 KiB at both ends and 4 KiB in the middle of every tensor: fast for any size. Noticed are other
    metadata, another vocabulary or quantisation, and any training, merging or editing that changes a whole
    tensor; not noticed is a change to single numbers between the samples. Name, place and time do not count.
    Raises OSError for a file that cannot be read.
    """
    if not adapters and not tuning:
        return _of_files(files)
    digest = hashlib.sha256(_of_files(files).encode())
    for identity, scale in sorted((_of_files([one.header]), struct.pack("<f", one.scale)) for one in adapters):
        digest.update(identity.encode() + scale)
    for layer in tuning.gains:
        digest.update(struct.pack(f"<{len(layer)}f", *layer))
    if tuning.multipliers:
        digest.update(b"multipliers")
    for layer in tuning.multipliers:
        digest.update(struct.pack(f"<{len(layer)}f", *layer))
    return digest.hexdigest()


def _of_files(files: Sequence[Header]) -> str:
    digest = hashlib.sha256()
    for part in files:
        with part.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size} {part.data_offset}\n".encode())
            digest.update(file.read(part.data_offset))
            ends = [(part.data_offset, _EDGE_SAMPLE), (max(part.data_offset, size - _EDGE_SAMPLE), _EDGE_SAMPLE)]
            middles = [
                (part.data_offset + tensor.offset + max(0, tensor.size_bytes - _TENSOR_SAMPLE) // 2, _TENSOR_SAMPLE)
                for tensor in part.tensors
            ]
            for offset, count in ends + sorted(middles):
                file.seek(offset)
                digest.update(file.read(count))
    return digest.hexdigest()
