"""What one decode of llama.cpp shows of a model's graph: where it rotates, and where it keeps keys and values."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from abcli.errors import UnsupportedModelError
from abcli.native import ggml_api as api
from abcli.native.ggml_api import TensorStruct, rope_numbers
from abcli.rope.frequencies import RopeParameters

# Operations that only look at memory in another way.
_VIEWS = frozenset({b"VIEW", b"RESHAPE", b"PERMUTE", b"TRANSPOSE", b"NONE"})
_KEYS, _VALUES = b"cache_k_l", b"cache_v_l"
# More steps than this lie nowhere between a rotated key and the cache.
_MAX_STEPS = 8


@dataclass(frozen=True)
class RopeNode:
    """One ROPE operation of the graph: `base` and the parameters with which it turns `heads` x `width` numbers."""

    base: float
    parameters: RopeParameters
    first_dimension: int
    width: int
    heads: int
    type_id: int


@dataclass(frozen=True)
class CacheTensor:
    """Keys or values of one layer: numbers of ggml type `type_id`, [streams, cells, width] in memory.

    `transposed` values lie as [streams, width, cells]. `pointer` is llama.cpp's own tensor, which lives as long as the
    context; `rope` is the place of the ROPE operation whose result goes into the keys unchanged, if there is one.
    """

    pointer: int
    type_id: int
    width: int
    cells: int
    streams: int
    transposed: bool = False
    rope: int | None = None

    @property
    def row_bytes(self) -> int:
        """The size of the numbers of one cell."""
        return int(api.row_size(self.type_id, self.width))


@dataclass(frozen=True)
class Observation:
    """A graph's ROPE operations in the order of computation, and the cache of each layer."""

    ropes: tuple[RopeNode, ...]
    keys: Mapping[int, CacheTensor]
    values: Mapping[int, CacheTensor]

    def rotated_as(self, other: Observation) -> Observation:
        """This, with the rotations of another graph of the model, where more than views lies behind them here."""
        ropes = {layer: keys.rope for layer, keys in other.keys.items()}
        own = {layer: replace(keys, rope=ropes.get(layer)) for layer, keys in self.keys.items()}
        return Observation(other.ropes, own, self.values)


class Observer:
    """Takes down the nodes of a graph before llama.cpp computes it."""

    def __init__(self) -> None:
        self._nodes: list[tuple[int, TensorStruct, bytes]] = []

    def visit(self, tensors: Sequence[int], _graph: int) -> None:
        """Take down nodes."""
        for tensor in tensors:
            node = TensorStruct.from_buffer_copy(TensorStruct.from_address(tensor))
            self._nodes.append((tensor, node, api.operation(node.op, tensor)))

    def result(self) -> Observation:
        """What was seen. Raises UnsupportedModelError for a rotation that is of another kind than plain RoPE."""
        places = [index for index, (_, _, operation) in enumerate(self._nodes) if operation == b"ROPE"]
        ropes = tuple(rope_node(self._nodes[place][1]) for place in places)
        pointers = {self._nodes[place][0]: number for number, place in enumerate(places)}
        keys: dict[int, CacheTensor] = {}
        values: dict[int, CacheTensor] = {}
        for _, node, operation in self._nodes:
            root = node.view_src
            if operation != b"SET_ROWS" or not root:
                continue
            name = TensorStruct.from_address(root).name
            if name.startswith(_KEYS):
                keys[int(name[len(_KEYS) :])] = _cache(root, False, self._source_rope(node.src[0], pointers))
            elif name.startswith(_VALUES):
                values[int(name[len(_VALUES) :])] = _cache(root, node.ne[0] == 1, None)
        return Observation(ropes, keys, values)

    def _source_rope(self, tensor: int, ropes: Mapping[int, int]) -> int | None:
        """The ROPE operation whose result `tensor` is, seen through views; None if something lies between."""
        nodes = {pointer: (node, operation) for pointer, node, operation in self._nodes}
        for _ in range(_MAX_STEPS):
            if tensor in ropes:
                return ropes[tensor]
            node, operation = nodes.get(tensor, (None, b""))
            if node is None or operation not in _VIEWS:
                return None
            tensor = node.src[0]
        return None


def rope_node(node: TensorStruct) -> RopeNode:
    """What a ROPE operation does. Raises UnsupportedModelError for a rotation of another kind than plain RoPE."""
    dimensions, mode, original, base, scale, extrapolation, _, fast, slow, first = rope_numbers(node)
    parameters = _parameters(node.src[2], dimensions, mode, original, scale, extrapolation, fast, slow)
    return RopeNode(base, parameters, first, node.ne[0], node.ne[1], node.type)


def asked_parameters(arguments: tuple[Any, ...]) -> RopeParameters:
    """What the arguments of `ggml_rope_ext` say. Raises UnsupportedModelError as `rope_node`."""
    factors, dimensions, mode, original, _, scale, extrapolation, _, fast, slow = arguments[3:]
    return _parameters(factors, dimensions, mode, original, scale, extrapolation, fast, slow)


def _parameters(
    factors: int | None,
    dimensions: int,
    mode: int,
    original: int,
    scale: float,
    extrapolation: float,
    fast: float,
    slow: float,
) -> RopeParameters:
    if mode not in (api.MODE_NORMAL, api.MODE_NEOX):
        raise UnsupportedModelError(
            f"the model's positions have several parts (ggml's RoPE mode {mode}), which one batch cannot vary",
            "use `engine=contexts` with this model",
        )
    return RopeParameters(
        dimensions=dimensions,
        neox=mode == api.MODE_NEOX,
        frequency_scale=scale,
        factors=_floats(factors)[: dimensions // 2] if factors else None,
        extrapolation_factor=extrapolation,
        beta_fast=fast,
        beta_slow=slow,
        original_context=original,
    )


def _cache(root: int, transposed: bool, rope: int | None) -> CacheTensor:
    tensor = TensorStruct.from_address(root)
    width, cells, streams = tensor.ne[0], tensor.ne[1], tensor.ne[2]
    return CacheTensor(root, tensor.type, width, cells, streams, transposed, rope)


def _floats(tensor: int) -> tuple[float, ...]:
    node = TensorStruct.from_address(tensor)
    if not node.buffer:
        raise UnsupportedModelError(
            "the model computes its RoPE factors anew for each text, which one batch cannot vary",
            "use `engine=contexts` with this model",
        )
    numbers = np.empty(node.ne[0], np.float32)
    api.tensor_get(tensor, numbers.ctypes.data_as(ctypes.c_void_p), 0, numbers.nbytes)
    return tuple(float(number) for number in numbers)
