"""What all engines have in common: slots of tokens, room, progress, cancelling, rollback and stored prompts."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from abcli.config import ContextConfig
from abcli.engine.protocol import Progress
from abcli.engine.stored import MIN_GAIN, StoredPrompts
from abcli.errors import ContextFullError
from abcli.native.compute_thread import wait_for
from abcli.native.llama import CancelFlag
from abcli.native.owner import Owner

# Sharing is faster from about 4 new tokens on, but approximate: so short a text is worth computing exactly.
MIN_SHARED_TOKENS = 24
# From so many tokens on, llama.cpp's flash attention on CPUs sums in float32, below in float16 (GGML_FA_TILE_Q): which
# of both a prompt gets must not depend on the prompts beside it.
TILED_TOKENS = 64


class SlotEngine(Owner):
    """Implements `Engine` on top of a few steps that differ from engine to engine."""

    prefill_note: str
    # Computes; the thread of the caller stays free for signals.
    _pool: Executor
    # Whether prompts can be computed once for all buckets.
    _sharing = False
    _stored: StoredPrompts | None = None

    def __init__(self, config: ContextConfig, bases: Sequence[float], vocabulary_size: int) -> None:
        self._slot_cells = config.context_size
        self._cancel = CancelFlag()
        self._cancellable = False
        self._bases = tuple(bases)
        self._tokens: list[list[int]] = [[] for _ in range(config.slots)]
        self._logits: NDArray[np.float32] = np.empty((config.slots, len(bases), vocabulary_size), np.float32)
        self.least_shared = 2 if config.prefill == "shared" else MIN_SHARED_TOKENS
        self.computed_tokens = 0

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
        """See `Engine.prefill`."""
        if not tokens:
            raise ValueError("prefill needs at least one token")
        start = len(self._tokens[slot])
        self._check_room(start + len(tokens))
        with self._computing({slot: start}):
            tokens = self._restore(slot, tokens)
            self.computed_tokens = len(tokens)
            if self._sharing and len(tokens) >= self.least_shared:
                self._lead(slot, tokens[:-1], lambda done: _report(on_progress, done, len(tokens)))
                self._finish_shared({slot: tokens[-1]}, {slot: len(self._tokens[slot]) + len(tokens) - 1})
                _report(on_progress, len(tokens), len(tokens))
            else:
                self._prefill_exact(slot, tokens, on_progress)
        self._tokens[slot].extend(tokens)
        if self._stored is not None and len(tokens) > MIN_GAIN:
            self._stored.store(slot, self._tokens[slot][:-1])
        logits: NDArray[np.float32] = self._logits[slot]
        return logits

    def prefill_together(self, prompts: Mapping[int, Sequence[int]]) -> NDArray[np.float32]:
        """See `Engine.prefill_together`."""
        if not prompts or not all(prompts.values()):
            raise ValueError("a prefill needs at least one slot, and a token for each")
        lengths = {slot: len(self._tokens[slot]) for slot in prompts}
        self._check_room(max(lengths[slot] + len(tokens) for slot, tokens in prompts.items()))
        shared = {
            slot: tokens for slot, tokens in prompts.items() if self._sharing and len(tokens) >= self.least_shared
        }
        with self._computing(lengths):
            if exact := {slot: tokens for slot, tokens in prompts.items() if slot not in shared}:
                self._prefill_exact_together(exact)
            if shared:
                self._lead_together({slot: tokens[:-1] for slot, tokens in shared.items()})
                ends = {slot: lengths[slot] + len(tokens) - 1 for slot, tokens in shared.items()}
                self._finish_shared({slot: tokens[-1] for slot, tokens in shared.items()}, ends)
        self.computed_tokens = sum(len(tokens) for tokens in prompts.values())
        for slot, tokens in prompts.items():
            self._tokens[slot].extend(tokens)
        logits: NDArray[np.float32] = self._logits[list(prompts)]
        return logits

    def step(self, tokens: Mapping[int, int]) -> NDArray[np.float32]:
        """See `Engine.step`."""
        if not tokens:
            raise ValueError("a step needs at least one slot")
        lengths = {slot: len(self._tokens[slot]) for slot in tokens}
        self._check_room(max(lengths.values()) + 1)
        with self._computing(lengths):
            self._step(tokens, lengths)
        for slot, token in tokens.items():
            self._tokens[slot].append(token)
        logits: NDArray[np.float32] = self._logits[list(tokens)]
        return logits

    def truncate(self, slot: int, length: int) -> int:
        """See `Engine.truncate`."""
        held = self._tokens[slot]
        if length >= len(held):
            return len(held)
        kept = self._truncate_cells(slot, max(0, length))
        del held[kept:]
        return kept

    def copy(self, source: int, target: int) -> None:
        """See `Engine.copy`."""
        if source != target:
            self._copy_cells(source, target)
            self._tokens[target] = list(self._tokens[source])

    def cancel(self) -> None:
        """See `Engine.cancel`."""
        if self._cancellable:
            self._cancel.set()

    @abstractmethod
    def _prefill_exact(self, slot: int, tokens: Sequence[int], on_progress: Progress | None) -> None:
        """Let every bucket compute every token; the last one's logits go to `_logits[slot]`."""

    @abstractmethod
    def _prefill_exact_together(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """The same for several slots."""

    @abstractmethod
    def _lead(self, slot: int, tokens: Sequence[int], on_done: Callable[[int], None]) -> None:
        """Compute `tokens` once and let every bucket have them; `on_done` is told how many are done."""

    @abstractmethod
    def _lead_together(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """The same for several slots."""

    @abstractmethod
    def _finish_shared(self, tokens: Mapping[int, int], lengths: Mapping[int, int]) -> None:
        """Compute a prompt's last token in every bucket, as `_step` does, right after `_lead`."""

    @abstractmethod
    def _step(self, tokens: Mapping[int, int], lengths: Mapping[int, int]) -> None:
        """Append one token to each slot, which has the length given; its logits go to `_logits[slot]`."""

    @abstractmethod
    def _truncate_cells(self, slot: int, length: int) -> int:
        """Forget what llama.cpp holds of the slot beyond `length` in every bucket; the length kept."""

    @abstractmethod
    def _copy_cells(self, source: int, target: int) -> None:
        """Make llama.cpp hold in slot `target` what it holds in `source`."""

    def _check_room(self, needed: int) -> None:
        if needed > self._slot_cells:
            raise ContextFullError(needed, self._slot_cells)

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
        self._truncate_cells(slot, 0)
        self._tokens[slot] = []

    def _run_all(self, job: Callable[[int], None], count: int, pool: Executor | None = None) -> None:
        """Run job(0) ... job(count - 1) on the pool; wait for all of them, then raise the first error."""
        futures = [(pool or self._pool).submit(job, index) for index in range(count)]
        wait_for(futures, self._cancel.set)
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
                del self._tokens[slot][self._truncate_cells(slot, min(length, len(self._tokens[slot]))) :]
            raise
        finally:
            self._cancellable = False
            self._cancel.clear()


def fitting(prompts: Mapping[int, Sequence[int]], limit: int) -> Iterator[list[int]]:
    """The slots of `prompts` in groups of at most `limit` tokens; a longer prompt is a group of its own."""
    group: list[int] = []
    held = 0
    for slot, tokens in prompts.items():
        if group and held + len(tokens) > limit:
            yield group
            group, held = [], 0
        group.append(slot)
        held += len(tokens)
    yield group


def _report(on_progress: Progress | None, done: int, total: int) -> None:
    if on_progress is not None:
        on_progress(done, total)
