"""The engine of N contexts: one model, one llama.cpp context per bucket, decoded by a pool of workers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import cached_property
from math import log
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from abcli.config import PROMPT_CACHE_LIMIT, EngineConfig
from abcli.engine.prompt_cache import CacheKey, PromptCache
from abcli.engine.protocol import Progress
from abcli.engine.rope_parameters import rope_parameters
from abcli.engine.shared import NotShareableError, SharedPrefill
from abcli.engine.stored import MIN_GAIN, StoredPrompts
from abcli.engine.workers import WorkerPlan, available_cores, plan_workers
from abcli.errors import CancelledError, ContextFullError
from abcli.models.fingerprint import fingerprint
from abcli.models.header import Header, read_header
from abcli.native.context import BatchPart, Context
from abcli.native.library import CancelFlag, version
from abcli.native.model import Model
from abcli.native.owner import Owner
from abcli.rope.frequencies import RopeParameters

# Sharing is faster from about 4 new tokens on, but approximate: so short a text is worth computing exactly.
MIN_SHARED_TOKENS = 24


class _Known:
    """What the model's file says, read when it is first asked for."""

    def __init__(self, model: Model, config: EngineConfig, header: Header | None) -> None:
        self._model = model
        self._cells = config.context_size * config.slots
        self._given = header

    @cached_property
    def header(self) -> Header:
        return self._given or read_header(self._model.path)

    @cached_property
    def rope(self) -> RopeParameters:
        return rope_parameters(self.header, neox=self._model.rotation == "halves", context_size=self._cells)


class ContextsEngine(Owner):
    """Implements `Engine`. The contexts share the weights; each has its own cache, buffers and RoPE base."""

    def __init__(
        self,
        model: Model,
        config: EngineConfig,
        warn: Callable[[str], None] | None = None,
        header: Header | None = None,
    ) -> None:
        """Make one context per base of `config`; the model stays the caller's and must outlive the engine.

        `warn` gets a line for what goes wrong with the prompt cache on disk; `header` is the model's, if it has
        been read already.

        Raises NativeError if a context cannot be made.
        """
        self._slot_cells = config.context_size
        self._cancel = CancelFlag()
        self._cancellable = False
        self._cores = config.threads or available_cores()
        self.plan: WorkerPlan = plan_workers(len(config.bases), self._cores)
        self._bases = tuple(config.bases)
        self._tokens: list[list[int]] = [[] for _ in range(config.slots)]
        self._logits: NDArray[np.float32] = np.empty(
            (config.slots, len(config.bases), model.vocabulary_size), np.float32
        )
        self._least_shared = 2 if config.prefill == "shared" else MIN_SHARED_TOKENS
        self.computed_tokens = 0
        known = _Known(model, config, header)
        with ExitStack() as stack:

            def make(base: float) -> Context:
                cells = config.context_size * config.slots
                return stack.enter_context(Context(model, base, config, cells, self.plan.threads, self._cancel))

            self._contexts = [make(base) for base in config.bases]
            self._pool = ThreadPoolExecutor(self.plan.workers, thread_name_prefix="abcli-bucket")
            stack.callback(self._pool.shutdown)
            self._shared: SharedPrefill | None = None
            self._leader = self._contexts[0]
            self.prefill_note = self._try_sharing(model, config, known, make, stack)
            self._step_limit = self._leader.batch_size
            self._piece = min(self._leader.batch_size, self._leader.ubatch_size)
            if model.sliding_window > 0 and (self._shared is not None or config.prompt_cache is not None):
                # A state leaves out what the window has passed, so no piece may be longer than the window.
                self._piece = min(self._piece, model.sliding_window)
            self._stored: StoredPrompts | None = None
            if config.prompt_cache is not None:
                self._stored = self._open_stored(
                    model, config, known, config.prompt_cache, warn or (lambda _line: None)
                )
            self._stack = stack.pop_all()

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
        """See `Engine.prefill`. The tokens are computed in pieces of at most `ubatch_size`."""
        if not tokens:
            raise ValueError("prefill needs at least one token")
        start = len(self._tokens[slot])
        self._check_room(start + len(tokens))
        with self._computing({slot: start}):
            tokens = self._restore(slot, tokens)
            self.computed_tokens = len(tokens)
            if self._shared is not None and len(tokens) >= self._least_shared:
                self._prefill_shared(self._shared, slot, tokens, on_progress)
            else:
                self._prefill_exact(slot, tokens, on_progress)
        self._tokens[slot].extend(tokens)
        if self._stored is not None and len(tokens) > MIN_GAIN:
            self._stored.store(slot, self._tokens[slot][:-1])
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
            for context in self._all_contexts:
                context.copy(source, target)
            self._tokens[target] = list(self._tokens[source])

    def cancel(self) -> None:
        """See `Engine.cancel`."""
        if self._cancellable:
            self._cancel.set()

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

        self._run_all(job, len(self._contexts))

    def _restore(self, slot: int, tokens: Sequence[int]) -> Sequence[int]:
        """Take from the disk what it holds of the slot's tokens followed by `tokens`; what is left to compute."""
        if self._stored is None or len(tokens) <= MIN_GAIN:
            return tokens
        held = self._tokens[slot]
        wanted = [*held, *tokens]
        # At least one token is computed: its logits are needed.
        done = self._stored.restore(slot, wanted[:-1], len(held), lambda: self._empty(slot))
        self._tokens[slot] = wanted[:done]
        return wanted[done:]

    def _empty(self, slot: int) -> None:
        self._truncate_contexts(slot, 0)
        self._tokens[slot] = []

    def _prefill_exact(self, slot: int, tokens: Sequence[int], on_progress: Progress | None) -> None:
        """Every bucket computes every token."""
        start = len(self._tokens[slot])
        for offset in range(0, len(tokens), self._piece):
            piece = tokens[offset : offset + self._piece]
            done = offset + len(piece)
            self._decode([BatchPart(slot, start + offset, piece, output=done == len(tokens))], [slot])
            if on_progress is not None:
                on_progress(done, len(tokens))

    def _prefill_shared(
        self, shared: SharedPrefill, slot: int, tokens: Sequence[int], on_progress: Progress | None
    ) -> None:
        """The leader computes all tokens but the last, the others take them over; all compute the last."""
        start, total = len(self._tokens[slot]), len(tokens)
        self._let_leader_catch_up(shared, slot, start)
        others = [context for context in self._contexts if context is not self._leader]
        self._leader.set_threads(self._cores)
        try:
            for offset in range(0, total - 1, self._piece):
                piece = tokens[offset : min(offset + self._piece, total - 1)]
                part = BatchPart(slot, start + offset, piece, output=False)
                self._run_all(lambda _index, part=part: self._leader.decode([part], [None]), 1)  # type: ignore[misc]
                shared.transfer(self._leader, others, slot, part.position, part.position + len(piece))
                if on_progress is not None:
                    on_progress(offset + len(piece), total)
        finally:
            self._leader.set_threads(self.plan.threads)
        self._decode([BatchPart(slot, start + total - 1, tokens[-1:], output=True)], [slot])
        if on_progress is not None:
            on_progress(total, total)

    def _let_leader_catch_up(self, shared: SharedPrefill, slot: int, length: int) -> None:
        """A leader that is no bucket takes over from the nearest bucket what was decoded without it."""
        nearest = min(self._contexts, key=lambda context: abs(log(context.base / self._leader.base)))
        for start in range(self._leader.length(slot), length, self._piece):
            shared.transfer(nearest, [self._leader], slot, start, min(start + self._piece, length))

    def _try_sharing(
        self, model: Model, config: EngineConfig, known: _Known, make: Callable[[float], Context], stack: ExitStack
    ) -> str:
        """Prepare shared prefill if it is wanted and proves right; what is done, and why, in a few words."""
        if config.prefill == "exact" or len(config.bases) == 1:
            return "exact prefill"
        if model.rotation is None:
            return "exact prefill: the positions of this model have several parts (M-RoPE)"
        base = float(np.float32(model.native_base if config.prefill_base is None else config.prefill_base))
        leader = next((context for context in self._contexts if context.base == base), None) or make(base)
        shared = SharedPrefill(known.rope, known.header.key_length, model.vocabulary_size // 2, self._run_all)
        stack.callback(shared.close)
        try:
            shared.probe([leader, *self._contexts], config.context_size)
        except NotShareableError as error:
            if leader not in self._contexts:
                leader.close()
            return f"exact prefill: {error.message}"
        self._leader, self._shared = leader, shared
        return f"shared prefill at base {base:g}; {shared.turning_layers} layers follow the base"

    @property
    def _all_contexts(self) -> list[Context]:
        extra = [] if self._leader in self._contexts else [self._leader]
        return [*self._contexts, *extra]

    def _open_stored(
        self, model: Model, config: EngineConfig, known: _Known, directory: Path, warn: Callable[[str], None]
    ) -> StoredPrompts | None:
        """The prompts on the disk that fit this engine, if its caches can be filled from there at all."""
        others = [context for context in self._contexts if context is not self._leader]
        if (others and self._shared is None) or model.is_recurrent:
            warn(f"--prompt-cache needs a shared prefill or a single bucket: {self.prefill_note}")
            return None
        key = CacheKey(
            model=fingerprint(known.header),
            base=self._leader.base,
            scaling=repr(known.rope),
            cache_type_k=config.cache_type_k,
            cache_type_v=config.cache_type_v,
            flash_attention=config.flash_attention,
            build=version(),
            model_name=model.path.name,
        )
        cache = PromptCache(directory, key, PROMPT_CACHE_LIMIT, warn)
        return StoredPrompts(cache, self._leader, others, self._shared, self._piece)

    def _run_all(self, job: Callable[[int], None], count: int) -> None:
        """Run job(0) ... job(count - 1) on the pool; wait for all of them, then raise the first error."""
        futures = [self._pool.submit(job, index) for index in range(count)]
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
                # Reading from the disk may have emptied the slot first.
                del self._tokens[slot][self._truncate_contexts(slot, min(length, len(self._tokens[slot]))) :]
            raise
        finally:
            self._cancellable = False
            self._cancel.clear()

    def _truncate_contexts(self, slot: int, length: int) -> int:
        # Every context is asked: a generator would stop at the first refusal and leave the others longer.
        if all([context.truncate(slot, length) for context in self._all_contexts]):  # noqa: C419
            return length
        for context in self._all_contexts:
            context.truncate(slot, 0)
        return 0
