"""One llama.cpp context for all buckets: a sequence per slot and bucket, each under its own RoPE base.

llama.cpp rotates queries and keys of the whole batch by the context's base; the rows of every bucket are turned on from
there to its own base (`abcli.native.rotating.turning`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import log
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.config import ContextConfig, MergeRule
from abcli.errors import UnsupportedModelError
from abcli.native.context import BatchPart, Sequences, context_parameters
from abcli.native.ggml_api import check_tensor_layout
from abcli.native.llama import CancelFlag
from abcli.native.model import Model
from abcli.native.rotating.callback import ByCallback
from abcli.native.rotating.cells import DeviceCache
from abcli.native.rotating.devices import Devices
from abcli.native.rotating.following import following_rotations
from abcli.native.rotating.giving import Gift, Range
from abcli.native.rotating.graph import Observation, Observer
from abcli.native.rotating.hook import hook_obstacle
from abcli.native.rotating.keys import PROBE_POSITION, agree
from abcli.native.rotating.mixing import LogitsMixer
from abcli.native.rotating.tables import Layout, Tables
from abcli.native.rotating.turning import InGraph, Turning, Visit

# llama.cpp's LLAMA_MAX_SEQ.
MAX_SEQUENCES = 256
# llama.cpp pads the cells of a sequence to a multiple of this.
_CELL_STEP = 256
# So many tokens get their cells faster one by one than by llama.cpp's copying, for which it plans all graphs anew
# (135M, 2 cores: 0.1 ms each, and 15 ms).
_FEW_TOKENS = 32


@dataclass(frozen=True)
class SlotPart:
    """Tokens that continue `slot` at `position`."""

    slot: int
    position: int
    tokens: Sequence[int]


class FusedContext(Sequences):
    """Owns one `llama_context` with a sequence for each slot under each base.

    llama.cpp computes sequences together if their numbers have no gaps: those of the buckets of neighbouring slots have
    none, nor have those of columns that are computed alone. These are the leader, if there is one, which has the column
    after the buckets, and a bucket that is set apart.
    """

    def __init__(
        self,
        model: Model,
        bases: Sequence[float],
        config: ContextConfig,
        base: float,
        threads: int,
        cancel: CancelFlag,
        leader: float | None = None,
        apart: int | None = None,
    ) -> None:
        """`bases` are the buckets', `base` the context's own: equal bases cost nothing.

        Raises UnsupportedModelError for a model whose rotations cannot be varied within a batch, NativeError if
        llama.cpp cannot make the context.
        """
        check_tensor_layout()
        self.bases = (*bases, *([] if leader is None else [leader]))
        self.buckets = len(bases)
        together = [column for column in range(self.buckets) if column != apart]
        blocks = [together, *([column] for column in range(len(self.bases)) if column not in together)]
        # Of each column: its sequence in slot 0, and how far it is to that in the next slot.
        self._places: dict[int, tuple[int, int]] = {}
        for block in blocks:
            first = config.slots * len(self._places)
            self._places |= {column: (first + index, len(block)) for index, column in enumerate(block)}
        self._threads = threads
        sequences = config.slots * len(self.bases)
        if sequences > MAX_SEQUENCES:
            raise UnsupportedModelError(
                f"{config.slots} slots with {len(self.bases)} buckets are {sequences} sequences, but llama.cpp's batch "
                f"takes {MAX_SEQUENCES}",
                "use fewer slots or buckets, or `engine=contexts`",
            )
        cells = -(-config.context_size // _CELL_STEP) * _CELL_STEP
        self._slot_cells = cells
        parameters = context_parameters(model, base, config, threads, cancel)
        parameters.n_ctx = cells * sequences
        parameters.n_seq_max = sequences
        parameters.n_outputs_max = max(sequences, config.outputs * self.buckets)
        # Each sequence attends to its own cells only: in a pool it would pass over those of all others.
        parameters.kv_unified = False
        self._token = model.vocabulary_size // 2
        self.follows: frozenset[int] = frozenset()
        self._untuned: Observation | None = None
        obstacle = hook_obstacle()
        turns = any(other != base for other in self.bases)
        if turns:
            self.follows, self._untuned, obstacle = following_rotations(model, config, base, cancel, obstacle)
        self._open(model, parameters, base, cancel, obstacle)
        with ExitStack() as stack:
            stack.callback(self.close)
            if turns and not obstacle and (obstacle := self._wrong_turn()):
                self.close()
                self._open(model, parameters, base, cancel, obstacle)
            stack.pop_all()
        # Whether what only needs cells computes nothing at all, or the first node of a graph.
        self.leaves_out_whole_graphs = not obstacle
        where = f"by callback: {obstacle}" if obstacle else "inside llama.cpp's graph"
        self.turning_note = f"rows are turned {where}" if turns else ""

    def _open(self, model: Model, parameters: Any, base: float, cancel: CancelFlag, obstacle: str) -> None:
        """Make the context; `obstacle` says why rows cannot be turned inside the graph."""
        multipliers = model.checked.tuning.multipliers
        if self.follows and obstacle and multipliers:
            reason = f"rows of heads with bases of their own are turned inside the graph only: {obstacle}"
            raise UnsupportedModelError(reason, "use `engine=contexts`")
        with ExitStack() as stack:
            # A graph may be reserved for as many rows as make whole sequences.
            rows = parameters.n_ubatch + parameters.n_seq_max
            self.devices = stack.enter_context(Devices())
            tables = Tables(self.devices, base, rows, multipliers) if self.follows else None
            way: Turning = ByCallback(base, tables, self.devices) if obstacle else InGraph(base, tables)
            stack.callback(way.close)
            self._stack = ExitStack()
            try:
                way.make(parameters, lambda: super(FusedContext, self).__init__(model, parameters, cancel))
            finally:
                # The context goes first: its graphs hold what the others own.
                stack.push(self._stack.pop_all())
            self.base = base
            self._way, self._tables = way, tables
            # Whether llama.cpp has yet to copy streams: those that it must not, or those that it must.
            self._mirrored = self._copied = False
            self._mixer = stack.enter_context(LogitsMixer(self.devices, self.buckets, model.vocabulary_size))
            self.observation = self._observe()
            self._cells = DeviceCache(self.observation, self.follows, self.devices, multipliers)
            self._stack = stack.pop_all()

    def sequence(self, slot: int, column: int) -> int:
        """The sequence of a slot's bucket, or of its leader (the column after the buckets)."""
        first, step = self._places[column]
        return first + slot * step

    def neighbours(self, columns: Sequence[int]) -> list[list[int]]:
        """`columns` in groups whose sequences of one slot have no gaps, in the order of the sequences."""
        groups: list[list[int]] = []
        for column in sorted(columns, key=lambda column: self.sequence(0, column)):
            if groups and self.sequence(0, column) == self.sequence(0, groups[-1][-1]) + 1:
                groups[-1].append(column)
            else:
                groups.append([column])
        return groups

    def slots_follow(self, columns: Sequence[int]) -> bool:
        """Whether `columns`, a group of neighbours, have no gaps from slot to slot either."""
        return self.sequence(1, columns[0]) == self.sequence(0, columns[-1]) + 1

    def compute(
        self,
        parts: Sequence[SlotPart],
        columns: Sequence[int],
        logits: Sequence[Sequence[NDArray[np.float32]]] | None,
        *,
        careful: bool = False,
        merge: MergeRule | None = None,
    ) -> list[float] | None:
        """Compute `parts` in each of `columns`, as one batch; part i's logits go to `logits[i]`, an array per column:
        [vocab] for those after its last token, [n, vocab] for those after its last n.

        With `merge`, and on a device that can, only the merged logits go to the first row of `logits[i]`: the parts'
        agreements are then returned, else None.

        Several parts have one token each and neighbouring slots in ascending order; `columns` are neighbours.
        At most `ubatch_size` tokens in all columns together. `careful` proves that the keys go where they are
        expected. Raises as `Sequences.decode` does; the caller then truncates.
        """
        tokens = range(len(parts[0].tokens))
        rows = [None if logits is None else logits[i][j] for i in range(len(parts)) for j in range(len(columns))]
        places = [(part, column) for part in parts for column in columns]
        batch = [
            BatchPart(self.sequence(part.slot, column), part.position, part.tokens, output=_count(row))
            for (part, column), row in zip(places, rows, strict=True)
        ]
        turned = self._turned_rows(columns, len(parts) * len(tokens))
        visit = None
        if turned or careful:
            positions = np.array([part.position + index for part in batch for index in tokens], np.int32)
        if turned and self._tables is not None:
            self._synchronize()
            bases = tuple(self.bases[column] for column in columns)
            self._tables.fill(Layout(bases, len(parts), len(tokens)), positions)
        if careful:
            visit = self._cells.check(np.repeat([part.sequence for part in batch], len(tokens)), positions)
        stay = merge is not None and len(columns) == self.buckets and self._mixer.has_mixed(merge, len(parts))
        self._run(lambda: self.decode(batch), turned, visit, stay=stay)
        if merge is not None and logits is not None:
            self._synchronize()
            agreements = self._mixer.mix(self._way.logits, merge, [part[0] for part in logits])
            if agreements is not None:
                return agreements
            self._way.fetch()
        self.fetch(rows)
        return None

    def compute_side_by_side(self, parts: Sequence[SlotPart], logits: Sequence[NDArray[np.float32]]) -> None:
        """Compute `parts` of a context with one bucket as one batch; the logits of part i go to `logits[i]`.

        The slots are neighbours in ascending order. llama.cpp computes sequences of equal length together: shorter
        parts are filled up with tokens that are dropped again, so that every slot needs room for the longest part,
        and `ubatch_size` for as many of these as there are parts. Raises as `compute` does.
        """
        longest = max(len(part.tokens) for part in parts)
        batch: list[BatchPart] = []
        rows: list[NDArray[np.float32] | None] = []
        for part, row in zip(parts, logits, strict=True):
            sequence, end = self.sequence(part.slot, 0), part.position + len(part.tokens)
            batch.append(BatchPart(sequence, part.position, part.tokens, output=_count(row)))
            rows.append(row)
            if missing := longest - len(part.tokens):
                batch.append(BatchPart(sequence, end, [self._token] * missing, output=False))
                rows.append(None)
        self._run(lambda: self.decode(batch, rows))
        for part in parts:
            self.truncate(self.sequence(part.slot, 0), part.position + len(part.tokens))

    def reserve(self, slot: int, columns: Sequence[int], position: int, tokens: Sequence[int]) -> None:
        """Give `tokens` cells in `columns`, which are neighbours, without computing them; at most `ubatch_size` in all.

        Their keys and values are undefined.
        """
        batch = [BatchPart(self.sequence(slot, column), position, tokens, output=False) for column in columns]
        turned = self._turned_rows(columns, len(tokens))
        self._run(lambda: self.decode(batch), turned, compute=False)

    def share(self, slot: int, source: int, targets: Sequence[int], position: int, tokens: Sequence[int]) -> None:
        """Append to the slot's columns `targets` what column `source` holds of `tokens`.

        The targets hold exactly the tokens before `position`. Raises NativeError; the caller then truncates.
        """
        end = position + len(tokens)
        if len(tokens) <= _FEW_TOKENS or self._way.copies is None:
            # A few go one by one: llama.cpp keeps the graph, which then computes the token that follows.
            size = 1 if len(tokens) <= _FEW_TOKENS else self.ubatch_size
            for start in range(0, len(tokens), size):
                self._reserve_each(slot, targets, position + start, tokens[start : start + size])
        else:
            if self._copied:
                self._settle(slot, targets[0], position)
            # llama.cpp gives a target the cells of the source, and would copy all that they hold before it computes.
            self._mirrored = True
            for target in targets:
                sequence = self.sequence(slot, target)
                llama.llama_memory_seq_cp(self._memory, self.sequence(slot, source), sequence, -1, -1)
                self.truncate(sequence, end)
        self._give(slot, source, targets, Range(position, len(tokens), position))

    def _reserve_each(self, slot: int, columns: Sequence[int], position: int, tokens: Sequence[int]) -> None:
        """Reserve in as many columns at once as one batch has room for."""
        most = max(1, self.ubatch_size // len(tokens))
        for group in self.neighbours(columns):
            for first in range(0, len(group), most):
                self.reserve(slot, group[first : first + most], position, tokens)

    def _settle(self, slot: int, column: int, position: int) -> None:
        """Let llama.cpp do the copies that it has put off; the column ends at `position` and has room for a token."""
        self.reserve(slot, [column], position, (self._token,))
        self.truncate(self.sequence(slot, column), position)

    def _run(self, decode: Callable[[], None], rows: int = 0, visit: Visit | None = None, **how: bool) -> None:
        """Compute a batch; see `Turning.run`. What llama.cpp had put off is then done."""
        if self._way.copies is not None:
            self._way.copies = not self._mirrored
        self._way.run(decode, rows, visit, **how)
        self._mirrored = self._copied = False

    def prove_sharing(self, source: int) -> str:
        """Why `share` from column `source` would not give llama.cpp's own keys; empty if it does.

        One token alone in its sequence attends to nothing else, so that its keys differ between two bases by the
        rotation alone, in every layer.
        """
        if self._cells.obstacle:
            return self._cells.obstacle
        others = [column for column in range(len(self.bases)) if column != source]
        target = max(others, key=lambda column: abs(log(self.bases[column] / self.bases[source])))
        where = Range(min(PROBE_POSITION, self._slot_cells - 1), 1, 0)
        part = SlotPart(0, where.start, (self._token,))
        try:
            self.compute([part], [target], None)
            wanted = self.keys_at(target, 0)
            self.truncate(self.sequence(0, target), 0)
            self.compute([part], [source], None)
            self.reserve(0, [target], where.start, part.tokens)
            self._give(0, source, [target], where)
            found = self.keys_at(target, 0)
        finally:
            for column in (source, target):
                self.truncate(self.sequence(0, column), 0)
        for layer, keys in wanted.items():
            if not agree(found[layer], keys):
                return f"the keys of layer {layer} do not follow the base as RoPE turns them"
        return ""

    @property
    def turning_layers(self) -> int:
        """The number of layers whose keys follow the base."""
        return self._cells.turning_layers

    def read_cells(self, slot: int, column: int, start: int, end: int) -> NDArray[np.uint8]:
        """The keys and values of the tokens start to end as bytes for `write_cells`, in the form of a state.

        Something must have been computed since a slot was copied.
        """
        self._synchronize()
        return self._cells.read(self.sequence(slot, column), Range(start, end - start, start))

    def write_cells(self, slot: int, column: int, start: int, tokens: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Append `tokens`, whose keys and values are `data`, to a sequence that holds `start` tokens.

        Raises StateError for bytes of another form; the caller then truncates.
        """
        self.reserve(slot, [column], start, tokens)
        self._cells.write(self.sequence(slot, column), Range(start, len(tokens), start), data)

    def _give(self, slot: int, source: int, targets: Sequence[int], where: Range) -> None:
        self._synchronize()
        self.devices.set_threads(self._threads)
        bases = {self.sequence(slot, target): self.bases[target] for target in targets}
        self._cells.give(Gift(self.sequence(slot, source), self.bases[source], bases, where))

    def keys_at(self, column: int, cell: int) -> dict[int, NDArray[np.float32]]:
        """The keys (float32 [numbers]) of one cell of slot 0 in each layer whose keys are f32 or f16."""
        self._synchronize()
        return {
            layer: self._cells.key_row(self.sequence(0, column), layer, cell) for layer in self._cells.readable_layers
        }

    def copy_slot(self, source: int, target: int) -> None:
        """Make slot `target` hold what slot `source` holds."""
        for column in range(len(self.bases)):
            new = self.sequence(target, column)
            llama.llama_memory_seq_rm(self._memory, new, -1, -1)
            if self._mirrored:
                self._settle(target, column, 0)
            llama.llama_memory_seq_cp(self._memory, self.sequence(source, column), new, -1, -1)
        self._copied = True

    def _turned_rows(self, columns: Sequence[int], tokens: int) -> int:
        """How many rows a batch of `tokens` tokens in each of `columns` turns: all or none.

        It depends on the sequences alone: llama.cpp computes a graph again for the same ones only.
        """
        turns = any(self.bases[column] != self.base for column in columns)
        return len(columns) * tokens if turns else 0

    def _synchronize(self) -> None:
        """Wait for what a device still computes: it may read the tables of angles and write cells."""
        llama.llama_synchronize(self._handle)

    def _observe(self) -> Observation:
        """The graph of one token, in a sequence whose rows are not turned."""
        observer = Observer()
        sequence = self.sequence(0, self.bases.index(self.base))
        part = BatchPart(sequence, 0, (self._token,), output=False)
        self._way.run(lambda: self.decode([part]), visit=observer.visit)
        self.truncate(sequence, 0)
        found = observer.result()
        return found if self._untuned is None else found.rotated_as(self._untuned)

    def _wrong_turn(self) -> str:
        """Why the keys that come out are not those of their base; empty if they are, or cannot be read.

        The keys of one token alone, under the context's base and another one, differ by the rotation alone.
        """
        source = self.bases.index(self.base)
        target = max(range(len(self.bases)), key=lambda column: abs(log(self.bases[column] / self.base)))
        part = SlotPart(0, min(PROBE_POSITION, self._slot_cells - 1), (self._token,))
        keys = []
        for column in (source, target):
            self.compute([part], [column], None)
            keys.append(self.keys_at(column, 0))
            self.truncate(self.sequence(0, column), 0)
        for layer, found in keys[1].items():
            wanted = self._cells.turned(layer, keys[0][layer], part.position, (self.base, self.bases[target]))
            if not agree(found, wanted):
                return f"the keys of layer {layer} came out wrong inside the graph"
        return ""


def _count(logits: NDArray[np.float32] | None) -> int:
    """Of how many tokens the logits go to an array: [vocab] or [n, vocab]."""
    return 0 if logits is None else len(np.atleast_2d(logits))
