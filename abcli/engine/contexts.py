"""The engine of N contexts: one model, one llama.cpp context per bucket, decoded by a pool of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from abcli.config import EngineConfig
from abcli.engine.protocol import Progress
from abcli.engine.workers import WorkerPlan, available_cores, plan_workers
from abcli.errors import CancelledError, ContextFullError
from abcli.native.context import BatchPart, Context
from abcli.native.library import CancelFlag
from abcli.native.model import Model


class ContextsEngine:
    """Implements `Engine`. The contexts share the weights; each has its own cache, buffers and RoPE base."""

    def __init__(self, model: Model, config: EngineConfig) -> None:
        """Make one context per base of `config`; the model stays the caller's and must outlive the engine.

        Raises NativeError if a context cannot be made.
        """
        self._slot_cells = config.context_size
        self._cancel = CancelFlag()
        self._cancellable = False
        self.plan: WorkerPlan = plan_workers(len(config.bases), config.threads or available_cores())
        cells = config.context_size * config.slots
        with ExitStack() as stack:
            self._contexts = [
                stack.enter_context(Context(model, base, config, cells, self.plan.threads, self._cancel))
                for base in config.bases
            ]
            pool = ThreadPoolExecutor(self.plan.workers, thread_name_prefix="abcli-bucket")
            stack.callback(pool.shutdown)
            self._pool = pool
            self._stack = stack.pop_all()
        self._bases = tuple(config.bases)
        self._tokens: list[list[int]] = [[] for _ in range(config.slots)]
        self._logits: NDArray[np.float32] = np.empty(
            (config.slots, len(config.bases), model.vocabulary_size), np.float32
        )
        first = self._contexts[0]
        self._piece = min(first.batch_size, first.ubatch_size)
        self._step_limit = first.batch_size

    def __enter__(self) -> ContextsEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def bases(self) -> tuple[float, ...]:
        """The RoPE base of each bucket."""
        return self._bases

    @property
    def vocabulary_size(self) -> int:
        """The number of logits per bucket."""
        return int(self._logits.shape[2])

    @property
    def slots(self) -> int:
        """The number of slots."""
        return len(self._tokens)

    @property
    def context_size(self) -> int:
        """The number of tokens each slot can hold."""
        return self._slot_cells

    def tokens(self, slot: int) -> Sequence[int]:
        """The tokens `slot` holds, oldest first."""
        return self._tokens[slot]

    def prefill(self, slot: int, tokens: Sequence[int], on_progress: Progress | None = None) -> NDArray[np.float32]:
        """See `Engine.prefill`. Every bucket computes every token, in pieces of at most `ubatch_size`."""
        if not tokens:
            raise ValueError("prefill needs at least one token")
        start = len(self._tokens[slot])
        self._check_room(start + len(tokens))
        with self._computing({slot: start}):
            for offset in range(0, len(tokens), self._piece):
                piece = tokens[offset : offset + self._piece]
                done = offset + len(piece)
                part = BatchPart(slot, start + offset, piece, output=done == len(tokens))
                self._decode([part], [slot])
                if on_progress is not None:
                    on_progress(done, len(tokens))
        self._tokens[slot].extend(tokens)
        logits: NDArray[np.float32] = self._logits[slot]
        return logits

    def step(self, tokens: Mapping[int, int]) -> NDArray[np.float32]:
        """See `Engine.step`. Each bucket computes all slots in one batch."""
        if not tokens:
            raise ValueError("a step needs at least one slot")
        lengths = {slot: len(self._tokens[slot]) for slot in tokens}
        self._check_room(max(lengths.values()) + 1)
        slots = list(tokens)
        with self._computing(lengths):
            for first in range(0, len(slots), self._step_limit):
                group = slots[first : first + self._step_limit]
                parts = [BatchPart(slot, lengths[slot], (tokens[slot],), output=True) for slot in group]
                self._decode(parts, group)
        for slot, token in tokens.items():
            self._tokens[slot].append(token)
        logits: NDArray[np.float32] = self._logits[slots]
        return logits

    def truncate(self, slot: int, length: int) -> int:
        """See `Engine.truncate`."""
        held = self._tokens[slot]
        if length >= len(held):
            return len(held)
        kept = self._truncate_contexts(slot, max(0, length))
        del held[kept:]
        return kept

    def copy(self, source: int, target: int) -> None:
        """See `Engine.copy`."""
        if source != target:
            for context in self._contexts:
                context.copy(source, target)
            self._tokens[target] = list(self._tokens[source])

    def cancel(self) -> None:
        """See `Engine.cancel`."""
        if self._cancellable:
            self._cancel.set()

    def close(self) -> None:
        """Stop the workers and free the contexts."""
        self._stack.close()

    def _check_room(self, needed: int) -> None:
        if needed > self._slot_cells:
            raise ContextFullError(needed, self._slot_cells)

    def _decode(self, parts: Sequence[BatchPart], slots: Sequence[int]) -> None:
        """Compute `parts` in every bucket; the logits of part i go to row `slots[i]`."""

        def job(bucket: int) -> None:
            if self._cancel.is_set():
                raise CancelledError
            rows = [
                self._logits[slot, bucket] if part.output else None for part, slot in zip(parts, slots, strict=True)
            ]
            self._contexts[bucket].decode(parts, rows)

        self._in_every_bucket(job)

    def _in_every_bucket(self, job: Callable[[int], None]) -> None:
        """Run `job(bucket)` for all buckets on the pool; wait for all of them, then raise the first error."""
        futures = [self._pool.submit(job, bucket) for bucket in range(len(self._contexts))]
        try:
            wait(futures)
        except BaseException:
            # A signal handler raised: nobody may touch the contexts before their workers have stopped.
            self._cancel.set()
            wait(futures)
            raise
        for future in futures:
            future.result()

    @contextmanager
    def _computing(self, lengths: Mapping[int, int]) -> Iterator[None]:
        """Allow `cancel` while the block runs; if it fails, put the slots back to `lengths`."""
        self._cancel.clear()
        self._cancellable = True
        try:
            yield
        except BaseException:
            for slot, length in lengths.items():
                del self._tokens[slot][self._truncate_contexts(slot, length) :]
            raise
        finally:
            self._cancellable = False
            self._cancel.clear()

    def _truncate_contexts(self, slot: int, length: int) -> int:
        # Every context is asked: a generator would stop at the first refusal and leave the others longer.
        if all([context.truncate(slot, length) for context in self._contexts]):  # noqa: C419
            return length
        for context in self._contexts:
            context.truncate(slot, 0)
        return 0
