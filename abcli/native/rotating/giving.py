"""Keys and values of some tokens, given from one sequence of a fused context to others, the keys turned.

Layers whose tensors lie at equal distances are copied and turned as one tensor: a graph for a few tokens takes as long
as it has operations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import llama_cpp.llama_cpp as llama
import numpy as np

from abcli.native import ggml_api as api
from abcli.native.ggml_api import TensorStruct
from abcli.native.rotating.devices import ALIGNMENT, Device, DeviceGraph
from abcli.native.rotating.graph import CacheTensor, RopeNode

# Room for keys that are being turned; so many tokens at once as fit in are given by one graph.
_SCRATCH_BYTES = 8 << 20
# What one stack needs: for being read, and for being written to one target.
_TENSORS = 8


@dataclass(frozen=True)
class Range:
    """The tokens at positions `start` to `start + count`, in the cells from `cell` on."""

    start: int
    count: int
    cell: int


@dataclass(frozen=True)
class Stack:
    """Tensors of one form, of a layer each, `step` bytes apart in one buffer; the first lies at `address`.

    `rope` is the rotation that keys take part in; None for what is not turned.
    """

    form: CacheTensor
    rope: RopeNode | None
    buffer: int
    address: int
    layers: int
    step: int

    def continues(self, other: Stack) -> bool:
        """Whether this, of one layer, lies where the next layer of `other` would."""
        alike = (self.form, self.rope, self.buffer) == (other.form, other.rope, other.buffer)
        return alike and (other.layers == 1 or self.address == other.address + other.layers * other.step)

    def view(self, context: int, stream: int, where: Range, type_id: int) -> int:
        """A tensor over a range of one stream in all layers: [numbers of a layer, layers], of type `type_id`.

        Transposed values are [cells, width, layers], of their own type.
        """
        form = self.form
        element = form.row_bytes // form.width if form.transposed else int(api.row_size(type_id, 1))
        kind = form.type_id if form.transposed else type_id
        stream_bytes = form.cells * form.row_bytes
        whole = (self.layers - 1) * self.step + form.streams * stream_bytes
        vector = api.new_1d(context, kind, whole // element)
        api.check(api.place(self.buffer, vector, self.address))
        if form.transposed:
            shape = (where.count, form.width, self.layers, 1)
            steps = (form.cells * element, self.step, self.step * self.layers)
            offset = stream * stream_bytes + where.cell * element
        else:
            shape = (where.count * form.row_bytes // element, self.layers, 1, 1)
            steps = (self.step, self.step * self.layers, self.step * self.layers)
            offset = stream * stream_bytes + where.cell * form.row_bytes
        return _initialised(api.view_4d(context, vector, *shape, *steps, offset))


def stack_up(tensors: Iterable[tuple[CacheTensor, RopeNode | None]]) -> list[Stack]:
    """The caches of layers, with the rotation of each, as few stacks."""
    stacks: list[Stack] = []
    natives = [(TensorStruct.from_address(tensor.pointer), tensor, rope) for tensor, rope in tensors]
    for native, tensor, rope in sorted(natives, key=lambda item: item[0].data):
        form = replace(tensor, pointer=0, rope=None)
        new = Stack(form, rope, native.buffer, native.data, 1, form.streams * form.cells * form.row_bytes)
        for number, last in enumerate(stacks):
            if new.continues(last):
                step = last.step if last.layers > 1 else new.address - last.address
                stacks[number] = replace(last, layers=last.layers + 1, step=step)
                break
        else:
            stacks.append(new)
    return stacks


@dataclass(frozen=True)
class Gift:
    """What sequence `source`, under `base`, gives to `targets`, sequences with their bases.

    All of them hold the range in the same cells.
    """

    source: int
    base: float
    targets: Mapping[int, float]
    where: Range


class Giver:
    """Gives what the layers on one device hold."""

    def __init__(self, device: Device, stacks: Sequence[Stack]) -> None:
        """The device owns the memory that is needed, which is had when something is given."""
        self._device = device
        self._stacks = stacks
        turning = [stack for stack in stacks if stack.rope is not None]
        self._token_bytes = sum(stack.layers * stack.form.row_bytes for stack in turning)
        self._layers = max((stack.layers for stack in turning), default=1)
        self._scratch = self._scratch_bytes = self._used = 0

    def give(self, gift: Gift) -> None:
        """Copy the keys, turned to each target's base, and values. Raises NativeError."""
        copies = len(gift.targets) + 1
        size = copies * self._token_bytes + 4 * self._layers
        spare = (copies * len(self._stacks) + 1) * ALIGNMENT
        most = max(1, _SCRATCH_BYTES // size)
        if self._scratch_bytes < most * size + spare:
            self._scratch_bytes = most * size + spare
            self._scratch = self._device.memory(self._scratch_bytes)
        tensors = _TENSORS * len(self._stacks) * copies + 1
        where = gift.where
        for first in range(0, where.count, most):
            piece = Range(where.start + first, min(most, where.count - first), where.cell + first)
            build = partial(self._build, replace(gift, where=piece))
            with DeviceGraph(self._device.backend, tensors, build) as graph:
                graph.compute()

    def _build(self, gift: Gift, context: int) -> list[int]:
        self._used = 0
        where = gift.where
        numbers = np.tile(np.arange(where.start, where.start + where.count, dtype=np.int32), self._layers)
        positions = self._placed(api.new_1d(context, llama.GGML_TYPE_I32, len(numbers)))
        api.tensor_set(positions, numbers.ctypes.data, 0, numbers.nbytes)
        results = []
        for stack in self._stacks:
            turned = {target: base for target, base in gift.targets.items() if stack.rope and base != gift.base}
            if stack.rope is not None and turned:
                results += self._turned(context, stack, stack.rope, replace(gift, targets=turned), positions)
            # What is copied as it is counts as numbers of 16 bits, whatever it is.
            kind = llama.GGML_TYPE_F16
            for target in gift.targets.keys() - turned.keys():
                views = (stack.view(context, stream, where, kind) for stream in (gift.source, target))
                results.append(_initialised(api.copy(context, *views)))
        return results

    def _turned(self, context: int, stack: Stack, rope: RopeNode, gift: Gift, positions: int) -> list[int]:
        """The operations that write the source's keys, turned, to the targets' cells."""
        form, where = stack.form, gift.where
        count = stack.layers * where.count
        source = stack.view(context, gift.source, where, form.type_id)
        rows = self._placed(api.new_3d(context, form.type_id, form.width * where.count, stack.layers, 1))
        rows = _initialised(api.copy(context, source, rows))
        heads = _initialised(api.reshape_3d(context, rows, rope.width, form.width // rope.width, count))
        mode = api.MODE_NEOX if rope.parameters.neox else api.MODE_NORMAL
        places = _initialised(api.view_4d(context, positions, count, 1, 1, 1, 4 * count, 4 * count, 4 * count, 0))
        results = []
        for target, base in gift.targets.items():
            angles = self._device.inverse_angles((rope.parameters, gift.base, base))
            dimensions = rope.parameters.dimensions
            new = api.rope(context, heads, places, angles, dimensions, mode, 0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0)
            new = api.reshape_3d(context, self._placed(new), form.width * where.count, stack.layers, 1)
            view = stack.view(context, target, where, form.type_id)
            results.append(_initialised(api.copy(context, _initialised(new), view)))
        return results

    def _placed(self, tensor: int) -> int:
        """A tensor, which now lies in the scratch memory behind those that do already."""
        api.check(api.place(self._scratch, tensor, api.buffer_base(self._scratch) + self._used))
        self._used += -(-int(api.tensor_bytes(tensor)) // ALIGNMENT) * ALIGNMENT
        return int(tensor)


def _initialised(view: int) -> int:
    """A view, which now lies where its source does."""
    api.check(api.view_init(view))
    return int(view)
