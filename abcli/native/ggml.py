"""ggml's own rotation of keys, applied in place to bytes in host memory."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.errors import NativeError
from abcli.native.owner import Owner

_BACKEND_DEVICE_TYPE_CPU = 0
# ggml_tensor is about 400 bytes with its bookkeeping; a graph of a few nodes needs little more.
_BYTES_PER_TENSOR = 1024
_GRAPH_BYTES = 1 << 18
# ggml divides the angle by this: where two bases turn a pair equally fast it must not turn at all.
_NO_ROTATION = 1e30
_MODE_NORMAL = 0
_MODE_NEOX = 2
# ggml.h; the bindings do not name it.
GGML_TYPE_BF16 = 30
_NUMBER_BYTES = {llama.GGML_TYPE_F32: 4, llama.GGML_TYPE_F16: 2, GGML_TYPE_BF16: 2}
TURNABLE_TYPES = frozenset(_NUMBER_BYTES)


class _InitParameters(ctypes.Structure):
    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


def _function(name: str, restype: Any, *argtypes: Any) -> Any:
    # The handle of libllama also finds what libllama itself is linked to; other copies have other globals.
    function = getattr(llama._lib, name)
    function.restype = restype
    function.argtypes = list(argtypes)
    return function


_pointer, _size, _int, _int64, _float = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int64,
    ctypes.c_float,
)

# struct ggml_context * ggml_init(struct ggml_init_params params);
_init = _function("ggml_init", _pointer, _InitParameters)
# void ggml_free(struct ggml_context * ctx);
_free = _function("ggml_free", None, _pointer)
# struct ggml_tensor * ggml_new_tensor_1d(struct ggml_context * ctx, enum ggml_type type, int64_t ne0);
_new_1d = _function("ggml_new_tensor_1d", _pointer, _pointer, _int, _int64)
# struct ggml_tensor * ggml_view_4d(ctx, a, ne0, ne1, ne2, ne3, nb1, nb2, nb3, offset);
_view_4d = _function("ggml_view_4d", _pointer, _pointer, _pointer, *[_int64] * 4, *[_size] * 3, _size)
# struct ggml_tensor * ggml_rope_ext_inplace(ctx, a, b, c, n_dims, mode, n_ctx_orig, freq_base, freq_scale,
#     ext_factor, attn_factor, beta_fast, beta_slow);
_rope_inplace = _function("ggml_rope_ext_inplace", _pointer, *[_pointer] * 4, *[_int] * 3, *[_float] * 6)
# struct ggml_cgraph * ggml_new_graph(struct ggml_context * ctx);
_new_graph = _function("ggml_new_graph", _pointer, _pointer)
# void ggml_build_forward_expand(struct ggml_cgraph * cgraph, struct ggml_tensor * tensor);
_expand = _function("ggml_build_forward_expand", None, _pointer, _pointer)
# ggml_backend_buffer_t ggml_backend_cpu_buffer_from_ptr(void * ptr, size_t size);
_buffer_from = _function("ggml_backend_cpu_buffer_from_ptr", _pointer, _pointer, _size)
# void ggml_backend_buffer_free(ggml_backend_buffer_t buffer);
_buffer_free = _function("ggml_backend_buffer_free", None, _pointer)
# enum ggml_status ggml_backend_tensor_alloc(ggml_backend_buffer_t buffer, struct ggml_tensor * tensor, void * addr);
_place = _function("ggml_backend_tensor_alloc", _int, _pointer, _pointer, _pointer)
# enum ggml_status ggml_backend_view_init(struct ggml_tensor * tensor);
_view_init = _function("ggml_backend_view_init", _int, _pointer)
# ggml_backend_t ggml_backend_init_by_type(enum ggml_backend_dev_type type, const char * params);
_backend_by_type = _function("ggml_backend_init_by_type", _pointer, _int, ctypes.c_char_p)
# void ggml_backend_free(ggml_backend_t backend);
_backend_free = _function("ggml_backend_free", None, _pointer)
# enum ggml_status ggml_backend_graph_compute(ggml_backend_t backend, struct ggml_cgraph * cgraph);
_compute = _function("ggml_backend_graph_compute", _int, _pointer, _pointer)
# void ggml_backend_cpu_set_n_threads(ggml_backend_t backend_cpu, int n_threads);
_set_threads = _function("ggml_backend_cpu_set_n_threads", None, _pointer, _int)


@dataclass(frozen=True)
class KeyBlock:
    """Keys of `layers` layers with the same shape, `stride` bytes from layer to layer.

    `offset` (bytes) is where the first key of the first layer starts; each layer holds `cells` rows of `heads` x
    `width` numbers of ggml type `type_id` (0 = f32, 1 = f16).
    """

    offset: int
    stride: int
    layers: int
    cells: int
    heads: int
    width: int
    type_id: int

    @property
    def row_bytes(self) -> int:
        """The size of one key of one layer in bytes."""
        return self.heads * self.width * _NUMBER_BYTES[self.type_id]


def number_bytes(type_id: int) -> int:
    """The size of one number of a turnable ggml type."""
    return _NUMBER_BYTES[type_id]


def as_float32(data: NDArray[np.uint8], type_id: int) -> NDArray[np.float32]:
    """The numbers in contiguous bytes of a turnable ggml type, float32 [n]."""
    if type_id == GGML_TYPE_BF16:
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    kind = np.float32 if type_id == llama.GGML_TYPE_F32 else np.float16
    return data.view(kind).astype(np.float32)


def aligned_bytes(size: int) -> NDArray[np.uint8]:
    """An uninitialised array of `size` bytes at an address ggml accepts for a buffer (64-byte aligned)."""
    padded = np.empty(size + 64, np.uint8)
    start = -padded.ctypes.data % 64
    return padded[start : start + size]


class KeyRotator(Owner):
    """Rotates keys in place with a CPU backend of its own. One thread at a time may use it."""

    def __init__(self, threads: int = 1) -> None:
        """Raises NativeError if ggml has no CPU backend."""
        backend = _backend_by_type(_BACKEND_DEVICE_TYPE_CPU, None)
        if not backend:
            raise NativeError("ggml has no CPU backend", "rebuild llama-cpp-python (make setup)")
        self._stack = ExitStack()
        self._stack.callback(_backend_free, backend)
        _set_threads(backend, threads)
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
        factors[:] = np.where(np.isfinite(inverse), inverse, np.float32(_NO_ROTATION))
        places = aligned_bytes(4 * len(positions)).view(np.int32)
        places[:] = positions
        with ExitStack() as stack:
            context = _init(_InitParameters(_BYTES_PER_TENSOR * (2 + 3 * len(blocks)) + _GRAPH_BYTES, None, True))
            if not context:
                raise NativeError("ggml has no memory for a graph", "close other programs")
            stack.callback(_free, context)
            position_tensor = _place_1d(stack, context, llama.GGML_TYPE_I32, places.ctypes.data, len(places))
            factor_tensor = _place_1d(stack, context, llama.GGML_TYPE_F32, factors.ctypes.data, len(factors))
            graph = _new_graph(context)
            mode = _MODE_NEOX if neox else _MODE_NORMAL
            buffer = _buffer_from(data.ctypes.data, len(data))
            stack.callback(_buffer_free, buffer)
            for block in blocks:
                keys = _place_keys(context, buffer, data.ctypes.data, block)
                rotated = _rope_inplace(
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
                _check(_view_init(rotated))
                _expand(graph, rotated)
            _check(_compute(self._backend, graph))


def _place_1d(stack: ExitStack, context: int, type_id: int, address: int, length: int) -> int:
    """A vector over memory of ours."""
    tensor = _new_1d(context, type_id, length)
    buffer = _buffer_from(address, 4 * length)
    stack.callback(_buffer_free, buffer)
    _check(_place(buffer, tensor, address))
    return int(tensor)


def _place_keys(context: int, buffer: int, address: int, block: KeyBlock) -> int:
    """A view [width, heads, cells, layers] of the keys; layers lie `stride` bytes apart."""
    number = block.row_bytes // (block.heads * block.width)
    extent = (block.layers - 1) * block.stride + block.cells * block.row_bytes
    vector = _new_1d(context, block.type_id, extent // number)
    _check(_place(buffer, vector, address + block.offset))
    view = _view_4d(
        context,
        vector,
        *(block.width, block.heads, block.cells, block.layers),
        *(block.width * number, block.row_bytes, block.stride),
        0,
    )
    _check(_view_init(view))
    return int(view)


def _check(status: int) -> None:
    if status != 0:
        raise NativeError(f"ggml failed with status {status}", "report it with the model and the command line")
