"""A backend of N contexts: one llama.cpp context per column, decoded by a pool of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from abcli.config import Buckets, ContextConfig, MergeRule
from abcli.engine.backend import TILED_TOKENS, Part, Sharing
from abcli.engine.memory import all_on_devices
from abcli.engine.shared import NotShareableError, SharedPrefill
from abcli.engine.workers import WorkerPlan, available_cores, plan_workers, run_all
from abcli.native.compute_thread import compute_thread
from abcli.native.context import BatchPart, Context
from abcli.native.llama import CancelFlag, version
from abcli.native.model import Model
from abcli.native.owner import Owner
from abcli.native.rotating.keys import aligned_bytes
from abcli.native.state import parse_state
from abcli.rope.bases import nearest_base
from abcli.rope.parameters import rope_parameters


class ContextsBackend(Owner):
    """Implements `Backend`. The contexts share the weights; each has its own cache, buffers and RoPE base."""

    def __init__(self, model: Model, config: ContextConfig, buckets: Buckets) -> None:
        """Make one context per bucket; the model stays the caller's and must outlive the backend.

        Raises NativeError if a context cannot be made.
        """
        self.buckets = len(buckets.bases)
        self.cancel = CancelFlag()
        self._cores = config.threads or available_cores()
        self.plan: WorkerPlan = plan_workers(self.buckets, self._cores)
        cells = config.context_size * config.slots
        self._rope = rope_parameters(model.checked.header, neox=model.rotation == "halves", context_size=cells)
        self.turning = ""
        self.cell_format = (repr(self._rope), version())
        with ExitStack() as stack:

            def make(base: float) -> Context:
                return stack.enter_context(Context(model, base, config, cells, self.plan.threads, self.cancel))

            self._contexts = [make(base) for base in buckets.bases]
            self._pool: Executor = compute_thread()
            if self.plan.workers > 1:
                pool = ThreadPoolExecutor(self.plan.workers, thread_name_prefix="abcli-bucket")
                self._pool = stack.enter_context(pool)
            self._shared: SharedPrefill | None = None
            self.leader = 0
            self.sharing = self._try_sharing(model, config, buckets, make, stack)
            self.bases = tuple(context.base for context in self._contexts)
            self.native = nearest_base(self.bases, model.checked.header.native_base)
            self._piece = min(self._contexts[0].batch_size, self._contexts[0].ubatch_size)
            if model.sliding_window > 0 and (self.sharing.shared or config.prompt_cache is not None):
                # A state leaves out what the window has passed, so no piece may be longer than the window.
                self._piece = min(self._piece, model.sliding_window)
            self.outputs = self.native_outputs = min(config.outputs, self._piece, TILED_TOKENS - 1)
            self._stack = stack.pop_all()

    def piece(self, columns: int) -> int:
        """See `Backend.piece`."""
        return self._piece

    def compute(
        self, parts: Sequence[Part], columns: Sequence[int], merge: MergeRule | None = None
    ) -> Mapping[int, float]:
        """See `Backend.compute`: as many parts in a batch as may be without changing how llama.cpp computes each."""
        single = all(len(part.tokens) == 1 for part in parts)
        limit = self._contexts[0].batch_size if single else min(self._piece, TILED_TOKENS - 1)
        for group in fitting(parts, limit):
            self._decode(group, columns)
        return {}

    def share(self, slot: int, source: int, targets: Sequence[int], start: int, tokens: Sequence[int]) -> None:
        """See `Backend.share`."""
        if self._shared is None:
            raise RuntimeError("this backend cannot share a prefill")
        contexts, end = [self._contexts[target] for target in targets], start + len(tokens)
        for first in range(start, end, self._piece):
            self._shared.transfer(self._contexts[source], contexts, slot, first, min(first + self._piece, end))

    def length(self, slot: int, column: int) -> int:
        """See `Backend.length`."""
        return self._contexts[column].length(slot)

    def truncate(self, slot: int, length: int, columns: Sequence[int] | None = None) -> bool:
        """See `Backend.truncate`."""
        asked = range(len(self._contexts)) if columns is None else columns
        # Every context is asked: a generator would stop at the first refusal and leave the others longer.
        return all([self._contexts[column].truncate(slot, length) for column in asked])  # noqa: C419

    def copy(self, source: int, target: int) -> None:
        """See `Backend.copy`."""
        for context in self._contexts:
            context.copy(source, target)

    def read_cells(self, slot: int, start: int, end: int) -> NDArray[np.uint8]:
        """See `Backend.read_cells`."""
        leader = self._contexts[self.leader]
        leader.take_range(slot, start, end)
        try:
            data = aligned_bytes(leader.spare_state_size())
            leader.read_spare(data)
        finally:
            leader.drop_spare()
        return data

    def append_cells(self, slot: int, start: int, tokens: Sequence[int], data: NDArray[np.uint8]) -> None:
        """See `Backend.append_cells`."""
        parse_state(data)
        leader = self._contexts[self.leader]
        try:
            leader.write_spare(data)
            leader.append_spare(slot)
        finally:
            leader.drop_spare()

    def _decode(self, parts: Sequence[Part], columns: Sequence[int]) -> None:
        """One batch in each of the columns; one column alone has all the cores."""
        batch = [BatchPart(part.slot, part.position, part.tokens, output=part.outputs) for part in parts]

        def job(index: int) -> None:
            rows = [None if part.logits is None else part.logits[index] for part in parts]
            self._contexts[columns[index]].decode(batch, rows)

        if len(columns) > 1 or self.plan.threads == self._cores:
            run_all(self._pool, job, len(columns), self.cancel)
            return
        (context,) = (self._contexts[column] for column in columns)
        context.set_threads(self._cores)
        try:
            run_all(compute_thread(), job, 1, self.cancel)
        finally:
            context.set_threads(self.plan.threads)

    def _try_sharing(
        self, model: Model, config: ContextConfig, buckets: Buckets, make: Callable[[float], Context], stack: ExitStack
    ) -> Sharing:
        """Prepare shared prefill if it is wanted and proves right; a leader that is no bucket is one more column."""
        if config.prefill == "exact" or self.buckets == 1:
            return Sharing(False)
        if config.prefill == "auto" and all_on_devices(model.checked):
            return Sharing(False, "from device to device through the machine's memory it would be no faster")
        if model.rotation is None:
            return Sharing(False, "the positions of this model have several parts (M-RoPE)")
        base = buckets.prefill_base
        leader = next((context for context in self._contexts if context.base == base), None) or make(base)
        shared = SharedPrefill(
            self._rope,
            model,
            lambda job, count: run_all(self._pool, job, count, self.cancel),
        )
        stack.callback(shared.close)
        try:
            shared.probe([leader, *self._contexts], config.context_size)
        except NotShareableError as error:
            if leader not in self._contexts:
                leader.close()
            return Sharing(False, error.message)
        if leader not in self._contexts:
            self._contexts.append(leader)
        self._shared, self.leader = shared, self._contexts.index(leader)
        return Sharing(True, f"at base {base:g}; {shared.turning_layers} layers follow the base")


def fitting(parts: Sequence[Part], limit: int) -> Iterator[list[Part]]:
    """`parts` in groups of at most `limit` tokens; a longer one is a group of its own."""
    group: list[Part] = []
    held = 0
    for part in parts:
        if group and held + len(part.tokens) > limit:
            yield group
            group, held = [], 0
        group.append(part)
        held += len(part.tokens)
    yield group
