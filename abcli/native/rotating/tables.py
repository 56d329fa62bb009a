"""Tables of the angles by which each row of a batch is turned on, where llama.cpp computes the rows.

A row x that RoPE has turned by its context's base b0 becomes that of base b by turning pair i on by
p * (theta_i(b) - theta_i(b0)). There are two ways to do that with ggml's own operations:

- Cosines and sines: x' = cos * x + sin * quarter(x), where quarter turns every pair by 90 degrees. One rotation gives x
  and quarter(x), one product and one sum the rest.
- Divisors: ggml's rotation takes a tensor that divides the angle of each pair of a head. All heads of all rows, taken
  as one head at position 1, have all their angles in such a tensor. That is one operation, and on a GPU what counts is
  how many there are; but it takes a sine and a cosine for every pair, and pairs that are neighbours.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

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
# So many rows at most are turned by divisors, which take up heads / 4 times the memory of cosines and sines: for more,
# that counts more than the number of operations.
MOST_DIVIDED_ROWS = 64
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


@dataclass(frozen=True)
class _Key:
    """What a table is for: `multipliers` as `Tables`, or one for all heads; `heads` is 0 for cosines and sines."""

    device: Device
    rotation: Rotation
    multipliers: tuple[float, ...]
    heads: int = 0


class _Table(Protocol):
    """What rows are turned by; `rows` says how many rows may be."""

    rows: range

    def upload(self, angles: NDArray[np.float64]) -> None:
        """Fill it with what belongs to `angles` [rows, kv heads, pairs] within half a turn."""

    def turn(self, context: int, rows: int) -> int:
        """The tensor f32 [width, heads, rows] `rows`, turned; it takes at most `NODES_PER_ROTATION` nodes."""


class _Waves:
    """Cosines and sines, of all heads or, with several multipliers, of each head of keys."""

    def __init__(self, key: _Key, rows: range) -> None:
        self.rows = rows
        self._rotation, self._device = key.rotation, key.device
        # Cosines and sines [2, rows, kv heads, width], as they are uploaded.
        self._numbers: NDArray[np.float32] = np.empty((2, 0, len(key.multipliers), key.rotation.width), np.float32)
        count = 2 * (rows.stop - 1) * len(key.multipliers) * key.rotation.width
        self._buffer = key.device.memory(4 * count)
        self._whole = key.device.tensor(llama.GGML_TYPE_F32, (count,), self._buffer)
        self._tensors: dict[int, int] = {}

    def upload(self, angles: NDArray[np.float64]) -> None:
        """See `_Table.upload`."""
        if len(angles) != self._numbers.shape[1]:
            self._numbers = np.zeros((2, len(angles), *self._numbers.shape[2:]), np.float32)
            self._numbers[0] = 1.0
        dimensions = self._rotation.parameters.dimensions
        half = dimensions // 2
        first, second = (
            (slice(0, half), slice(half, dimensions))
            if self._rotation.parameters.neox
            else (slice(0, dimensions, 2), slice(1, dimensions, 2))
        )
        # Within half a turn single precision loses nothing that is kept, and is many times as fast.
        reduced = angles.astype(np.float32)
        for table, numbers in zip(self._numbers, (np.cos(reduced), np.sin(reduced)), strict=True):
            table[..., first] = table[..., second] = numbers
        api.tensor_set(self._whole, self._numbers.ctypes.data, 0, self._numbers.nbytes)

    def turn(self, context: int, rows: int) -> int:
        """See `_Table.turn`."""
        _, heads, count, _ = TensorStruct.from_address(rows).ne
        width, parameters = self._rotation.width, self._rotation.parameters
        mode = api.MODE_NEOX if parameters.neox else api.MODE_NORMAL
        step, whole = 4 * width, 4 * width * heads * count
        # All rows stand at one position here, and again at another one, where they are turned by 90 degrees: ggml's
        # operations go by the steps, though it makes no view itself that is larger than its source.
        twice = api.view_4d(context, rows, width, heads * count, 1, 1, step, whole, whole, 0)
        view = TensorStruct.from_address(twice)
        view.ne[2], view.nb[2] = 2, 0
        turns = self._device.turns
        both = api.rope(context, twice, turns, None, parameters.dimensions, mode, 0, 1.0, np.pi / 2, 0.0, 1.0, 0.0, 0.0)
        table = self._tensor(count)
        kv_heads = TensorStruct.from_address(table).ne[1]
        if kv_heads == 1:
            both = api.reshape_3d(context, both, width, heads, 2 * count)
        else:
            group = heads // kv_heads
            both = api.view_4d(
                *(context, both, width, group, kv_heads, 2 * count),
                *(step, step * group, step * heads, 0),
            )
            table = api.view_4d(*(context, table, width, 1, kv_heads, 2 * count), *(step, step, step * kv_heads, 0))
        both = api.multiply(context, both, table)
        parts = [
            api.view_4d(context, both, width, heads, count, 1, step, step * heads, whole, offset)
            for offset in (0, whole)
        ]
        return int(api.add(context, *parts))

    def _tensor(self, rows: int) -> int:
        """The tensor f32 [width, kv heads, 2 * rows] over the cosines and sines of so many rows."""
        if rows not in self._tensors:
            shape = (self._rotation.width, self._numbers.shape[2], 2 * rows)
            self._tensors[rows] = self._device.tensor(llama.GGML_TYPE_F32, shape, self._buffer)
        return self._tensors[rows]


class _Divisors:
    """The inverse of the angle of each pair of all heads, which are turned alike."""

    def __init__(self, key: _Key, rows: range) -> None:
        self.rows = rows
        self._device = key.device
        # [rows, heads, pairs], as they are uploaded. By infinity nothing is turned: so are pairs that are not rotated.
        self._numbers: NDArray[np.float32] = np.empty((0, key.heads, key.rotation.width // 2), np.float32)
        count = (rows.stop - 1) * key.heads * key.rotation.width // 2
        self._buffer = key.device.memory(4 * count)
        self._whole = key.device.tensor(llama.GGML_TYPE_F32, (count,), self._buffer)
        self._tensors: dict[int, int] = {}

    def upload(self, angles: NDArray[np.float64]) -> None:
        """See `_Table.upload`."""
        if len(angles) != len(self._numbers):
            self._numbers = np.full((len(angles), *self._numbers.shape[1:]), np.inf, np.float32)
        with np.errstate(divide="ignore", over="ignore"):
            self._numbers[..., : angles.shape[-1]] = (1.0 / angles).astype(np.float32)
        api.tensor_set(self._whole, self._numbers.ctypes.data, 0, self._numbers.nbytes)

    def turn(self, context: int, rows: int) -> int:
        """See `_Table.turn`."""
        width, heads, count, _ = TensorStruct.from_address(rows).ne
        whole = width * heads * count
        if whole not in self._tensors:
            self._tensors[whole] = self._device.tensor(llama.GGML_TYPE_F32, (whole // 2,), self._buffer)
        wide = api.reshape_3d(context, rows, whole, 1, 1)
        wide = self._device.divided_rotation(context, wide, self._tensors[whole])
        return int(api.reshape_3d(context, wide, width, heads, count))


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
        self._tables: dict[_Key, _Table] = {}
        # The rows to be computed next, and the part of a full turn per position of each, by rotation.
        self._layout = Layout((base,), 1, 1)
        self._positions: NDArray[np.int32] = np.zeros(1, np.int32)
        self._deltas: dict[tuple[RopeParameters, tuple[float, ...]], NDArray[np.float64]] = {}

    def turn(self, context: int, rows: int, rotation: Rotation, weights: TensorStruct) -> int:
        """The tensor f32 [width, heads, rows] `rows`, which has no gaps, turned; it is computed where `weights` lie.

        Raises NativeError if the device has no room for the tables, or there are more rows than `capacity`.
        """
        _, heads, count, _ = TensorStruct.from_address(rows).ne
        if count > self._capacity:
            raise NativeError(f"llama.cpp computes {count} rows at once where {self._capacity} were expected")
        device = self._devices.of(weights)
        multipliers = self._multipliers[layer_of(weights)] if self._multipliers else _ONE_BASE
        if len(set(multipliers)) == 1:
            multipliers = multipliers[:1]
        divides = device.prefers_few_operations and not rotation.parameters.neox and len(multipliers) == 1
        if divides and count <= MOST_DIVIDED_ROWS:
            table = self._table(_Key(device, rotation, multipliers, heads))
        else:
            table = self._table(_Key(device, rotation, multipliers), MOST_DIVIDED_ROWS + 1 if divides else 1)
        return table.turn(context, rows)

    def fill(self, layout: Layout, positions: NDArray[np.int32]) -> None:
        """Say what the rows of the next batch are; `positions` int32 [rows] is where they stand."""
        if layout != self._layout:
            self._layout = layout
            self._deltas.clear()
        self._positions = positions
        for key, table in self._tables.items():
            self._upload(key, table)

    def _table(self, key: _Key, fewest: int = 1) -> _Table:
        """The table for at least `fewest` rows."""
        if key not in self._tables:
            most = min(self._capacity, MOST_DIVIDED_ROWS) if key.heads else self._capacity
            table: _Table = (_Divisors if key.heads else _Waves)(key, range(fewest, most + 1))
            self._upload(key, table)
            self._tables[key] = table
        return self._tables[key]

    def _upload(self, key: _Key, table: _Table) -> None:
        if self._layout.rows in table.rows:
            table.upload(self._angles(key.rotation.parameters, key.multipliers))

    def _angles(self, parameters: RopeParameters, multipliers: tuple[float, ...]) -> NDArray[np.float64]:
        """The angles float64 [rows, kv heads, pairs], within half a turn; exactly 0 for rows of the context's base."""
        layout, key = self._layout, (parameters, multipliers)
        if key not in self._deltas:
            native, *others = (
                np.array([angular_frequencies(parameters, base * multiplier) for multiplier in multipliers])
                for base in (self._base, *layout.bases)
            )
            deltas = np.array([other - native for other in others]) / (2 * np.pi)
            self._deltas[key] = np.tile(np.repeat(deltas, layout.tokens, axis=0), (layout.slots, 1, 1))
        turns = self._positions[:, None, None] * self._deltas[key]
        return np.asarray((turns - np.rint(turns)) * (2 * np.pi))


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
