"""N buckets that read and continue the tokens of several slots; an engine knows nothing about text."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from math import log

import numpy as np
from numpy.typing import NDArray

from abcli.config import MergeRule
from abcli.engine.backend import Backend, Part, Sharing
from abcli.engine.prompt_cache import Piece, PromptCache
from abcli.engine.waiting import Waiting
from abcli.errors import ContextFullError
from abcli.native.llama import CancelFlag
from abcli.native.owner import Owner
from abcli.native.state import StateError

# Sharing is faster from about 4 new tokens on, but approximate: so short a text is worth computing exactly.
MIN_SHARED_TOKENS = 24
# What is read from the disk must save at least this many tokens, and what is written have cost as many.
MIN_GAIN = 128

# Called with (tokens done, tokens in all) after each piece of a prompt.
Progress = Callable[[int, int], None]
# Called with the native bucket's logits [vocab]: whether they decide alone.
Gate = Callable[[NDArray[np.float32]], bool]
NO_GATES: Mapping[int, Gate] = {}


class Engine(Owner):
    """N buckets decoding the same tokens in several slots, and reading prompts piece by piece meanwhile.

    Logits are float32 [buckets, vocab] views of a buffer that stays valid until the next step or prefill. What the
    native bucket decoded alone is owed to the others: they get it when they are next asked, and never if they are not.

    After an exception every slot holds what it held before the call, and what was waiting waits; a slot of a
    recurrent model, or one that was being filled from the prompt cache, may be empty. One thread at a time may use an
    engine; only `cancel` may be called from any thread or signal handler.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        slots: int,
        context_size: int,
        vocabulary_size: int,
        least_shared: int = MIN_SHARED_TOKENS,
        cache: PromptCache | None = None,
        forgets: bool = True,
    ) -> None:
        """The backend is the engine's from now on; its slots hold `context_size` tokens each.

        Where it shares, prompts of at least `least_shared` tokens (2 or more) are computed by the leader. `cache` keeps
        the state of long prompts.
        """
        self._backend = backend
        self._stack = ExitStack()
        self._stack.callback(backend.close)
        self._buckets = range(backend.buckets)
        self._others = [bucket for bucket in self._buckets if bucket != backend.native]
        self._least_shared = least_shared
        self._cache = cache
        self._cancellable = False
        self._tokens: list[list[int]] = [[] for _ in range(slots)]
        self._waiting = Waiting(lambda shared: backend.piece(1 if shared else backend.buckets))
        self._agreements: Mapping[int, float] = {}
        self._logits: NDArray[np.float32] = np.empty((slots, len(backend.bases), vocabulary_size), np.float32)
        self.forgets = forgets
        """Whether a slot can forget a part of what it holds, as slots of recurrent models cannot."""
        self.context_size: int = context_size
        """The number of tokens each slot can hold."""

    @property
    def bases(self) -> tuple[float, ...]:
        """The RoPE base of each bucket."""
        return self._backend.bases[: self._backend.buckets]

    @property
    def first_base(self) -> float:
        """The base that computes a token alone where a gate may let it decide: a bucket's or the leader's."""
        return self._backend.bases[self._backend.native]

    @property
    def vocabulary_size(self) -> int:
        """The number of logits per bucket."""
        return int(self._logits.shape[2])

    @property
    def slots(self) -> int:
        """The number of slots, numbered from 0."""
        return len(self._tokens)

    @property
    def sharing(self) -> Sharing:
        """How prompts are computed, and why."""
        return self._backend.sharing

    @property
    def turning(self) -> str:
        """How rows of one batch come to have several bases; empty where they need not."""
        return self._backend.turning

    @property
    def least_shared(self) -> int:
        """The fewest tokens of a prompt that one bucket computes for all; 1 where each computes its own."""
        return self._least_shared if self.sharing.shared else 1

    def tokens(self, slot: int) -> Sequence[int]:
        """The tokens `slot` holds, oldest first."""
        return self._tokens[slot]

    def waiting(self, slot: int) -> int:
        """How many tokens of the slot's prompt are yet to be computed."""
        return self._waiting.left(slot)

    def begin(self, slot: int, tokens: Sequence[int]) -> int:
        """Let the steps to come append `tokens` (one or more) to `slot`; how many of them have to be computed.

        The others come from the prompt cache, at once. The step that computes the last one gives the slot's logits.
        Raises ContextFullError if they don't fit, CancelledError after `cancel`, NativeError.
        """
        held = self._tokens[slot]
        if not tokens or slot in self._waiting:
            raise ValueError("a prompt needs at least one token, and a slot that waits for no other")
        self._check_room(len(held) + len(tokens))
        with self._computing():
            left = self._restore(slot, tokens)
        self._waiting.add(slot, left, shared=self.sharing.shared and len(left) >= self._least_shared)
        return len(left)

    def step(
        self,
        tokens: Mapping[int, int],
        merge: MergeRule | None = None,
        gates: Mapping[int, Gate] = NO_GATES,
    ) -> dict[int, NDArray[np.float32]]:
        """Append one token to each slot named, and one piece in all to the prompts that wait.

        The logits [buckets, vocab] of each slot named, in the mapping's order, and of each whose prompt is complete
        now; but for rounding they do not depend on what else is computed. In a slot that has a gate the native bucket
        comes first: its logits [1, vocab] are all if the gate lets them decide. With `merge`, a slot's logits may be
        merged already: they are then [1, vocab], and `agreement` tells its agreement. With no slot named, at least one
        prompt must wait. Raises as `begin` does, and what a gate raises.
        """
        if not (tokens or self._waiting) or any(slot in self._waiting for slot in tokens):
            raise ValueError("a step needs a slot or a waiting prompt, and no slot is named whose prompt waits")
        for slot in tokens:
            self._check_room(len(self._tokens[slot]) + 1)
        with self._computing():
            rows = dict(tokens)
            complete = self._advance(rows)
            decided = self._append(rows, merge, gates)
            for slot, computed in complete.items():
                # Every bucket has computed the end of an exact prompt, but the gate is asked all the same.
                gated = slot in gates and slot not in rows and self._backend.native in self._buckets
                if gated and gates[slot](self._logits[slot, self._backend.native]):
                    decided.add(slot)
                self._waiting.drop(slot)
                self._store(slot, computed)
        return {slot: self._logits[slot, self._given(slot, decided)] for slot in (*tokens, *complete)}

    def _given(self, slot: int, decided: Collection[int]) -> slice:
        """Which of a slot's rows are the step's logits."""
        if slot in decided:
            return slice(self._backend.native, self._backend.native + 1)
        return slice(1 if slot in self._agreements else len(self._buckets))

    def agreement(self, slot: int) -> float | None:
        """The agreement of a slot whose logits the last step merged; None for any other."""
        return self._agreements.get(slot)

    def prefill(self, slot: int, tokens: Sequence[int], on_progress: Progress | None = None) -> NDArray[np.float32]:
        """Append `tokens` (one or more) to `slot` while no prompt waits; the logits [buckets, vocab] after the last.

        Raises as `begin` does, and what `on_progress` raises.
        """
        if self._waiting:
            raise ValueError("prompts are waiting")
        with self._computing():
            total = self.begin(slot, tokens)
            while True:
                found = self.step({})
                if on_progress is not None:
                    on_progress(total - self.waiting(slot), total)
                if slot in found:
                    return found[slot]

    @property
    def outputs(self) -> int:
        """The most tokens that `read` takes at once."""
        return self._backend.outputs

    @property
    def native_outputs(self) -> int:
        """The same for the native bucket alone."""
        return self._backend.native_outputs

    def read(self, tokens: Mapping[int, Sequence[int]], *, alone: bool = False) -> dict[int, NDArray[np.float32]]:
        """Append tokens to each slot named, computed by every bucket as in decoding; the logits after each of them.

        These are [tokens, buckets, vocab] arrays, in the mapping's order. `alone` lets the native bucket compute them:
        [tokens, 1, vocab]. One token in each slot, or at most `outputs`, or `native_outputs`, in all; no prompt waits
        there. Raises as `begin` does.
        """
        if not all(tokens.values()) or any(slot in self._waiting for slot in tokens):
            raise ValueError("to read takes at least a token for each slot, in which no prompt waits")
        columns = [self._backend.native] if alone else self._buckets
        shape = len(columns), self.vocabulary_size
        self._agreements = {}
        found = {slot: np.empty((len(taken), *shape), np.float32) for slot, taken in tokens.items()}
        for slot, taken in tokens.items():
            self._check_room(len(self._tokens[slot]) + len(taken))
        with self._computing():
            for slot in tokens:
                self._catch_up(slot, columns)
            self._compute(
                [
                    Part(slot, len(self._tokens[slot]), taken, [found[slot][:, row] for row in range(len(columns))])
                    for slot, taken in tokens.items()
                ],
                columns,
            )
        return found

    def cells(self, slot: int, length: int) -> Iterator[Piece]:
        """What the leader of shared prompts holds of the slot's first `length` tokens; nothing if it has fewer.

        Raises NativeError.
        """
        if self._backend.length(slot, self._backend.leader) < length:
            return
        size = self._backend.piece(1)
        for start in range(0, length, size):
            end = min(start + size, length)
            yield Piece(start, end, self._backend.read_cells(slot, start, end))

    def drop(self, slot: int) -> None:
        """Compute no more of the slot's prompt; what it holds stays."""
        self._waiting.drop(slot)

    def truncate(self, slot: int, length: int) -> int:
        """Forget what follows the first `length` tokens, and a prompt that waits; the number of tokens kept.

        A recurrent model cannot forget a part: it then forgets everything and 0 is returned.
        """
        self.drop(slot)
        if length < len(self._tokens[slot]):
            self._keep(slot, max(0, length))
        return len(self._tokens[slot])

    def copy(self, source: int, target: int) -> None:
        """Make slot `target` hold what slot `source` holds; a prompt that waits in `target` is dropped."""
        if source != target:
            self.drop(target)
            self._backend.copy(source, target)
            self._tokens[target] = list(self._tokens[source])

    def cancel(self) -> None:
        """Make the running computation raise CancelledError soon; without one, do nothing."""
        if self._cancellable:
            self._cancel.set()

    def _advance(self, rows: dict[int, int]) -> dict[int, int]:
        """Compute a piece of what waits; the slots whose prompts are then complete, and how many tokens these have.

        The last token of a shared prompt is left to every bucket: it is put into `rows`.
        """
        exact, led, complete = [], [], {}
        for piece in self._waiting.advance():
            slot, prompt = piece.slot, piece.prompt
            if prompt.shared:
                led.append(self._part(slot, piece.tokens, output=False))
            else:
                exact.append(self._part(slot, piece.tokens, output=piece.ends))
            if piece.ends:
                complete[slot] = len(prompt.tokens)
                if prompt.shared:
                    rows[slot] = prompt.tokens[-1]
        for parts, columns in ((exact, self._buckets), (led, [self._backend.leader])):
            if parts:
                for part in parts:
                    self._catch_up(part.slot, columns)
                self._compute(parts, columns)
        return complete

    def _append(self, rows: Mapping[int, int], merge: MergeRule | None, gates: Mapping[int, Gate]) -> set[int]:
        """Append a token to each slot; those whose native bucket decides alone, so that it alone has the token."""

        def compute(slots: Collection[int], columns: Sequence[int], merge: MergeRule | None) -> Mapping[int, float]:
            parts = [
                Part(slot, len(self._tokens[slot]), (rows[slot],), [self._logits[slot, column] for column in columns])
                for slot in slots
            ]
            return self._backend.compute(parts, columns, merge) if parts else {}

        decided: set[int] = set()
        columns: Sequence[int] = self._buckets
        if self._others and not gates.keys().isdisjoint(rows):
            native = self._backend.native
            gated = [slot for slot in rows if slot in gates]
            first, columns = gated, self._others
            if native in self._buckets:
                # What is computed in two batches cannot be merged where it is computed.
                first, merge = list(rows), None
            for slot in first:
                self._catch_up(slot, [native])
            compute(first, [native], None)
            decided = {slot for slot in gated if gates[slot](self._logits[slot, native])}
        asked = [slot for slot in rows if slot not in decided]
        for slot in asked:
            self._catch_up(slot, columns)
        self._agreements = compute(asked, columns, merge)
        for slot, token in rows.items():
            self._tokens[slot].append(token)
        return decided

    def _catch_up(self, slot: int, columns: Sequence[int]) -> None:
        """Let `columns` hold all tokens of a slot: they take over what they lack from one that does, or compute it."""
        tokens = self._tokens[slot]
        held = {column: self._backend.length(slot, column) for column in columns}
        for start in sorted({length for length in held.values() if length < len(tokens)}):
            behind = [column for column in columns if held[column] == start]
            try:
                if self.sharing.shared:
                    self._backend.share(slot, self._ahead(slot, behind[0]), behind, start, tokens[start:])
                    continue
                size = self._backend.piece(len(behind))
                for first in range(start, len(tokens), size):
                    self._backend.compute([Part(slot, first, tokens[first : first + size])], behind)
            except BaseException:
                # Some may hold it, and some have cells for it without numbers.
                self._backend.truncate(slot, start, behind)
                raise

    def _ahead(self, slot: int, column: int) -> int:
        """The column that another one takes over from: the leader, or else the nearest base, where all tokens are."""
        bases, leader = self._backend.bases, self._backend.leader
        whole = [other for other in range(len(bases)) if self._backend.length(slot, other) >= len(self._tokens[slot])]
        return leader if leader in whole else min(whole, key=lambda other: abs(log(bases[other] / bases[column])))

    def _part(self, slot: int, tokens: Sequence[int], *, output: bool) -> Part:
        rows = list(self._logits[slot, : len(self._buckets)]) if output else None
        return Part(slot, len(self._tokens[slot]), tokens, rows)

    def _compute(self, parts: Sequence[Part], columns: Sequence[int]) -> None:
        self._backend.compute(parts, columns)
        for part in parts:
            self._tokens[part.slot] += part.tokens

    def _check_room(self, needed: int) -> None:
        if needed > self.context_size:
            raise ContextFullError(needed, self.context_size)

    def _restore(self, slot: int, tokens: Sequence[int]) -> Sequence[int]:
        """Take from the disk what it holds of the slot's tokens followed by `tokens`; what is left to compute."""
        held = len(self._tokens[slot])
        wanted = [*self._tokens[slot], *tokens]
        # At least one token is computed: its logits are needed.
        entry = self._cache.find(wanted[:-1]) if self._cache is not None and len(tokens) > MIN_GAIN else None
        if self._cache is None or entry is None or entry.common < held + MIN_GAIN:
            return tokens
        self._keep(slot, 0)
        for piece in self._cache.read(entry):
            # The last piece may go beyond what is wanted; which tokens stand there, only to be forgotten, is all one.
            if piece.end > self.context_size:
                break
            beyond = max(0, piece.end - entry.common)
            known = wanted[piece.start : piece.end - beyond]
            try:
                self._backend.append_cells(slot, piece.start, [*known, *[0] * beyond], piece.data)
            except StateError:
                self._keep(slot, piece.start)
                break
            self._tokens[slot] += known
            if beyond:
                self._keep(slot, entry.common)
        return wanted[len(self._tokens[slot]) :]

    def _store(self, slot: int, computed: int) -> None:
        """Write the state of a prompt to the disk if it was costly."""
        if self._cache is None or computed <= MIN_GAIN:
            return
        # The leader of a shared prompt may not have the last token.
        length = len(self._tokens[slot]) - 1
        self._cache.write(self._tokens[slot][:length], self.cells(slot, length))

    def _keep(self, slot: int, length: int) -> None:
        """Let a slot hold its first `length` tokens, or nothing where a part cannot be forgotten."""
        if not self._backend.truncate(slot, length):
            self._backend.truncate(slot, length := 0)
        del self._tokens[slot][length:]

    @property
    def _cancel(self) -> CancelFlag:
        return self._backend.cancel

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Allow `cancel` while the block runs; if it fails, put back what the slots held and what was waiting."""
        within, before, waiting = self._cancellable, [len(held) for held in self._tokens], self._waiting.snapshot()
        if not within:
            self._cancel.clear()
        self._cancellable = True
        try:
            yield
        except BaseException:
            held = [tokens[:length] for tokens, length in zip(self._tokens, before, strict=True)]
            for slot, tokens in enumerate(held):
                self._keep(slot, len(tokens))
            self._waiting.restore(waiting, lambda slot: held[slot][len(self._tokens[slot]) :])
            raise
        finally:
            self._cancellable = within
            if not within:
                self._cancel.clear()
