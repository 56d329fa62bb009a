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
class Turn:
    """The rotation that keys take part in, and the factors on its base: one for each head, or for all."""

    rope: RopeNode
    multipliers: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Stack:
    """Tensors of one form, of a layer each, `step` bytes apart in one buffer; the first lies at `address`.

    `turn` is how keys are turned; None for what is not.
    """

    form: CacheTensor
    turn: Turn | None
    buffer: int
    address: int
    layers: int
    step: int

    def continues(self, other: Stack) -> bool:
        """Whether this, of one layer, lies where the next layer of `other` would."""
        alike = (self.form, self.turn, self.buffer) == (other.form, other.turn, other.buffer)
        return alike and (other.layers == 1 or self.address == other.address + other.layers * other.step)

    def view(
        self, context: int, stream: int, where: Range, type_id: int, head: int | None = None, width: int = 0
    ) -> int:
        """A tensor over a range of one stream in all layers: [numbers of a layer, layers], of type `type_id`.

        Transposed values are [cells, width, layers], of their own type. One `head` of `width` numbers is [width, cells,
        layers].
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
        elif head is not None:
            shape = (width, where.count, self.layers, 1)
            steps = (form.row_bytes, self.step, self.step * self.layers)
            offset = stream * stream_bytes + where.cell * form.row_bytes + head * width * element
        else:
            shape = (where.count * form.row_bytes // element, self.layers, 1, 1)
            steps = (self.step, self.step * self.layers, self.step * self.layers)
            offset = stream * stream_bytes + where.cell * form.row_bytes
        return _initialised(api.view_4d(context, vector, *shape, *steps, offset))


def stack_up(tensors: Iterable[tuple[CacheTensor, Turn | None]]) -> list[Stack]:
    """The caches of layers, with how each is turned, as few stacks."""
    stacks: list[Stack] = []
    natives = [(TensorStruct.from_address(tensor.pointer), tensor, turn) for tensor, turn in tensors]
    for native, tensor, turn in sorted(natives, key=lambda item: item[0].data):
        form = replace(tensor, pointer=0, rope=None)
        new = Stack(form, turn, native.buffer, native.data, 1, form.streams * form.cells * form.row_bytes)
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
        turning = [stack for stack in stacks if stack.turn is not None]
        self._token_bytes = sum(stack.layers * stack.form.row_bytes for stack in turning)
        self._layers = max((stack.layers for stack in turning), default=1)
        # Each head that is turned by itself counts as a stack.
        self._parts = sum(1 if stack.turn is None else len(stack.turn.multipliers) for stack in stacks)
        self._scratch = self._scratch_bytes = self._used = 0

    def give(self, gift: Gift) -> None:
        """Copy the keys, turned to each target's base, and values. Raises NativeError."""
        copies = len(gift.targets) + 1
        size = copies * self._token_bytes + 4 * self._layers
        spare = (copies * self._parts + 1) * ALIGNMENT
        most = max(1, _SCRATCH_BYTES // size)
        if self._scratch_bytes < most * size + spare:
            self._scratch_bytes = most * size + spare
            self._scratch = self._device.memory(self._scratch_bytes)
        tensors = _TENSORS * self._parts * copies + 1
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
            turned = {target: base for target, base in gift.targets.items() if stack.turn and base != gift.base}
            if stack.turn is not None and turned:
                results += self._turned(context, stack, stack.turn, replace(gift, targets=turned), positions)
            # What is copied as it is counts as numbers of 16 bits, whatever it is.
            kind = llama.GGML_TYPE_F16
            for target in gift.targets.keys() - turned.keys():
                views = (stack.view(context, stream, where, kind) for stream in (gift.source, target))
                results.append(_initialised(api.copy(context, *views)))
        return results

    def _turned(self, context: int, stack: Stack, turn: Turn, gift: Gift, positions: int) -> list[int]:
        """The operations that write the source's keys, turned, to the targets' cells."""
        form, where, rope = stack.form, gift.where, turn.rope
        count = stack.layers * where.count
        together = len(turn.multipliers) == 1
        heads = form.width // rope.width if together else 1
        dimensions, width = rope.parameters.dimensions, heads * rope.width
        shape = (width * where.count, stack.layers, 1) if together else (width, where.count, stack.layers)
        mode = api.MODE_NEOX if rope.parameters.neox else api.MODE_NORMAL
        places = _initialised(api.view_4d(context, positions, count, 1, 1, 1, 4 * count, 4 * count, 4 * count, 0))
        results = []
        for number, multiplier in enumerate(turn.multipliers):

            def cells(stream: int, head: int | None = None if together else number) -> int:
                return stack.view(context, stream, where, form.type_id, head, rope.width)

            rows = self._placed(api.new_3d(context, form.type_id, *shape))
            rows = _initialised(api.copy(context, cells(gift.source), rows))
            rows = _initialised(api.reshape_3d(context, rows, rope.width, heads, count))
            for target, base in gift.targets.items():
                key = (rope.parameters, gift.base * multiplier, base * multiplier)
                angles = self._device.inverse_angles(key)
                new = api.rope(context, rows, places, angles, dimensions, mode, 0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0)
                new = api.reshape_3d(context, self._placed(new), *shape)
                results.append(_initialised(api.copy(context, _initialised(new), cells(target))))
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
