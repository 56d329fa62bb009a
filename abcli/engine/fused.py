"""A backend of one context: every bucket of every slot in one batch, so that the weights are read once per token."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial

import numpy as np
from numpy.typing import NDArray

from abcli.config import Buckets, ContextConfig, MergeRule
from abcli.engine.backend import TILED_TOKENS, Part, Sharing
from abcli.engine.workers import available_cores, run_all
from abcli.errors import UnsupportedModelError
from abcli.native.compute_thread import compute_thread
from abcli.native.llama import CancelFlag, version
from abcli.native.model import Model
from abcli.native.owner import Owner
from abcli.native.rotating.context import FusedContext, SlotPart
from abcli.rope.bases import nearest_base

_HINT = "use `engine=contexts` with this model"
_EXPERTS_KEY = "expert_count"
# A further batch takes as long as about so many further tokens of prompts in the same one (135M, Q8_0, 2 cores: 20).
_BATCH_ROWS = 16
# The same for rows of decoding: of idle slots so many are computed along. A device reads the weights meanwhile; CPUs
# compute row by row (135M, 2 cores: a batch costs as much as half a row of Q4_1, and two of Q8_0).
_IDLE_ROWS, _IDLE_ROWS_CPU = 16, 1


class FusedBackend(Owner):
    """Implements `Backend` with one context whose rows are turned to each bucket's base as they are computed."""

    def __init__(self, model: Model, config: ContextConfig, buckets: Buckets) -> None:
        """Make the context; the model stays the caller's and must outlive the backend.

        Raises UnsupportedModelError for a model that it cannot serve, with the reason, and NativeError if the context
        cannot be made.
        """
        self.buckets = len(buckets.bases)
        check_servable(model, config, self.buckets)
        self.cancel = CancelFlag()
        self._slot_cells = config.context_size
        self._dropped: NDArray[np.float32] = np.empty((self.buckets, model.vocabulary_size), np.float32)
        # Slots in which it is yet to be proved that cells lie where shared keys were put, and those in which it is:
        # what is appended there lies behind.
        self._unproved: set[int] = set()
        self._proved: set[int] = set()
        with ExitStack() as stack:

            def make() -> None:
                self.leader, self._context, self.sharing = _open(model, config, buckets, self.cancel)
                stack.callback(self._context.close)

            self._run(make)
            self.bases = self._context.bases
            self.native = nearest_base(self.bases, model.checked.header.native_base)
            self.turning = self._context.turning_note
            scaling = repr([rope.parameters for rope in self._context.observation.ropes])
            self.cell_format = (scaling, f"{version()}, all layers in one cache")
            self._piece = min(self._context.batch_size, self._context.ubatch_size)
            on_cpu = all(device.is_cpu for device in self._context.devices.opened)
            self._idle_rows = _IDLE_ROWS_CPU if on_cpu else _IDLE_ROWS
            self.outputs = min(config.outputs, self.piece(self.buckets), TILED_TOKENS - 1)
            self.native_outputs = min(config.outputs * self.buckets, self._piece, TILED_TOKENS - 1)
            self._stack = stack.pop_all()

    def piece(self, columns: int) -> int:
        """See `Backend.piece`."""
        return max(1, self._piece // columns)

    def compute(
        self, parts: Sequence[Part], columns: Sequence[int], merge: MergeRule | None = None
    ) -> Mapping[int, float]:
        """See `Backend.compute`."""
        # A batch is kept in one piece only for ascending sequences without gaps.
        parts = sorted(parts, key=lambda part: part.slot)
        if all(len(part.tokens) == 1 and part.logits is not None for part in parts):
            unproved = self._unproved.intersection(part.slot for part in parts)
            batches = self._context.neighbours(columns)
            agreements: dict[int, float] = {}
            for neighbours in batches:
                rule = merge if len(batches) == 1 else None
                agreements |= self._compute_rows(parts, columns, neighbours, rule, careful=bool(unproved))
            self._unproved -= unproved
            self._proved |= unproved
            return agreements
        unproved = self._unproved.intersection(part.slot for part in parts if part.outputs)
        groups = _alike(parts, self._piece, self._slot_cells) if self.buckets == 1 else ([part] for part in parts)
        for group in groups:
            batch = [SlotPart(part.slot, part.position, part.tokens) for part in group]
            rows = [part.logits for part in group if part.logits is not None]
            if len(group) > 1:
                self._run(partial(self._context.compute_side_by_side, batch, [row[0] for row in rows]))
                continue
            for neighbours in self._context.neighbours(columns):
                logits = [_rows_of(row, columns, neighbours) for row in rows] or None
                careful = list(columns) == [self.leader] or not unproved.isdisjoint(part.slot for part in group)
                self._run(partial(self._context.compute, batch, neighbours, logits, careful=careful))
        self._unproved -= unproved
        self._proved |= unproved
        return {}

    def share(self, slot: int, source: int, targets: Sequence[int], start: int, tokens: Sequence[int]) -> None:
        """See `Backend.share`."""
        if slot not in self._proved:
            self._unproved.add(slot)
        self._run(partial(self._context.share, slot, source, targets, start, tokens))

    def length(self, slot: int, column: int) -> int:
        """See `Backend.length`."""
        return self._context.length(self._context.sequence(slot, column))

    def truncate(self, slot: int, length: int, columns: Sequence[int] | None = None) -> bool:
        """See `Backend.truncate`."""
        self._proved.discard(slot)
        asked = range(len(self.bases)) if columns is None else columns
        sequences = [self._context.sequence(slot, column) for column in asked]
        # Every sequence is asked: a generator would stop at the first refusal and leave the others longer.
        return all([self._context.truncate(sequence, length) for sequence in sequences])  # noqa: C419

    def copy(self, source: int, target: int) -> None:
        """See `Backend.copy`."""
        self._proved.discard(target)
        self._context.copy_slot(source, target)

    def read_cells(self, slot: int, start: int, end: int) -> NDArray[np.uint8]:
        """See `Backend.read_cells`."""
        return self._context.read_cells(slot, self.leader, start, end)

    def append_cells(self, slot: int, start: int, tokens: Sequence[int], data: NDArray[np.uint8]) -> None:
        """See `Backend.append_cells`."""
        self._run(partial(self._context.write_cells, slot, self.leader, start, tokens, data))

    def _compute_rows(
        self,
        parts: Sequence[Part],
        columns: Sequence[int],
        neighbours: Sequence[int],
        merge: MergeRule | None,
        *,
        careful: bool,
    ) -> dict[int, float]:
        """Compute those of `columns` that are `neighbours`.

        Neighbouring slots go into one batch; idle ones between them, where few, get a token that is dropped again.
        """
        merged: dict[int, float] = {}
        rows = {part.slot: part for part in parts}
        between = [slot for slot in range(parts[0].slot, parts[-1].slot) if slot not in rows]
        lengths = {slot: {self.length(slot, column) for column in neighbours} for slot in between}
        # A slot that was decoded by the native bucket alone has columns of two lengths.
        idle = {
            slot: Part(slot, max(length), parts[0].tokens, list(self._dropped[: len(columns)]))
            for slot, length in lengths.items()
            if len(length) == 1 and max(length) < self._slot_cells
        }
        limit = self.piece(len(neighbours)) if self._context.slots_follow(neighbours) else 1
        for slots in _runs(list(rows), limit, idle, self._idle_rows // len(neighbours)):
            group = [rows.get(slot) or idle[slot] for slot in slots]
            self._run(partial(self._compute_batch, group, columns, neighbours, merge, merged, careful=careful))
            for slot in idle.keys() & set(slots):
                self.truncate(slot, idle[slot].position, neighbours)
        return merged

    def _compute_batch(
        self,
        group: Sequence[Part],
        columns: Sequence[int],
        neighbours: Sequence[int],
        merge: MergeRule | None,
        merged: dict[int, float],
        *,
        careful: bool,
    ) -> None:
        """Compute single tokens of neighbouring slots; the agreements of those that are merged go to `merged`."""
        batch = [SlotPart(part.slot, part.position, part.tokens) for part in group]
        wanted = [part.logits for part in group if part.logits is not None]
        logits = [_rows_of(rows, columns, neighbours) for rows in wanted]
        agreements = self._context.compute(batch, neighbours, logits, careful=careful, merge=merge)
        if agreements is not None:
            merged.update(zip((part.slot for part in group), agreements, strict=True))
            # A bucket that is set apart is the last one of the batch, but may be the first one of the slot.
            for rows, computed in zip(wanted, logits, strict=True):
                rows[0][:] = computed[0]

    def _run(self, job: Callable[[], object]) -> None:
        """Run `job` on the thread that computes, unless a cancellation came before."""
        run_all(compute_thread(), lambda _index: job(), 1, self.cancel)


def check_servable(model: Model, config: ContextConfig, buckets: int) -> None:
    """Raise UnsupportedModelError, with the reason, for a model that one batch cannot serve under several bases."""
    if model.is_recurrent:
        reason = "keeps a recurrent state, of which the buckets of one batch cannot drop a part"
    elif model.has_rope and model.rotation is None:
        reason = "has positions of several parts (M-RoPE)"
    elif model.checked.header.compresses_keys:
        reason = "keeps compressed keys and values (MLA)"
    elif buckets > 1 and not model.has_rope:
        reason = "does not use RoPE, so there is no base to vary"
    elif buckets > min(config.ubatch_size, config.batch_size):
        raise UnsupportedModelError(
            f"{buckets} buckets do not fit into a batch of {min(config.ubatch_size, config.batch_size)} tokens",
            "ask for larger batches (`batch_size`, `ubatch_size`) or fewer buckets",
        )
    else:
        return
    raise UnsupportedModelError(f"{model.path} ({model.architecture}) {reason}", _HINT)


def _open(
    model: Model, config: ContextConfig, buckets: Buckets, cancel: CancelFlag
) -> tuple[int, FusedContext, Sharing]:
    """The leader's column, the context, and how prompts are computed."""
    bases, base, threads = buckets.bases, buckets.prefill_base, config.threads or available_cores()
    exact = config.prefill == "exact" or len(bases) == 1
    extra = None
    if base not in bases:
        base, extra = (bases[0], None) if exact else (base, base)
    native_base = model.checked.header.native_base
    columns = bases if extra is None else (*bases, extra)
    apart = nearest_base(columns, native_base) if config.gated else None
    context = FusedContext(model, bases, config, base, threads, cancel, extra, apart)
    leader = len(bases) if extra is not None else bases.index(base)
    if exact:
        return leader, context, Sharing(False)
    with ExitStack() as stack:
        stack.push(context)
        obstacle = _experts_obstacle(model, context) or context.prove_sharing(leader)
        if not obstacle or extra is None:
            stack.pop_all()
    if not obstacle:
        return leader, context, Sharing(True, f"at base {base:g}; {context.turning_layers} layers follow the base")
    if extra is not None:
        apart = nearest_base(bases, native_base) if config.gated else None
        leader, context = 0, FusedContext(model, bases, config, bases[0], threads, cancel, None, apart)
    return leader, context, Sharing(False, obstacle)


def _experts_obstacle(model: Model, context: FusedContext) -> str:
    """Why the choice of experts keeps a prompt from being shared; empty if it does not."""
    if model.checked.header.integer(_EXPERTS_KEY) and not context.leaves_out_whole_graphs:
        # What was not computed leaves the choice undefined, and llama.cpp reads it to copy weights.
        return "the model has experts, and a graph cannot be left out as a whole"
    return ""


def _rows_of(
    logits: Sequence[NDArray[np.float32]], columns: Sequence[int], chosen: Sequence[int]
) -> list[NDArray[np.float32]]:
    """Those of `logits`, which are of `columns`, that are of the columns `chosen`, in their order."""
    return [logits[columns.index(column)] for column in chosen]


def _alike(parts: Sequence[Part], limit: int, slot_cells: int) -> Iterator[list[Part]]:
    """Neighbouring slots whose parts are so near in length that filling them up costs less than more batches.

    At most `limit` tokens a group when filled up, and each slot has room for that.
    """
    group: list[Part] = []
    longest = 0
    for part in parts:
        length = len(part.tokens)
        wide = max(longest, length)
        rows = wide * (len(group) + 1)
        fits = rows <= limit and all(other.position + wide <= slot_cells for other in (*group, part))
        near = rows <= longest * len(group) + length + _BATCH_ROWS and (longest < TILED_TOKENS) == (
            length < TILED_TOKENS
        )
        if group and not (part.slot == group[-1].slot + 1 and fits and near):
            yield group
            group, wide = [], length
        group.append(part)
        longest = wide
    yield group


def _runs(slots: Sequence[int], limit: int, fillers: Container[int], widest: int) -> Iterator[list[int]]:
    """Ascending slots as runs without gaps, at most `limit` long; gaps of up to `widest` `fillers` are filled."""
    run: list[int] = []
    for slot in slots:
        gap = range(run[-1] + 1, slot) if run else range(0)
        fits = len(run) + len(gap) < limit
        if run and not (fits and len(gap) <= widest and all(filler in fillers for filler in gap)):
            yield run
            run, gap = [], range(0)
        run += [*gap, slot]
    if run:
        yield run
