"""The cells of a fused context, where they lie: keys and values copied from sequence to sequence, keys turned.

It relies on what `check` proves: the token at position p of sequence s lies in cell p of stream s.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.config import HeadNumbers
from abcli.errors import NativeError
from abcli.native import ggml_api as api
from abcli.native.ggml_api import TensorStruct
from abcli.native.rotating.devices import Device, Devices
from abcli.native.rotating.giving import Gift, Giver, Range, Turn, stack_up
from abcli.native.rotating.graph import CacheTensor, Observation, RopeNode
from abcli.native.rotating.keys import aligned_bytes
from abcli.native.rotating.turning import Visit, input_of
from abcli.native.state import MAGIC, StateError
from abcli.rope.frequencies import angular_frequencies

# ggml's CPU rotates these and no others.
_TURNABLE = frozenset({llama.GGML_TYPE_F32, llama.GGML_TYPE_F16})
_OPERATION_OFFSET = TensorStruct.op.offset


@dataclass(frozen=True)
class _Section:
    """A piece of a state: `header` and then the numbers of `tensor`."""

    header: bytes
    tensor: CacheTensor


class DeviceCache:
    """Keys and values of all layers of a fused context."""

    def __init__(
        self, observation: Observation, follows: frozenset[int], devices: Devices, multipliers: HeadNumbers = ()
    ) -> None:
        """`follows` are the ROPE operations that use the context's base, `multipliers` as those of `Tables`."""
        self._keys = observation.keys
        self._values = observation.values
        self._ropes = observation.ropes
        self._follows = follows
        self._multipliers = multipliers
        self._devices = devices
        self._givers: list[Giver] = []
        # By the number of a graph's nodes, the places of those that write keys.
        self._places: dict[int, list[int]] = {}

    @property
    def obstacle(self) -> str:
        """Why keys cannot be turned, empty if they can."""
        for layer, keys in self._keys.items():
            rope = self._rope(keys)
            if rope is None:
                continue
            if keys.type_id not in _TURNABLE:
                return "keys that are neither f32 nor f16 cannot be turned where they lie"
            if rope.first_dimension or keys.width % rope.width:
                return f"the keys of layer {layer} are no whole heads"
        return "" if self._keys else "the model keeps no keys"

    @property
    def turning_layers(self) -> int:
        """The number of layers whose keys follow the base."""
        return sum(self._rope(keys) is not None for keys in self._keys.values())

    def give(self, gift: Gift) -> None:
        """Copy what a gift says. Raises NativeError."""
        if not self._givers:
            tensors: dict[Device, list[tuple[CacheTensor, Turn | None]]] = {}
            items = [(keys, self._turn(layer)) for layer, keys in self._keys.items()]
            for tensor, turn in [*items, *((values, None) for values in self._values.values())]:
                device = self._devices.of(TensorStruct.from_address(tensor.pointer))
                tensors.setdefault(device, []).append((tensor, turn))
            self._givers = [Giver(device, stack_up(chosen)) for device, chosen in tensors.items()]
        for giver in self._givers:
            giver.give(gift)

    def turned(
        self, layer: int, key: NDArray[np.float32], position: int, bases: tuple[float, float]
    ) -> NDArray[np.float32]:
        """What the layer's `key` (float32 [numbers]) at `position` under the first base is under the second one."""
        turn = self._turn(layer)
        if turn is None:
            return key
        rope = turn.rope
        old, new = (
            np.array([angular_frequencies(rope.parameters, base * multiplier) for multiplier in turn.multipliers])
            for base in bases
        )
        half = new.shape[1]
        heads = key.reshape(-1, rope.width)
        pairs = heads[:, : 2 * half].reshape(len(heads), *((2, half) if rope.parameters.neox else (half, 2)))
        axis = 1 if rope.parameters.neox else 2
        first, second = (pairs.take(index, axis) for index in (0, 1))
        complex_pairs = (first + 1j * second) * np.exp(1j * position * (new - old))
        turned = np.stack([complex_pairs.real, complex_pairs.imag], axis).reshape(len(heads), -1)
        return np.asarray(np.concatenate([turned, heads[:, 2 * half :]], axis=1).ravel(), np.float32)

    def check(self, sequences: NDArray[np.int64], positions: NDArray[np.int32]) -> Visit:
        """Proves, for each layer of a graph that it is shown, that row i's key goes to the cell of its position.

        `sequences` and `positions` are those of the rows, [rows]. Raises NativeError.
        """
        cells = {keys.pointer: keys.cells for keys in self._keys.values()}
        checked: set[int] = set()

        def check(tensor: int, graph: int) -> int:
            """The keys that a node writes, 0 for any other node."""
            operation = ctypes.c_int.from_address(tensor + _OPERATION_OFFSET).value
            if api.operation(operation, tensor) != b"SET_ROWS":
                return 0
            node = TensorStruct.from_address(tensor)
            if node.view_src not in cells:
                return 0
            # Layers share the indices of their cells.
            if node.src[1] not in checked:
                checked.add(node.src[1])
                source = input_of(node.src[1], graph)
                indices = TensorStruct.from_address(source)
                found = np.empty(indices.ne[0], np.int64)
                wanted = sequences * cells[node.view_src] + positions
                if indices.type != api.GGML_TYPE_I64 or len(found) != len(wanted):
                    raise _elsewhere()
                api.tensor_get(source, found.ctypes.data, 0, found.nbytes)
                if not np.array_equal(found, wanted):
                    raise _elsewhere()
            return int(node.view_src)

        def visit(tensors: Sequence[int], graph: int) -> None:
            # In graphs of one size they are at the same places; that all layers are among them is seen.
            places = self._places.get(len(tensors), ()) if graph else ()
            if places and {check(tensors[place], graph) for place in places} == cells.keys():
                return
            self._places[len(tensors)] = [place for place, tensor in enumerate(tensors) if check(tensor, graph)]

        return visit

    def read(self, sequence: int, where: Range) -> NDArray[np.uint8]:
        """The range's keys and values as bytes in the form of llama.cpp's state (`abcli.native.state`), one cache."""
        sections = list(self._sections(where))
        sizes = [len(section.header) + section.tensor.row_bytes * where.count for section in sections]
        data = aligned_bytes(sum(sizes))
        at = 0
        for section, size in zip(sections, sizes, strict=True):
            data[at : at + len(section.header)] = np.frombuffer(section.header, np.uint8)
            self._transfer(section.tensor, sequence, where, data[at + len(section.header) : at + size], out=True)
            at += size
        return data

    def write(self, sequence: int, where: Range, data: NDArray[np.uint8]) -> None:
        """Put bytes from `read` into the range's cells. Raises StateError if they are of another form."""
        at = 0
        for section in self._sections(where):
            body = at + len(section.header)
            end = body + section.tensor.row_bytes * where.count
            if end > len(data) or data[at:body].tobytes() != section.header:
                raise StateError("the state was written with other cells, layers or types")
            self._transfer(section.tensor, sequence, where, data[body:end], out=False)
            at = end
        if at != len(data):
            raise StateError(f"the state has {len(data) - at} bytes too many")

    def key_row(self, sequence: int, layer: int, cell: int) -> NDArray[np.float32]:
        """The key of one cell of an f32 or f16 cache, float32 [numbers]."""
        keys = self._keys[layer]
        kind = np.float32 if keys.type_id == llama.GGML_TYPE_F32 else np.float16
        row = np.empty(keys.width, kind)
        offset = (sequence * keys.cells + cell) * keys.row_bytes
        api.tensor_get(keys.pointer, row.ctypes.data, offset, row.nbytes)
        return row.astype(np.float32)

    @property
    def readable_layers(self) -> list[int]:
        """The layers whose keys are f32 or f16."""
        return [layer for layer, keys in self._keys.items() if keys.type_id in _TURNABLE]

    def _rope(self, keys: CacheTensor) -> RopeNode | None:
        """The rotation that keys of this layer take part in, None if they do not follow the base."""
        return self._ropes[keys.rope] if keys.rope in self._follows and keys.rope is not None else None

    def _turn(self, layer: int) -> Turn | None:
        """How keys of this layer are turned, None if they do not follow the base."""
        rope = self._rope(self._keys[layer])
        if rope is None:
            return None
        multipliers = self._multipliers[layer] if self._multipliers else (1.0,)
        return Turn(rope, multipliers[:1] if len(set(multipliers)) == 1 else multipliers)

    def _sections(self, where: Range) -> Iterator[_Section]:
        transposed = any(values.transposed for values in self._values.values())
        cells = b"".join(struct.pack("<iIi", where.start + index, 1, 0) for index in range(where.count))
        begin = struct.pack("<IIII", MAGIC, 0, 1, where.count) + cells
        begin += struct.pack("<II", transposed, len(self._keys))
        for keys in self._keys.values():
            yield _Section(begin + struct.pack("<iQ", keys.type_id, keys.row_bytes), keys)
            begin = b""
        for values in self._values.values():
            if values.transposed:
                element = values.row_bytes // values.width
                header = struct.pack("<iII", values.type_id, element, values.width)
            else:
                header = struct.pack("<iQ", values.type_id, values.row_bytes)
            yield _Section(header, values)

    @staticmethod
    def _transfer(tensor: CacheTensor, sequence: int, where: Range, data: NDArray[np.uint8], *, out: bool) -> None:
        """Read (`out`) or write the range's numbers of one tensor."""
        address, row = data.ctypes.data, tensor.row_bytes
        if not tensor.transposed:
            function = api.tensor_get if out else api.tensor_set
            function(tensor.pointer, address, (sequence * tensor.cells + where.cell) * row, len(data))
            return
        element = row // tensor.width
        function = api.tensor_get_2d if out else api.tensor_set_2d
        function(
            tensor.pointer,
            address,
            sequence * tensor.cells * row + where.cell * element,
            where.count * element,
            tensor.width,
            tensor.cells * element,
            where.count * element,
        )


def _elsewhere() -> NativeError:
    return NativeError("llama.cpp keeps a token elsewhere than at its position", "use `engine=contexts`")
