"""Reads the bytes of `llama_state_seq_get_data`: where in them the keys and values of each layer lie.

Layout (llama_kv_cache::state_write in llama-kv-cache.cpp; a sliding-window model writes two caches, one after the
other): u32 magic and u32 sequence id; then per cache u32 streams; per stream u32 cells; per cell i32 position,
u32 count and that many i32 sequence ids; u32 values transposed?; u32 layers; per layer i32 type, u64 row bytes and
the keys; per layer the values, as rows or (transposed) as i32 type, u32 element bytes, u32 width and columns.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from abcli.errors import AbcliError
from abcli.native.ggml_api import NUMBER_BYTES

# llama_context::state_seq_get_data (llama-context.cpp): changes when the layout does.
MAGIC = 0xAF143CD8
_MAX_LAYERS = 4096
_MAX_ROW_BYTES = 1 << 24
_CELL = np.dtype([("position", "<i4"), ("count", "<u4"), ("sequence", "<i4")])


class StateError(AbcliError):
    """State bytes of a form this reader does not know, e.g. of M-RoPE or recurrent models."""


@dataclass(frozen=True)
class LayerKeys:
    """The keys of one layer: `cells` rows of `row_bytes` bytes of ggml type `type_id`, from byte `offset` on."""

    offset: int
    row_bytes: int
    type_id: int


@dataclass(frozen=True)
class LayerValues:
    """The values of one layer, from byte `offset` on: rows as those of keys, or, `transposed`, a column per number.

    `row_bytes` are those of a cell in both cases.
    """

    offset: int
    row_bytes: int
    type_id: int
    transposed: bool


@dataclass(frozen=True)
class CacheState:
    """One cache's cells, and the keys and values of its layers; `positions` is int32 [cells]."""

    positions: NDArray[np.int32]
    layers: tuple[LayerKeys, ...]
    values: tuple[LayerValues, ...] = ()


def parse_state(data: NDArray[np.uint8]) -> tuple[CacheState, ...]:
    """The caches in state bytes (uint8 [n]) of one sequence, in order.

    Raises StateError for anything that is not exactly of the known layout: wrong magic, counts or sizes that do not
    fit, several streams or owners of a cell, bytes left over.
    """
    reader = _Reader(data)
    magic = reader.unsigned(4)
    if magic != MAGIC:
        raise StateError(f"state bytes begin with {magic:#x}, not {MAGIC:#x}")
    reader.unsigned(4)
    caches = []
    while reader.left:
        caches.append(_cache(reader))
    if not caches:
        raise StateError("state bytes hold no cache")
    return tuple(caches)


def without_flash_attention(data: NDArray[np.uint8], windows: Sequence[bool]) -> NDArray[np.uint8]:
    """State bytes (uint8 [n]) as a context without flash attention has them: values transposed.

    `windows` says which layers have a sliding window: where some have one and all lie in a single cache, as in a fused
    context, they go to a second one. Raises StateError for values that are no numbers of two or four bytes.
    """
    caches = parse_state(data)
    (first, *others) = caches
    if not others and len(set(windows)) > 1 and len(windows) == len(first.layers):
        caches = tuple(
            _part(first, [at for at, window in enumerate(windows) if window is wanted]) for wanted in (False, True)
        )
    parts = [_bytes("<II", MAGIC, 0)]
    for cache in caches:
        count = len(cache.positions)
        cells = np.zeros(count, _CELL)
        cells["position"], cells["count"] = cache.positions, 1
        parts += [_bytes("<I", 1), _bytes("<I", count), cells.view(np.uint8), _bytes("<II", 1, len(cache.layers))]
        for keys in cache.layers:
            parts += [_bytes("<iQ", keys.type_id, keys.row_bytes)]
            parts += [data[keys.offset : keys.offset + count * keys.row_bytes]]
        for values in cache.values:
            element = NUMBER_BYTES.get(values.type_id)
            if element is None:
                raise StateError("quantised values cannot be transposed")
            numbers = data[values.offset : values.offset + count * values.row_bytes].view(f"u{element}")
            columns = numbers if values.transposed else numbers.reshape(count, -1).T.ravel()
            parts += [_bytes("<iII", values.type_id, element, values.row_bytes // element), columns.view(np.uint8)]
    return np.concatenate(parts)


def _part(cache: CacheState, layers: Sequence[int]) -> CacheState:
    return CacheState(
        cache.positions, tuple(cache.layers[layer] for layer in layers), tuple(cache.values[layer] for layer in layers)
    )


def _bytes(form: str, *numbers: int) -> NDArray[np.uint8]:
    return np.frombuffer(struct.pack(form, *numbers), np.uint8)


class _Reader:
    """Takes numbers from bytes; refuses to go beyond their end."""

    def __init__(self, data: NDArray[np.uint8]) -> None:
        self.data = data
        self.at = 0

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def skip(self, count: int) -> int:
        """Pass over `count` bytes; the offset at which they start."""
        if count > self.left:
            raise StateError(f"state bytes end at {len(self.data)}, but {count} more are announced at {self.at}")
        start = self.at
        self.at += count
        return start

    def unsigned(self, size: int) -> int:
        start = self.skip(size)
        return int.from_bytes(self.data[start : self.at].tobytes(), "little")


def _cache(reader: _Reader) -> CacheState:
    streams = reader.unsigned(4)
    if streams != 1:
        raise StateError(f"the state has {streams} streams, not 1")
    count = reader.unsigned(4)
    if count == 0:
        return CacheState(np.empty(0, np.int32), ())
    start = reader.skip(count * _CELL.itemsize)
    cells = reader.data[start : reader.at].view(_CELL)
    if np.any(cells["count"] != 1):
        raise StateError("a cell of the state has not exactly one owner, or carries an extension (M-RoPE)")
    transposed, layers = reader.unsigned(4), reader.unsigned(4)
    if transposed > 1 or not 0 < layers <= _MAX_LAYERS:
        raise StateError(f"the state announces {layers} layers and value order {transposed}")
    keys = tuple(_rows(reader, count) for _ in range(layers))
    values = tuple(_values(reader, count, transposed=bool(transposed)) for _ in range(layers))
    return CacheState(cells["position"].astype(np.int32), keys, values)


def _values(reader: _Reader, count: int, *, transposed: bool) -> LayerValues:
    if not transposed:
        rows = _rows(reader, count)
        return LayerValues(rows.offset, rows.row_bytes, rows.type_id, transposed=False)
    type_id = reader.unsigned(4)
    element, width = reader.unsigned(4), reader.unsigned(4)
    if not 0 < element * width <= _MAX_ROW_BYTES:
        raise StateError(f"the state announces values of {width} x {element} bytes")
    return LayerValues(reader.skip(element * width * count), element * width, type_id, transposed=True)


def _rows(reader: _Reader, count: int) -> LayerKeys:
    (type_id,) = struct.unpack("<i", reader.unsigned(4).to_bytes(4, "little"))
    row_bytes = reader.unsigned(8)
    if not 0 < row_bytes <= _MAX_ROW_BYTES:
        raise StateError(f"the state announces rows of {row_bytes} bytes")
    return LayerKeys(reader.skip(count * row_bytes), row_bytes, type_id)
