"""One llama.cpp context for all buckets: a sequence per slot and bucket, each under its own RoPE base.

llama.cpp rotates queries and keys of the whole batch by the context's base. Right after each rotation, in its eval
callback, the rows of every bucket with another base are turned on by the difference, where they lie, by ggml's own
operator on the same device.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from math import log

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.config import ContextConfig
from abcli.errors import UnsupportedModelError
from abcli.native.context import BatchPart, Sequences, context_parameters
from abcli.native.ggml_api import check_tensor_layout
from abcli.native.llama import CancelFlag
from abcli.native.model import Model
from abcli.native.rotating.cells import DeviceCache, Range
from abcli.native.rotating.devices import Devices
from abcli.native.rotating.graph import Observation, Observer
from abcli.native.rotating.keys import PROBE_POSITION, agree
from abcli.native.rotating.turning import EvalCallback, Handler, Idle, Layout, Skip, Turning

# llama.cpp's LLAMA_MAX_SEQ.
MAX_SEQUENCES = 256
# llama.cpp pads the cells of a sequence to a multiple of this.
_CELL_STEP = 256
# Fewer rows than this are turned faster by one thread than by several that wait for each other.
_ROWS_PER_THREAD = 32
# Another base than the context's, to see which rotations follow the base.
_OTHER_BASE = 1.5


@dataclass(frozen=True)
class SlotPart:
    """Tokens that continue `slot` at `position`."""

    slot: int
    position: int
    tokens: Sequence[int]


class FusedContext(Sequences):
    """Owns one `llama_context` whose sequence `slot * buckets + bucket` holds a slot under a bucket's base.

    A leader, if there is one, has the column after the buckets and its sequences after all others, so that the
    buckets of neighbouring slots have sequences without gaps.
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
    ) -> None:
        """`bases` are the buckets', `base` the context's own: equal bases cost nothing.

        Raises UnsupportedModelError for a model whose rotations cannot be varied within a batch, NativeError if
        llama.cpp cannot make the context.
        """
        check_tensor_layout()
        self.bases = (*bases, *([] if leader is None else [leader]))
        self.buckets = len(bases)
        self._slots = config.slots
        self._threads = threads
        sequences = config.slots * len(self.bases)
        if sequences > MAX_SEQUENCES:
            raise UnsupportedModelError(
                f"{config.slots} slots with {len(self.bases)} buckets are {sequences} sequences, but llama.cpp's batch "
                f"takes {MAX_SEQUENCES}",
                "use fewer slots or buckets, or `engine=contexts`",
            )
        self._callback = EvalCallback()
        cells = -(-config.context_size // _CELL_STEP) * _CELL_STEP
        self._slot_cells = cells
        parameters = context_parameters(model, base, config, threads, cancel)
        parameters.n_ctx = cells * sequences
        parameters.n_seq_max = sequences
        parameters.n_outputs_max = sequences
        # Each sequence attends to its own cells only: in a pool it would pass over those of all others.
        parameters.kv_unified = False
        self._callback.install(parameters)
        super().__init__(model, parameters, cancel)
        self.base = base
        with ExitStack() as stack:
            stack.push(self._stack.pop_all())
            self._token = model.vocabulary_size // 2
            self.observation = self._observe()
            self.follows: frozenset[int] = frozenset()
            if any(other != base for other in self.bases):
                self.follows = _follows(model, config, base * _OTHER_BASE, cancel, self.observation)
                if not self.follows:
                    raise UnsupportedModelError("no rotation of the model follows the RoPE base", "use `buckets=1`")
            self.devices = stack.enter_context(Devices(self.ubatch_size))
            self._turning = Turning(self._handle, self._callback, base, self.observation, self.follows, self.devices)
            stack.callback(self._turning.close)
            self._cells = DeviceCache(self.observation, self.follows, self.devices)
            self._stack = stack.pop_all()

    def sequence(self, slot: int, column: int) -> int:
        """The sequence of a slot's bucket, or of its leader (the column after the buckets)."""
        if column < self.buckets:
            return slot * self.buckets + column
        return self._slots * self.buckets + slot

    def compute(
        self,
        parts: Sequence[SlotPart],
        columns: Sequence[int],
        logits: Sequence[NDArray[np.float32]] | None,
        *,
        careful: bool = False,
    ) -> None:
        """Compute `parts` in each of `columns`, as one batch; part i's logits go to `logits[i]` [columns, vocab].

        Several parts have one token each and neighbouring slots in ascending order; `columns` ascend without gaps.
        At most `ubatch_size` tokens in all columns together. `careful` proves that the keys go where they are
        expected. Raises as `Sequences.decode` does; the caller then truncates.
        """
        tokens = len(parts[0].tokens)
        batch = [
            BatchPart(self.sequence(part.slot, column), part.position, part.tokens, output=logits is not None)
            for part in parts
            for column in columns
        ]
        rows = [None if logits is None else logits[i][j] for i in range(len(parts)) for j in range(len(columns))]
        layout = Layout(tuple(self.bases[column] for column in columns), len(parts), tokens)
        handler: Handler = Idle()
        turns = any(base != self.base for base in layout.bases)
        if turns or careful:
            positions = np.array([[part.position + index for index in range(tokens)] for part in parts], np.int32)
            self._prepare(layout, batch, positions.ravel(), careful=careful)
            handler = self._turning
        else:
            self._turning.forget()
        self._callback.run(handler, lambda: self.decode(batch, rows))
        if handler is self._turning:
            self._turning.finish()

    def compute_side_by_side(self, parts: Sequence[SlotPart], logits: Sequence[NDArray[np.float32]]) -> None:
        """Compute `parts` of a context with one bucket as one batch; the logits [vocab] after part i go to `logits[i]`.

        The slots are neighbours in ascending order. llama.cpp computes sequences of equal length together: shorter
        parts are filled up with tokens that are dropped again, so that every slot needs room for the longest part,
        and `ubatch_size` for as many of these as there are parts. Raises as `compute` does.
        """
        longest = max(len(part.tokens) for part in parts)
        batch: list[BatchPart] = []
        rows: list[NDArray[np.float32] | None] = []
        for part, row in zip(parts, logits, strict=True):
            sequence, end = self.sequence(part.slot, 0), part.position + len(part.tokens)
            batch.append(BatchPart(sequence, part.position, part.tokens, output=True))
            rows.append(row)
            if missing := longest - len(part.tokens):
                batch.append(BatchPart(sequence, end, [self._token] * missing, output=False))
                rows.append(None)
        self._turning.forget()
        self._callback.run(Idle(), lambda: self.decode(batch, rows))
        for part in parts:
            self.truncate(self.sequence(part.slot, 0), part.position + len(part.tokens))

    def reserve(self, slot: int, column: int, position: int, tokens: Sequence[int]) -> None:
        """Give `tokens` cells without computing them; at most `ubatch_size`. Their keys and values are undefined."""
        self._turning.forget()
        part = BatchPart(self.sequence(slot, column), position, tokens, output=False)
        self._callback.run(Skip(), lambda: self.decode([part], [None]))

    def share(self, slot: int, source: int, targets: Sequence[int], position: int, tokens: Sequence[int]) -> None:
        """Append to the slot's columns `targets` what column `source` holds of `tokens`, at most `ubatch_size`.

        The targets hold exactly the tokens before `position`. Raises NativeError; the caller then truncates.
        """
        for target in targets:
            self.reserve(slot, target, position, tokens)
        where = Range(position, len(tokens), position)
        self._prepare_cells(where)
        for target in targets:
            self._give(slot, source, target, where)

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
            self.reserve(0, target, where.start, part.tokens)
            self._prepare_cells(where)
            self._give(0, source, target, where)
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
        """The keys and values of the tokens start to end as bytes for `write_cells`, in the form of a state."""
        return self._cells.read(self.sequence(slot, column), Range(start, end - start, start))

    def write_cells(self, slot: int, column: int, start: int, tokens: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Append `tokens`, whose keys and values are `data`, to a sequence that holds `start` tokens.

        Raises StateError for bytes of another form; the caller then truncates.
        """
        self.reserve(slot, column, start, tokens)
        self._cells.write(self.sequence(slot, column), Range(start, len(tokens), start), data)

    def _prepare_cells(self, where: Range) -> None:
        positions = np.arange(where.start, where.start + where.count, dtype=np.int32)
        self.devices.prepare(positions, self._threads)

    def _give(self, slot: int, source: int, target: int, where: Range) -> None:
        old, new = self.sequence(slot, source), self.sequence(slot, target)
        self._cells.give(old, new, where, self.bases[source], self.bases[target])

    def keys_at(self, column: int, cell: int) -> dict[int, NDArray[np.float32]]:
        """The keys (float32 [numbers]) of one cell of slot 0 in each layer whose keys are f32 or f16."""
        return {
            layer: self._cells.key_row(self.sequence(0, column), layer, cell) for layer in self._cells.readable_layers
        }

    def copy_slot(self, source: int, target: int) -> None:
        """Make slot `target` hold what slot `source` holds."""
        for column in range(len(self.bases)):
            old, new = self.sequence(source, column), self.sequence(target, column)
            llama.llama_memory_seq_rm(self._memory, new, -1, -1)
            llama.llama_memory_seq_cp(self._memory, old, new, -1, -1)

    def _prepare(
        self, layout: Layout, batch: Sequence[BatchPart], positions: NDArray[np.int32], *, careful: bool
    ) -> None:
        sequences = np.repeat(np.array([part.sequence for part in batch], np.int64), layout.tokens)
        places = np.concatenate([np.arange(part.position, part.position + layout.tokens) for part in batch])
        self._turning.prepare(layout, sequences, places.astype(np.int64), careful=careful)
        self.devices.prepare(positions, self._threads if layout.rows > _ROWS_PER_THREAD else 1)

    def _observe(self) -> Observation:
        """The graph of one token."""
        observer = Observer()
        part = BatchPart(0, 0, (self._token,), output=False)
        self._callback.run(observer, lambda: self.decode([part], [None]))
        self.truncate(0, 0)
        return observer.result()


def _follows(
    model: Model, config: ContextConfig, base: float, cancel: CancelFlag, observation: Observation
) -> frozenset[int]:
    """Which ROPE operations have another base in a context with another base; some layers keep their own."""
    callback = EvalCallback()
    tiny = replace(config, batch_size=1, ubatch_size=1)
    parameters = context_parameters(model, base, tiny, 1, cancel)
    parameters.n_ctx = _CELL_STEP
    parameters.n_seq_max = parameters.n_outputs_max = 1
    callback.install(parameters)
    observer = Observer()
    with Sequences(model, parameters, cancel) as other:
        part = BatchPart(0, 0, (model.vocabulary_size // 2,), output=False)
        callback.run(observer, lambda: other.decode([part], [None]))
        ropes = observer.result().ropes
    if len(ropes) != len(observation.ropes):
        raise UnsupportedModelError("the model's graph changes with the RoPE base", "use `engine=contexts`")
    pairs = enumerate(zip(observation.ropes, ropes, strict=True))
    return frozenset(index for index, (ours, theirs) in pairs if ours.base != theirs.base)
