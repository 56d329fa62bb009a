"""Cosines and sines of the angles by which each row of a batch is turned on, where llama.cpp computes the rows.

A row x that RoPE has turned by its context's base b0 becomes that of base b by turning pair i on by
p * (theta_i(b) - theta_i(b0)): x' = cos * x + sin * quarter(x), where quarter turns every pair by 90 degrees. One
rotation of ggml's own gives x and quarter(x), one product and one sum the rest: on a GPU, what counts is how many
operations there are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.config import HeadNumbers
from abcli.errors import NativeError, UnsupportedModelError
from abcli.native import ggml_api as api
from abcli.native.ggml_api import TensorStruct
from abcli.native.rotating.devices import Device, Devices
from abcli.rope.frequencies import RopeParameters, angular_frequencies

# A rotation, a product, a sum and five views at most.
NODES_PER_ROTATION = 8
# What queries and keys are computed with, in one matrix or in several.
_ROTATED_WEIGHTS = re.compile(rb"blk\.(\d+)\.attn_(?:q|k|qkv)\.weight")
# The multipliers of a layer whose heads all have the bucket's base.
_ONE_BASE = (1.0,)
# More steps than this lie nowhere between a rotation and the weights that its numbers come from.
_MAX_STEPS = 16


@dataclass(frozen=True)
class Layout:
    """How the rows of a batch lie: for each of `slots` slots, for each base of `bases`, `tokens` tokens."""

    bases: tuple[float, ...]
    slots: int
    tokens: int

    @property
    def rows(self) -> int:
        """The number of rows of the batch."""
        return self.slots * len(self.bases) * self.tokens


@dataclass(frozen=True)
class Rotation:
    """How heads of `width` numbers are rotated."""

    parameters: RopeParameters
    width: int

    def fill(self, out: NDArray[np.float32], angles: NDArray[np.float64]) -> None:
        """Write cosines and sines of `angles` [..., pairs] to `out` [2, ..., width], which held 1 and 0 at first."""
        dimensions = self.parameters.dimensions
        half = dimensions // 2
        first, second = (
            (slice(0, half), slice(half, dimensions))
            if self.parameters.neox
            else (slice(0, dimensions, 2), slice(1, dimensions, 2))
        )
        # Within half a turn single precision loses nothing that is kept, and is many times as fast.
        turns = angles / (2 * np.pi)
        reduced = ((turns - np.rint(turns)) * (2 * np.pi)).astype(np.float32)
        for table, numbers in zip(out, (np.cos(reduced), np.sin(reduced)), strict=True):
            table[..., first] = table[..., second] = numbers

    def turn(self, context: int, rows: int, table: int, turns: int) -> int:
        """The tensor f32 [width, heads, rows] `rows`, turned by `table`, f32 [width, kv heads, 2 * rows]: cosines, then
        sines, for one head of keys and the queries that meet it, or for all.

        `turns` is a tensor i32 [2] that holds 0 and 1. It takes `NODES_PER_ROTATION` nodes.
        """
        _, heads, count, _ = TensorStruct.from_address(rows).ne
        mode = api.MODE_NEOX if self.parameters.neox else api.MODE_NORMAL
        step, whole = 4 * self.width, 4 * self.width * heads * count
        # All rows stand at one position here, and again at another one, where they are turned by 90 degrees: ggml's
        # operations go by the steps, though it makes no view itself that is larger than its source.
        twice = api.view_4d(context, rows, self.width, heads * count, 1, 1, step, whole, whole, 0)
        view = TensorStruct.from_address(twice)
        view.ne[2], view.nb[2] = 2, 0
        both = api.rope(
            context, twice, turns, None, self.parameters.dimensions, mode, 0, 1.0, np.pi / 2, 0.0, 1.0, 0.0, 0.0
        )
        kv_heads = TensorStruct.from_address(table).ne[1]
        if kv_heads == 1:
            both = api.reshape_3d(context, both, self.width, heads, 2 * count)
        else:
            group = heads // kv_heads
            both = api.view_4d(
                *(context, both, self.width, group, kv_heads, 2 * count),
                *(step, step * group, step * heads, 0),
            )
            table = api.view_4d(
                *(context, table, self.width, 1, kv_heads, 2 * count), *(step, step, step * kv_heads, 0)
            )
        both = api.multiply(context, both, table)
        parts = [
            api.view_4d(context, both, self.width, heads, count, 1, step, step * heads, whole, offset)
            for offset in (0, whole)
        ]
        return int(api.add(context, *parts))


class _Table:
    """The tables of one rotation on one device, for any number of rows up to `capacity`; `multipliers` as `Tables`."""

    def __init__(self, device: Device, rotation: Rotation, multipliers: tuple[float, ...], capacity: int) -> None:
        self.rotation, self.multipliers = rotation, multipliers
        self._device = device
        count = 2 * capacity * rotation.width * len(multipliers)
        self._buffer = device.memory(4 * count)
        self._whole = device.tensor(llama.GGML_TYPE_F32, (count,), self._buffer)
        self._tensors: dict[int, int] = {}
        # Cosines and sines [2, rows, kv heads, width], as they are uploaded.
        self._numbers: NDArray[np.float32] = np.empty((2, 0, len(multipliers), rotation.width), np.float32)

    def tensor(self, rows: int) -> int:
        """The tensor f32 [width, kv heads, 2 * rows] over the cosines and sines of so many rows."""
        if rows not in self._tensors:
            shape = (self.rotation.width, len(self.multipliers), 2 * rows)
            self._tensors[rows] = self._device.tensor(llama.GGML_TYPE_F32, shape, self._buffer)
        return self._tensors[rows]

    def upload(self, angles: NDArray[np.float64]) -> None:
        """Fill the tables with what belongs to `angles` [rows, kv heads, pairs]."""
        if len(angles) != self._numbers.shape[1]:
            self._numbers = np.zeros((2, len(angles), *self._numbers.shape[2:]), np.float32)
            self._numbers[0] = 1.0
        self.rotation.fill(self._numbers, angles)
        api.tensor_set(self._whole, self._numbers.ctypes.data, 0, self._numbers.nbytes)


class Tables:
    """The tables of all rotations on all devices, made when they are first needed; `devices` own the memory."""

    def __init__(self, devices: Devices, base: float, capacity: int, multipliers: HeadNumbers = ()) -> None:
        """`base` is that by which llama.cpp turns; `capacity` is the largest number of rows.

        `multipliers` are factors on all bases, of each head of keys of each layer; none are all 1.
        """
        self._devices = devices
        self._base = base
        self._capacity = capacity
        self._multipliers = multipliers
        self._tables: dict[tuple[Device, Rotation, tuple[float, ...]], _Table] = {}
        # The rows to be computed next, and radians per position of each, by rotation.
        self._layout = Layout((base,), 1, 1)
        self._positions: NDArray[np.int32] = np.zeros(1, np.int32)
        self._deltas: dict[tuple[RopeParameters, tuple[float, ...]], NDArray[np.float64]] = {}

    def turn(self, context: int, rows: int, rotation: Rotation, weights: TensorStruct) -> int:
        """The tensor f32 [width, heads, rows] `rows`, turned; it is computed where `weights` lie.

        Raises NativeError if the device has no room for the tables, or there are more rows than `capacity`.
        """
        count = TensorStruct.from_address(rows).ne[2]
        if count > self._capacity:
            raise NativeError(f"llama.cpp computes {count} rows at once where {self._capacity} were expected")
        device = self._devices.of(weights)
        multipliers = self._multipliers[layer_of(weights)] if self._multipliers else _ONE_BASE
        if len(set(multipliers)) == 1:
            multipliers = multipliers[:1]
        key = (device, rotation, multipliers)
        table = self._tables.get(key)
        if table is None:
            table = self._tables[key] = _Table(*key, self._capacity)
            table.upload(self._angles(table))
        return rotation.turn(context, rows, table.tensor(count), device.turns)

    def fill(self, layout: Layout, positions: NDArray[np.int32]) -> None:
        """Say what the rows of the next batch are; `positions` int32 [rows] is where they stand."""
        if layout != self._layout:
            self._layout = layout
            self._deltas.clear()
        self._positions = positions
        for table in self._tables.values():
            table.upload(self._angles(table))

    def _angles(self, table: _Table) -> NDArray[np.float64]:
        """The angles float64 [rows, kv heads, pairs]; exactly 0 for rows of the context's base."""
        parameters, layout = table.rotation.parameters, self._layout
        key = (parameters, table.multipliers)
        if key not in self._deltas:
            native, *others = (
                np.array([angular_frequencies(parameters, base * multiplier) for multiplier in table.multipliers])
                for base in (self._base, *layout.bases)
            )
            deltas = np.array([other - native for other in others])
            self._deltas[key] = np.tile(np.repeat(deltas, layout.tokens, axis=0), (layout.slots, 1, 1))
        return np.asarray(self._positions[:, None, None] * self._deltas[key])


def layer_of(weights: TensorStruct) -> int:
    """The layer whose queries or keys `weights` give. Raises UnsupportedModelError if they are called otherwise."""
    found = _ROTATED_WEIGHTS.fullmatch(weights.name)
    if found is None:
        raise UnsupportedModelError(
            f"llama.cpp rotates what comes from {weights.name.decode(errors='replace')!r}, whose heads have no bases",
            "use `profile=none`",
        )
    return int(found[1])


def weights_of(tensor: int) -> TensorStruct:
    """The weights that the numbers of a rotation come from; where they lie, llama.cpp computes it."""
    for _ in range(_MAX_STEPS):
        node = TensorStruct.from_address(tensor)
        if node.buffer:
            return node
        if not node.src[0]:
            break
        tensor = node.src[0]
    raise NativeError("llama.cpp rotates numbers that come from no weights", "use `engine=contexts`")
