"""The engine of N contexts: one model, one llama.cpp context per bucket, decoded by a pool of workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from math import log
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from abcli.config import PROMPT_CACHE_LIMIT, Buckets, ContextConfig
from abcli.engine.prompt_cache import CacheKey, PromptCache
from abcli.engine.protocol import Progress
from abcli.engine.shared import NotShareableError, SharedPrefill
from abcli.engine.slots import MIN_SHARED_TOKENS, TILED_TOKENS, SlotEngine, fitting
from abcli.engine.stored import StoredPrompts
from abcli.engine.workers import WorkerPlan, available_cores, plan_workers
from abcli.errors import CancelledError
from abcli.native.compute_thread import compute_thread
from abcli.native.context import BatchPart, Context
from abcli.native.llama import version
from abcli.native.model import Model
from abcli.native.rotating.keys import aligned_bytes
from abcli.native.state import parse_state
from abcli.rope.frequencies import RopeParameters
from abcli.rope.parameters import rope_parameters

__all__ = ["MIN_SHARED_TOKENS", "ContextsEngine"]


class ContextsEngine(SlotEngine):
    """Implements `Engine`. The contexts share the weights; each has its own cache, buffers and RoPE base."""

    def __init__(
        self,
        model: Model,
        config: ContextConfig,
        buckets: Buckets,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """Make one context per base of `config`; the model stays the caller's and must outlive the engine.

        `warn` gets a line for what goes wrong with the prompt cache on disk.

        Raises NativeError if a context cannot be made.
        """
        super().__init__(config, buckets.bases, model.vocabulary_size)
        self._cores = config.threads or available_cores()
        self.plan: WorkerPlan = plan_workers(len(buckets.bases), self._cores)
        with ExitStack() as stack:

            def make(base: float) -> Context:
                cells = config.context_size * config.slots
                return stack.enter_context(Context(model, base, config, cells, self.plan.threads, self._cancel))

            self._contexts = [make(base) for base in buckets.bases]
            if self.plan.workers == 1:
                self._pool = compute_thread()
            else:
                self._pool = stack.enter_context(
                    ThreadPoolExecutor(self.plan.workers, thread_name_prefix="abcli-bucket")
                )
            self._shared: SharedPrefill | None = None
            self._leader = self._contexts[0]
            self.prefill_note = self._try_sharing(model, config, buckets, make, stack)
            self._step_limit = self._leader.batch_size
            self._piece = min(self._leader.batch_size, self._leader.ubatch_size)
            if model.sliding_window > 0 and (self._shared is not None or config.prompt_cache is not None):
                # A state leaves out what the window has passed, so no piece may be longer than the window.
                self._piece = min(self._piece, model.sliding_window)
            self._sharing = self._shared is not None
            if config.prompt_cache is not None:
                self._stored = self._open_stored(model, config, config.prompt_cache, warn or (lambda _line: None))
            self._stack = stack.pop_all()

    def _step(self, tokens: Mapping[int, int], lengths: Mapping[int, int]) -> None:
        """Each bucket computes all slots in one batch."""
        slots = list(tokens)
        for first in range(0, len(slots), self._step_limit):
            group = slots[first : first + self._step_limit]
            parts = [BatchPart(slot, lengths[slot], (tokens[slot],), output=True) for slot in group]
            self._decode(parts, group)

    def _copy_cells(self, source: int, target: int) -> None:
        for context in self._all_contexts:
            context.copy(source, target)

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

    def _prefill_exact(self, slot: int, tokens: Sequence[int], on_progress: Progress | None) -> None:
        """Every bucket computes every token."""
        start = len(self._tokens[slot])
        for offset in range(0, len(tokens), self._piece):
            piece = tokens[offset : offset + self._piece]
            done = offset + len(piece)
            self._decode([BatchPart(slot, start + offset, piece, output=done == len(tokens))], [slot])
            if on_progress is not None:
                on_progress(done, len(tokens))

    def _prefill_exact_together(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """As many prompts in a batch as may be without changing how llama.cpp computes each."""
        for slots in fitting(prompts, min(self._piece, TILED_TOKENS - 1)):
            if len(slots) == 1:
                self._prefill_exact(slots[0], prompts[slots[0]], None)
                continue
            parts = [BatchPart(slot, len(self._tokens[slot]), prompts[slot], output=True) for slot in slots]
            self._decode(parts, slots)

    def _lead(self, slot: int, tokens: Sequence[int], on_done: Callable[[int], None]) -> None:
        """The leader computes piece by piece, and the others take each over."""
        start = len(self._tokens[slot])
        for offset in range(0, len(tokens), self._piece):
            piece = tokens[offset : offset + self._piece]
            self._lead_parts([BatchPart(slot, start + offset, piece, output=False)])
            on_done(offset + len(piece))

    def _lead_together(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """As many prompts in a batch as may be without changing how llama.cpp computes each."""
        for slots in fitting(prompts, min(self._piece, TILED_TOKENS - 1)):
            if len(slots) == 1:
                self._lead(slots[0], prompts[slots[0]], lambda _done: None)
                continue
            self._lead_parts([BatchPart(slot, len(self._tokens[slot]), prompts[slot], output=False) for slot in slots])

    def _lead_parts(self, parts: Sequence[BatchPart]) -> None:
        """One batch in the leader, and from there to the others."""
        shared = self._shared
        if shared is None:
            raise RuntimeError("this engine cannot share a prefill")
        for part in parts:
            self._let_leader_catch_up(shared, part.sequence, part.position)
        others = [context for context in self._contexts if context is not self._leader]
        self._leader.set_threads(self._cores)
        try:
            self._run_all(lambda _index: self._leader.decode(parts, [None] * len(parts)), 1, compute_thread())
        finally:
            self._leader.set_threads(self.plan.threads)
        for part in parts:
            shared.transfer(self._leader, others, part.sequence, part.position, part.position + len(part.tokens))

    def _finish_shared(self, tokens: Mapping[int, int], lengths: Mapping[int, int]) -> None:
        """All buckets compute the last token."""
        self._step(tokens, lengths)

    def _let_leader_catch_up(self, shared: SharedPrefill, slot: int, length: int) -> None:
        """A leader that is no bucket takes over from the nearest bucket what was decoded without it."""
        nearest = min(self._contexts, key=lambda context: abs(log(context.base / self._leader.base)))
        for start in range(self._leader.length(slot), length, self._piece):
            shared.transfer(nearest, [self._leader], slot, start, min(start + self._piece, length))

    def _try_sharing(
        self, model: Model, config: ContextConfig, buckets: Buckets, make: Callable[[float], Context], stack: ExitStack
    ) -> str:
        """Prepare shared prefill if it is wanted and proves right; what is done, and why, in a few words."""
        if config.prefill == "exact" or len(buckets.bases) == 1:
            return "exact prefill"
        if model.rotation is None:
            return "exact prefill: the positions of this model have several parts (M-RoPE)"
        base = buckets.prefill_base
        leader = next((context for context in self._contexts if context.base == base), None) or make(base)
        shared = SharedPrefill(
            _rope(model, config), model.checked.header.key_length, model.vocabulary_size // 2, self._run_all
        )
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
        self, model: Model, config: ContextConfig, directory: Path, warn: Callable[[str], None]
    ) -> StoredPrompts | None:
        """The prompts on the disk that fit this engine, if its caches can be filled from there at all."""
        others = [context for context in self._contexts if context is not self._leader]
        if (others and self._shared is None) or model.is_recurrent:
            warn(f"`prompt_cache` needs a shared prefill or a single bucket: {self.prefill_note}")
            return None
        key = CacheKey(
            model=model.checked.fingerprint,
            base=self._leader.base,
            scaling=repr(_rope(model, config)),
            cache_type_k=config.cache_type_k,
            cache_type_v=config.cache_type_v,
            flash_attention=config.flash_attention,
            build=version(),
            model_name=model.checked.name,
        )
        cache = PromptCache(directory, key, PROMPT_CACHE_LIMIT, warn)
        return StoredPrompts(cache, _LeaderCells(self._leader, others, self._shared), self._piece)

    def _truncate_cells(self, slot: int, length: int) -> int:
        # Every context is asked: a generator would stop at the first refusal and leave the others longer.
        if all([context.truncate(slot, length) for context in self._all_contexts]):  # noqa: C419
            return length
        for context in self._all_contexts:
            context.truncate(slot, 0)
        return 0


def _rope(model: Model, config: ContextConfig) -> RopeParameters:
    cells = config.context_size * config.slots
    return rope_parameters(model.checked.header, neox=model.rotation == "halves", context_size=cells)


class _LeaderCells:
    """What the leader holds, as bytes; the other contexts take it with their keys turned."""

    def __init__(self, leader: Context, others: Sequence[Context], shared: SharedPrefill | None) -> None:
        """Without `others`, `shared` is not needed."""
        self._leader = leader
        self._others = others
        self._shared = shared

    def read(self, slot: int, start: int, end: int) -> NDArray[np.uint8]:
        """See `Cells.read`."""
        self._leader.take_range(slot, start, end)
        try:
            data = aligned_bytes(self._leader.spare_state_size())
            self._leader.read_spare(data)
        finally:
            self._leader.drop_spare()
        return data

    def append(self, slot: int, _start: int, _tokens: Sequence[int], data: NDArray[np.uint8]) -> None:
        """See `Cells.append`."""
        parse_state(data)
        self._leader.write_spare(data)
        self._leader.append_spare(slot)
        if self._shared is not None and self._others:
            self._shared.give(data, self._leader, self._others, slot)

    def truncate(self, slot: int, length: int) -> None:
        """See `Cells.truncate`."""
        for context in (self._leader, *self._others):
            context.truncate(slot, length)
