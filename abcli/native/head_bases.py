"""A RoPE base for every head of keys: llama.cpp's own rotation, with angles of each head.

ggml rotates all heads of a layer by the same angles, but lets a tensor divide those of each pair. While contexts of a
model with multipliers are made and computed, `ggml_rope_ext` is replaced: the heads of keys are laid side by side as
one wide head, whose pairs have all their angles in that tensor; so are the queries, once for each that meets the same
keys. llama.cpp computes, keeps and reuses that graph like any other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from math import log
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.errors import UnsupportedModelError
from abcli.native import ggml_api as api
from abcli.native.ggml_api import TensorStruct
from abcli.native.layer_change import LayerChange
from abcli.native.rotating.graph import asked_parameters
from abcli.native.rotating.hook import rope_hook, rotating
from abcli.native.rotating.tables import layer_of, weights_of
from abcli.rope.frequencies import RopeParameters, angular_frequencies

# What follows the last layer takes fewer nodes than this.
_SPARE_NODES = 64


@dataclass(frozen=True)
class _Rotation:
    """How `ggml_rope_ext` was asked to rotate: `magnitude` is the factor on what is rotated."""

    parameters: RopeParameters
    base: float
    magnitude: float


class HeadBases(LayerChange):
    """The multipliers of one model's bases, on every device where its heads are rotated."""

    def __init__(self, multipliers: Sequence[Sequence[float]]) -> None:
        """`multipliers` has a factor for each head of keys of each layer.

        Raises UnsupportedModelError as `LayerChange`.
        """
        self._multipliers = [np.array(layer, np.float64) for layer in multipliers]
        changed = [layer for layer, numbers in enumerate(self._multipliers) if np.any(numbers != 1)]
        super().__init__("bases of heads", "rotation of heads", changed, rope_hook)
        self._changed = frozenset(changed)
        # By thread: the last layer of the graph that it builds, and the room for nodes before that one.
        self._rooms: dict[int, tuple[int, int]] = {}

    def replacing(self) -> AbstractContextManager[None]:
        """See `LayerChange.replacing`."""
        return rotating(self)

    def rotate(self, original: Callable[..., int], *arguments: Any) -> int:
        """In place of `ggml_rope_ext`: by the bases of the heads."""
        try:
            return self._rotated(original, arguments)
        except Exception as error:
            self.keep(error)
            return original(*arguments)

    def _rotated(self, original: Callable[..., int], arguments: tuple[Any, ...]) -> int:
        context, numbers, positions = arguments[:3]
        weights = weights_of(numbers)
        layer = layer_of(weights)
        if layer not in self._changed:
            return original(*arguments)
        self._check_room(context, layer)
        rotation, heads = _rotation(arguments), len(self._multipliers[layer])
        node = TensorStruct.from_address(numbers)
        if (node.type, node.ne[3]) != (llama.GGML_TYPE_F32, 1) or node.ne[1] % heads:
            raise UnsupportedModelError(
                f"llama.cpp rotates {node.ne[1]} heads in layer {layer}, which cannot have {heads} bases",
                "use `profile=none`",
            )
        return rotated_by_head(context, numbers, positions, self._factors(layer, rotation, weights), heads, rotation)

    def _factors(self, layer: int, rotation: _Rotation, weights: TensorStruct) -> int:
        """The tensor f32 [heads * pairs] that divides the angles, where `weights` lie."""
        with self._lock:
            self._met.add(layer)
            device = self._devices.of(weights)
            key = (layer, device.backend, rotation)
            if key not in self._tensors:
                bases = rotation.base * self._multipliers[layer]
                values = inverse_frequencies(rotation.parameters, bases).ravel()
                tensor = device.tensor(llama.GGML_TYPE_F32, (len(values),), device.memory(values.nbytes))
                api.tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
                self._tensors[key] = tensor
            return self._tensors[key]

    def _check_room(self, context: int, layer: int) -> None:
        """Raise UnsupportedModelError if the graph would not have room for all layers: ggml would end the process."""
        free = api.memory_size(context) - api.used_memory(context)
        thread = threading.get_ident()
        last, before = self._rooms.get(thread, (layer, 0))
        if layer == last and free <= before:
            return
        self._rooms[thread] = (layer, free)
        if layer > last:
            needed = (before - free) / (layer - last) * (len(self._multipliers) - layer)
            if needed + _SPARE_NODES * api.tensor_overhead() > free:
                raise UnsupportedModelError("llama.cpp's graph has no room for bases of heads", "use `profile=none`")


def inverse_frequencies(parameters: RopeParameters, bases: NDArray[np.float64]) -> NDArray[np.float32]:
    """Positions per radian of each pair, float32 [heads, pairs], for heads with `bases`, float64 [heads]."""
    frequencies = np.array([angular_frequencies(parameters, float(base)) for base in bases])
    with np.errstate(divide="ignore", over="ignore"):
        inverse = (1.0 / frequencies).astype(np.float32)
    return np.minimum(inverse, np.float32(api.NO_ROTATION))


def rotated_by_head(
    context: int, numbers: int, positions: int, factors: int, kv_heads: int, rotation: _Rotation
) -> int:
    """The tensor f32 [width, heads, rows] `numbers`, rotated by `positions`, i32 [rows].

    `factors` f32 [kv heads * pairs] divide the angles. Head h has those of head h // (heads / kv heads) of keys. What
    lies beyond the rotated dimensions of each head stays as it is.
    """
    node = TensorStruct.from_address(numbers)
    width, heads, rows, _ = node.ne
    _, head, row, _ = node.nb
    group, dimensions, neox = heads // kv_heads, rotation.parameters.dimensions, rotation.parameters.neox
    # ggml turns neighbours, or what lies half a head apart: then the halves of all heads go side by side.
    size = dimensions // 2 if neox else dimensions
    places = range(0, dimensions, size)
    parts = [
        api.view_4d(context, numbers, size, kv_heads, group, rows, head * group, head, row, 4 * place)
        for place in places
    ]
    whole = dimensions * kv_heads
    wide = api.reshape_3d(context, _joined(context, parts, 1), whole, group, rows)
    mode = api.MODE_NEOX if neox else api.MODE_NORMAL
    wide = api.rope(context, wide, positions, factors, whole, mode, 0, 1.0, 1.0, 0.0, rotation.magnitude, 0.0, 0.0)
    parts = [
        api.view_4d(
            *(context, wide, size, group, kv_heads, rows),
            *(4 * whole, 4 * size, 4 * whole * group, 4 * place * kv_heads),
        )
        for place in places
    ]
    if width > dimensions:
        rest = (width - dimensions, group, kv_heads, rows)
        parts.append(api.view_4d(context, numbers, *rest, head, head * group, row, 4 * dimensions))
    return int(api.reshape_3d(context, _joined(context, parts, 0), width, heads, rows))


def _joined(context: int, parts: Sequence[int], dimension: int) -> int:
    """Views side by side along a dimension, as one tensor without gaps."""
    found = parts[0] if len(parts) > 1 else api.contiguous(context, parts[0])
    for part in parts[1:]:
        found = api.concatenate(context, found, part, dimension)
    return int(found)


def _rotation(arguments: tuple[Any, ...]) -> _Rotation:
    """What the arguments of `ggml_rope_ext` say; YaRN's factor on the numbers is that of `rope_yarn` in ggml."""
    base, scale, extrapolation, attention = arguments[7:11]
    magnitude = attention * (1 + 0.1 * log(1 / scale)) if extrapolation else attention
    return _Rotation(asked_parameters(arguments), base, magnitude)
