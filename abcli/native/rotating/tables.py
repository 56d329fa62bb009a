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
class Rotation:
    """How heads of `width` numbers are rotated."""

    parameters: RopeParameters
    width: int

    @property
    def parts(self) -> int:
        """How many tables it takes: two, or three where no one `roll` exchanges the numbers of all pairs."""
        return 3 if self.parameters.neox and self.width % self.parameters.dimensions else 2

    def fill(self, out: Sequence[NDArray[np.float32]], angles: NDArray[np.float64]) -> None:
        """Write the tables of `angles` [rows, pairs] to `out`, each float32 [rows, width]."""
        dimensions = self.parameters.dimensions
        half = dimensions // 2
        first, second = (
            (slice(0, half), slice(half, dimensions))
            if self.parameters.neox
            else (slice(0, dimensions, 2), slice(1, dimensions, 2))
        )
        cosines, sines = np.cos(angles), np.sin(angles)
        out[0][:, dimensions:] = 1.0
        out[0][:, first] = out[0][:, second] = cosines
        for table in out[1:]:
            table[:] = 0.0
        out[1][:, second] = sines
        out[-1][:, first] = -sines

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
        self._host: NDArray[np.float32] = np.empty(0, np.float32)

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
        rows, step = len(angles), self._step(len(angles)) // 4
        if len(self._host) != self.rotation.parts * step:
            self._host = np.zeros(self.rotation.parts * step, np.float32)
        parts = [part[: rows * self.rotation.width] for part in self._host.reshape(self.rotation.parts, step)]
        self.rotation.fill([part.reshape(rows, self.rotation.width) for part in parts], angles)
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
        self._deltas: dict[tuple[RopeParameters, float], NDArray[np.float64]] = {}
        # The rows to be computed next: their bases, which of these each row has, and its position.
        self._rows: tuple[Sequence[float], NDArray[np.intp], NDArray[np.int32]] = (
            (base,),
            np.zeros(1, np.intp),
            np.zeros(1, np.int32),
        )

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

    def fill(self, bases: Sequence[float], columns: NDArray[np.intp], positions: NDArray[np.int32]) -> None:
        """Say which of `bases` each row has (`columns` [rows]) and where it stands (`positions` [rows])."""
        self._rows = (bases, columns, positions)
        for table in self._tables.values():
            table.upload(self._angles(table.rotation))

    def _angles(self, rotation: Rotation) -> NDArray[np.float64]:
        """The angles float64 [rows, pairs]; exactly 0 for rows of the context's base."""
        bases, columns, positions = self._rows
        deltas = np.array([self._delta(rotation.parameters, base) for base in bases])
        return np.asarray(positions[:, None] * deltas[columns])

    def _delta(self, parameters: RopeParameters, base: float) -> NDArray[np.float64]:
        key = (parameters, base)
        if key not in self._deltas:
            self._deltas[key] = angular_frequencies(parameters, base) - angular_frequencies(parameters, self._base)
        return self._deltas[key]


def weights_of(tensor: int) -> TensorStruct:
    """The weights that the numbers of a rotation come from; where they lie, llama.cpp computes it."""
    for _ in range(_MAX_STEPS):
        node = TensorStruct.from_address(tensor)
        if node.buffer:
            return node
        if not node.src[0]:
            break
        tensor = node.src[0]
    raise NativeError("llama.cpp rotates numbers that come from no weights", "use --engine contexts")
