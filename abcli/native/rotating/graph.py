"""What one decode of llama.cpp shows of a model's graph: where it rotates, and where it keeps keys and values."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

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
    """A graph's ROPE operations in the order of computation, and the cache of each layer.

    `closes[i]` says that what is to be done to the results of operation i and of those before it which are
    not yet closed must be done right after i.
    """

    ropes: tuple[RopeNode, ...]
    closes: tuple[bool, ...]
    keys: Mapping[int, CacheTensor]
    values: Mapping[int, CacheTensor]


class Observer:
    """Takes down the nodes of a graph while llama.cpp computes it; it interrupts nothing."""

    def __init__(self) -> None:
        self._nodes: list[tuple[int, TensorStruct, bytes]] = []
        self._factors: dict[int, tuple[float, ...]] = {}

    def ask(self, tensor: int) -> bool:
        """Take down one node."""
        description = api.op_description(tensor)
        node = TensorStruct.from_buffer_copy(TensorStruct.from_address(tensor))
        self._nodes.append((tensor, node, description))
        if description == b"ROPE" and node.src[2] and node.src[2] not in self._factors:
            self._factors[node.src[2]] = _floats(node.src[2])
        return False

    def done(self, _tensor: int) -> bool:
        """Never called, since `ask` wants nothing."""
        return True

    def result(self) -> Observation:
        """What was seen. Raises UnsupportedModelError for a rotation that is of another kind than plain RoPE."""
        places = [index for index, (_, _, description) in enumerate(self._nodes) if description == b"ROPE"]
        ropes = tuple(self._rope(self._nodes[place][1]) for place in places)
        pointers = {self._nodes[place][0]: number for number, place in enumerate(places)}
        keys: dict[int, CacheTensor] = {}
        values: dict[int, CacheTensor] = {}
        for _, node, description in self._nodes:
            root = node.view_src
            if description != b"SET_ROWS" or not root:
                continue
            name = TensorStruct.from_address(root).name
            if name.startswith(_KEYS):
                keys[int(name[len(_KEYS) :])] = _cache(root, False, self._source_rope(node.src[0], pointers))
            elif name.startswith(_VALUES):
                values[int(name[len(_VALUES) :])] = _cache(root, node.ne[0] == 1, None)
        return Observation(ropes, self._closes(places), keys, values)

    def _rope(self, node: TensorStruct) -> RopeNode:
        dimensions, mode, original, base, scale, extrapolation, _, fast, slow, first = rope_numbers(node)
        if mode not in (api.MODE_NORMAL, api.MODE_NEOX):
            raise UnsupportedModelError(
                f"the model's positions have several parts (ggml's RoPE mode {mode}), which one batch cannot vary",
                "use `engine=contexts` with this model",
            )
        factors = self._factors.get(node.src[2]) if node.src[2] else None
        parameters = RopeParameters(
            dimensions=dimensions,
            neox=mode == api.MODE_NEOX,
            frequency_scale=scale,
            factors=None if factors is None else factors[: dimensions // 2],
            extrapolation_factor=extrapolation,
            beta_fast=fast,
            beta_slow=slow,
            original_context=original,
        )
        return RopeNode(base, parameters, first, node.ne[0], node.ne[1], node.type)

    def _source_rope(self, tensor: int, ropes: Mapping[int, int]) -> int | None:
        """The ROPE operation whose result `tensor` is, seen through views; None if something lies between."""
        nodes = {pointer: (node, description) for pointer, node, description in self._nodes}
        for _ in range(_MAX_STEPS):
            if tensor in ropes:
                return ropes[tensor]
            node, description = nodes.get(tensor, (None, b""))
            if node is None or description not in _VIEWS:
                return None
            tensor = node.src[0]
        return None

    def _closes(self, places: Sequence[int]) -> tuple[bool, ...]:
        """An operation may wait for the next one if nothing reads its result before, on the same device."""
        closes = []
        waiting: list[int] = []
        for place, following in zip_longest(places, places[1:]):
            waiting.append(place)
            close = following is None or not all(self._can_wait(earlier, following) for earlier in waiting)
            closes.append(close)
            if close:
                waiting.clear()
        return tuple(closes)

    def _can_wait(self, place: int, following: int) -> bool:
        pointer, node, _ = self._nodes[place]
        memory = node.view_src or pointer
        if node.buffer != self._nodes[following][1].buffer:
            return False
        for _, other, description in self._nodes[place + 1 : following + 1]:
            sources = [source for source in other.src if source]
            roots = {TensorStruct.from_address(source).view_src or source for source in sources}
            if memory in roots and description not in _VIEWS:
                return False
        return True


def _cache(root: int, transposed: bool, rope: int | None) -> CacheTensor:
    tensor = TensorStruct.from_address(root)
    width, cells, streams = tensor.ne[0], tensor.ne[1], tensor.ne[2]
    return CacheTensor(root, tensor.type, width, cells, streams, transposed, rope)


def _floats(tensor: int) -> tuple[float, ...]:
    count = TensorStruct.from_address(tensor).ne[0]
    numbers = np.empty(count, np.float32)
    api.tensor_get(tensor, numbers.ctypes.data_as(ctypes.c_void_p), 0, numbers.nbytes)
    return tuple(float(number) for number in numbers)
