"""Cosines and sines of the angles by which each row of a batch is turned on, where llama.cpp computes the rows.

A row that RoPE has turned by its context's base b0 becomes that of base b by turning pair i on by
p * (theta_i(b) - theta_i(b0)): with C and S the cosines and sines of that angle, x' = C * x + S * swap(x), where swap
exchanges the two numbers of each pair and S has a minus sign at the first of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.errors import NativeError
from abcli.native import ggml_api as api
from abcli.native.ggml_api import TensorStruct
from abcli.native.rotating.devices import ALIGNMENT, Device, Devices
from abcli.rope.frequencies import RopeParameters, angular_frequencies

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

    @property
    def parts(self) -> int:
        """How many tables it takes: two, or three where no one `roll` exchanges the numbers of all pairs."""
        return 3 if self.parameters.neox and self.width % self.parameters.dimensions else 2

    def fill(self, out: NDArray[np.float32], angles: NDArray[np.float64]) -> None:
        """Write the tables of `angles` [rows, pairs] to `out` [parts, rows, width], which held 1 and 0 at first."""
        dimensions = self.parameters.dimensions
        half = dimensions // 2
        first, second = (
            (slice(0, half), slice(half, dimensions))
            if self.parameters.neox
            else (slice(0, dimensions, 2), slice(1, dimensions, 2))
        )
        out[0][:, first] = out[0][:, second] = np.cos(angles)
        out[1][:, second] = sines = np.sin(angles)
        np.negative(sines, out[-1][:, first], casting="same_kind")

    def turn(self, context: int, rows: int, tables: Sequence[int]) -> int:
        """The tensor f32 [width, heads, rows] `rows`, turned by `tables` f32 [width, 1, rows]."""
        result = api.multiply(context, rows, tables[0])
        for swapped, table in zip(self._swapped(context, rows), tables[1:], strict=True):
            result = api.add(context, result, api.multiply(context, swapped, table))
        return int(result)

    def _swapped(self, context: int, rows: int) -> list[int]:
        """`rows` with the numbers of each pair exchanged; with three tables second to first, and first to second."""
        _, heads, count, _ = TensorStruct.from_address(rows).ne
        dimensions = self.parameters.dimensions
        half = dimensions // 2
        if self.parts == 3:
            return [api.roll(context, rows, shift, 0, 0, 0) for shift in (half, self.width - half)]
        if not self.parameters.neox:
            shape, shifts = (2, self.width // 2, heads, count), (1, 0, 0, 0)
        elif dimensions == self.width:
            return [api.roll(context, rows, half, 0, 0, 0)]
        else:
            shape, shifts = (half, 2, self.width // dimensions, heads * count), (0, 1, 0, 0)
        swapped = api.roll(context, api.reshape_4d(context, rows, *shape), *shifts)
        return [api.reshape_3d(context, swapped, self.width, heads, count)]


class _Table:
    """The tables of one rotation on one device, for any number of rows up to `capacity`."""

    def __init__(self, device: Device, rotation: Rotation, capacity: int) -> None:
        self.rotation = rotation
        self._device = device
        size = rotation.parts * self._step(capacity)
        self._buffer = device.memory(size)
        self._whole = device.tensor(llama.GGML_TYPE_F32, (size // 4, 1, 1), self._buffer)
        self._tensors: dict[int, tuple[int, ...]] = {}
        # What is uploaded, and the numbers of the tables in it; for `_rows` rows.
        self._rows = 0
        self._host: NDArray[np.float32] = np.empty(0, np.float32)
        self._numbers: NDArray[np.float32] = np.empty(0, np.float32)

    def tensors(self, rows: int) -> tuple[int, ...]:
        """Tensors f32 [width, 1, rows] over the tables of so many rows."""
        if rows not in self._tensors:
            shape = (self.rotation.width, 1, rows)
            offsets = [part * self._step(rows) for part in range(self.rotation.parts)]
            made = [self._device.tensor(llama.GGML_TYPE_F32, shape, self._buffer, offset) for offset in offsets]
            self._tensors[rows] = tuple(made)
        return self._tensors[rows]

    def upload(self, angles: NDArray[np.float64]) -> None:
        """Fill the tables with what belongs to `angles` [rows, pairs]."""
        rows, width, parts = len(angles), self.rotation.width, self.rotation.parts
        if rows != self._rows:
            self._rows = rows
            self._host = np.zeros((parts, self._step(rows) // 4), np.float32)
            self._numbers = self._host[:, : rows * width].reshape(parts, rows, width)
            self._numbers[0] = 1.0
        self.rotation.fill(self._numbers, angles)
        api.tensor_set(self._whole, self._host.ctypes.data, 0, self._host.nbytes)

    def _step(self, rows: int) -> int:
        """The bytes from one of the tables to the next."""
        return -(-rows * 4 * self.rotation.width // ALIGNMENT) * ALIGNMENT


class Tables:
    """The tables of all rotations on all devices, made when they are first needed; `devices` own the memory."""

    def __init__(self, devices: Devices, base: float, capacity: int) -> None:
        """`base` is that by which llama.cpp turns; `capacity` is the largest number of rows."""
        self._devices = devices
        self._base = base
        self._capacity = capacity
        self._tables: dict[tuple[Device, Rotation], _Table] = {}
        # The rows to be computed next, and radians per position of each, by rotation.
        self._layout = Layout((base,), 1, 1)
        self._positions: NDArray[np.int32] = np.zeros(1, np.int32)
        self._deltas: dict[RopeParameters, NDArray[np.float64]] = {}

    def turn(self, context: int, rows: int, rotation: Rotation, weights: TensorStruct) -> int:
        """The tensor f32 [width, heads, rows] `rows`, turned; it is computed where `weights` lie.

        Raises NativeError if the device has no room for the tables, or there are more rows than `capacity`.
        """
        count = TensorStruct.from_address(rows).ne[2]
        if count > self._capacity:
            raise NativeError(f"llama.cpp computes {count} rows at once where {self._capacity} were expected")
        device = self._devices.of(weights)
        table = self._tables.get((device, rotation))
        if table is None:
            table = self._tables[device, rotation] = _Table(device, rotation, self._capacity)
            table.upload(self._angles(rotation))
        return rotation.turn(context, rows, table.tensors(count))

    def fill(self, layout: Layout, positions: NDArray[np.int32]) -> None:
        """Say what the rows of the next batch are; `positions` int32 [rows] is where they stand."""
        if layout != self._layout:
            self._layout = layout
            self._deltas.clear()
        self._positions = positions
        for table in self._tables.values():
            table.upload(self._angles(table.rotation))

    def _angles(self, rotation: Rotation) -> NDArray[np.float64]:
        """The angles float64 [rows, pairs]; exactly 0 for rows of the context's base."""
        parameters, layout = rotation.parameters, self._layout
        if parameters not in self._deltas:
            native = angular_frequencies(parameters, self._base)
            deltas = np.array([angular_frequencies(parameters, base) - native for base in layout.bases])
            self._deltas[parameters] = np.tile(np.repeat(deltas, layout.tokens, axis=0), (layout.slots, 1))
        return np.asarray(self._positions[:, None] * self._deltas[parameters])


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
