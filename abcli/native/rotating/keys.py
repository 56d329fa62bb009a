"""ggml's own rotation of keys, applied in place to bytes in host memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.errors import NativeError
from abcli.native import ggml_api as api
from abcli.native.ggml_api import NUMBER_BYTES
from abcli.native.owner import Owner

_GRAPH_BYTES = 1 << 18
GGML_TYPE_BF16 = api.GGML_TYPE_BF16
TURNABLE_TYPES = frozenset(NUMBER_BYTES)
# Where probes look at a key: far enough from the beginning that a wrong angle shows.
PROBE_POSITION = 997
# Largest error of a key relative to its largest number: a few roundings of f16, or of bf16.
_TOLERANCE = 4e-3
_TOLERANCE_BFLOAT16 = 2e-2


@dataclass(frozen=True)
class KeyBlock:
    """Keys of `layers` layers with the same shape, `stride` bytes from layer to layer.

    `offset` (bytes) is where the first key of the first layer starts; each layer holds `cells` rows of `heads` x
    `width` numbers of ggml type `type_id` (0 = f32, 1 = f16). `head` is the only one that is meant, if one is.
    """

    offset: int
    stride: int
    layers: int
    cells: int
    heads: int
    width: int
    type_id: int
    head: int | None = None

    @property
    def row_bytes(self) -> int:
        """The size of one key of one layer in bytes."""
        return self.heads * self.width * NUMBER_BYTES[self.type_id]


def number_bytes(type_id: int) -> int:
    """The size of one number of a turnable ggml type."""
    return NUMBER_BYTES[type_id]


def as_float32(data: NDArray[np.uint8], type_id: int) -> NDArray[np.float32]:
    """The numbers in contiguous bytes of a turnable ggml type, float32 [n]."""
    if type_id == GGML_TYPE_BF16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    kind = np.float32 if type_id == llama.GGML_TYPE_F32 else np.float16
    return data.view(kind).astype(np.float32)


def agree(found: NDArray[np.float32], wanted: NDArray[np.float32], type_id: int = llama.GGML_TYPE_F16) -> bool:
    """Whether two keys (float32 [n]) of one layer are equal but for rounding of a cache of `type_id`."""
    tolerance = _TOLERANCE_BFLOAT16 if type_id == GGML_TYPE_BF16 else _TOLERANCE
    # Not a number agrees with nothing.
    return float(np.abs(found - wanted).max()) <= tolerance * float(np.abs(wanted).max())


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """An uninitialised array of `size` bytes at an address ggml accepts for a buffer (64-byte aligned)."""
    padded = np.empty(size + 64, np.uint8)
    start = -padded.ctypes.data % 64
    return padded[start : start + size]


class KeyRotator(Owner):
    """Rotates keys in place with a CPU backend of its own. One thread at a time may use it."""

    def __init__(self, threads: int = 1) -> None:
        """Raises NativeError if ggml has no CPU backend."""
        backend = api.backend_by_type(api.BACKEND_DEVICE_TYPE_CPU, None)
        if not backend:
            raise NativeError("ggml has no CPU backend", "rebuild llama-cpp-python (make setup)")
        self._stack = ExitStack()
        self._stack.callback(api.backend_free, backend)
        api.set_threads(backend, threads)
        self._backend = backend

    def rotate(
        self,
        data: NDArray[np.uint8],
        blocks: Sequence[KeyBlock],
        positions: NDArray[np.int32],
        deltas: NDArray[np.float64],
        *,
        neox: bool,
    ) -> None:
        """Turn pair i of every key in `data` (from `aligned_bytes`) by `positions[cell] * deltas[i]` radians.

        `positions` int32 [cells]; `deltas` float64 [pairs]; dimensions beyond 2 * pairs stay as they are. Raises
        NativeError if ggml fails, ValueError for blocks that leave `data` or don't match `positions`.
        """
        if not blocks or not np.any(deltas):
            return
        for block in blocks:
            end = block.offset + (block.layers - 1) * block.stride + block.cells * block.row_bytes
            if end > len(data) or block.cells != len(positions) or 2 * len(deltas) > block.width:
                raise ValueError(f"{block} does not fit {len(data)} bytes, {len(positions)} positions")
        for block in blocks:
            if block.type_id == GGML_TYPE_BF16:
                self._rotate_bfloat16(data, block, positions, deltas, neox=neox)
        blocks = [block for block in blocks if block.type_id != GGML_TYPE_BF16]
        if blocks:
            self._rotate(data, blocks, positions, deltas, neox=neox)

    def _rotate_bfloat16(
        self,
        data: NDArray[np.uint8],
        block: KeyBlock,
        positions: NDArray[np.int32],
        deltas: NDArray[np.float64],
        *,
        neox: bool,
    ) -> None:
        """ggml's CPU rope has no bf16: turn the block as f32, then round to nearest even."""
        size = block.cells * block.row_bytes
        wide_size = 2 * size
        wide = aligned_bytes(block.layers * wide_size)
        for layer in range(block.layers):
            start = block.offset + layer * block.stride
            wide[layer * wide_size :][:wide_size] = as_float32(data[start : start + size], GGML_TYPE_BF16).view(
                np.uint8
            )
        as_f32 = replace(block, offset=0, stride=wide_size, type_id=llama.GGML_TYPE_F32)
        self._rotate(wide, [as_f32], positions, deltas, neox=neox)
        bits = wide.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).view(np.uint8)
        for layer in range(block.layers):
            start = block.offset + layer * block.stride
            data[start : start + size] = rounded[layer * size :][:size]

    def _rotate(
        self,
        data: NDArray[np.uint8],
        blocks: Sequence[KeyBlock],
        positions: NDArray[np.int32],
        deltas: NDArray[np.float64],
        *,
        neox: bool,
    ) -> None:
        factors = aligned_bytes(4 * len(deltas)).view(np.float32)
        with np.errstate(divide="ignore", over="ignore"):
            inverse = (1.0 / deltas).astype(np.float32)
        factors[:] = np.where(np.isfinite(inverse), inverse, np.float32(api.NO_ROTATION))
        places = aligned_bytes(4 * len(positions)).view(np.int32)
        places[:] = positions
        with ExitStack() as stack:
            context = api.new_context(stack, api.BYTES_PER_TENSOR * (2 + 3 * len(blocks)) + _GRAPH_BYTES)
            position_tensor = _place_1d(stack, context, llama.GGML_TYPE_I32, places.ctypes.data, len(places))
            factor_tensor = _place_1d(stack, context, llama.GGML_TYPE_F32, factors.ctypes.data, len(factors))
            graph = api.new_graph(context)
            mode = api.MODE_NEOX if neox else api.MODE_NORMAL
            buffer = api.buffer_from(data.ctypes.data, len(data))
            stack.callback(api.buffer_free, buffer)
            for block in blocks:
                keys = _place_keys(context, buffer, data.ctypes.data, block)
                rotated = api.rope_inplace(
                    context,
                    keys,
                    position_tensor,
                    factor_tensor,
                    2 * len(deltas),
                    mode,
                    0,
                    1.0,
                    1.0,
                    0.0,
                    1.0,
                    0.0,
                    0.0,
                )
                api.check(api.view_init(rotated))
                api.expand(graph, rotated)
            api.check(api.compute(self._backend, graph))


def _place_1d(stack: ExitStack, context: int, type_id: int, address: int, length: int) -> int:
    """A vector over memory of ours."""
    tensor = api.new_1d(context, type_id, length)
    buffer = api.buffer_from(address, 4 * length)
    stack.callback(api.buffer_free, buffer)
    api.check(api.place(buffer, tensor, address))
    return int(tensor)


def _place_keys(context: int, buffer: int, address: int, block: KeyBlock) -> int:
    """A view [width, heads, cells, layers] of the keys; layers lie `stride` bytes apart."""
    number = block.row_bytes // (block.heads * block.width)
    extent = (block.layers - 1) * block.stride + block.cells * block.row_bytes
    vector = api.new_1d(context, block.type_id, extent // number)
    api.check(api.place(buffer, vector, address + block.offset))
    view = api.view_4d(
        context,
        vector,
        *(block.width, block.heads if block.head is None else 1, block.cells, block.layers),
        *(block.width * number, block.row_bytes, block.stride),
        (block.head or 0) * block.width * number,
    )
    api.check(api.view_init(view))
    return int(view)
