"""The one thread that computes: as many answers at once as the engine has slots, the others wait their turn."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from abcli.errors import AbcliError, CancelledError
from abcli.generate import Answer as RunningAnswer
from abcli.generate import Generator, common_prefix
from abcli.serve.chosen import scored
from abcli.serve.problems import out_of_time, refused
from abcli.serve.tickets import Delivery, Progress, Ticket

log = logging.getLogger("abcli.serve")

# Copying fewer tokens from another slot, or waiting for it to compute them, is not worth it.
_WORTH_SHARING = 64
# So many of those that wait may be overtaken by one whose beginning need not be waited for.
_LOOK_AHEAD = 64


class Slots(Protocol):
    """What the worker needs to know of an engine; see `abcli.engine.engine.Engine`."""

    @property
    def slots(self) -> int:
        """The number of slots, numbered from 0."""

    def tokens(self, slot: int) -> Sequence[int]:
        """The tokens a slot holds."""

    def truncate(self, slot: int, length: int) -> int:
        """Forget what follows the first `length` tokens."""

    def copy(self, source: int, target: int) -> None:
        """Make slot `target` hold what slot `source` holds."""

    @property
    def outputs(self) -> int:
        """The most tokens that `read` takes at once."""

    def read(self, tokens: Mapping[int, Sequence[int]]) -> dict[int, NDArray[np.float32]]:
        """Append tokens to slots; the logits [tokens, buckets, vocabulary] after each."""


@dataclass
class Counts:
    """What was done so far: numbers of answers and tokens, seconds."""

    answers: int = 0
    errors: int = 0
    given_up: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    busy: int = 0
    """Slots that were busy, summed over the steps."""
    agreement_sum: float = 0.0
    asked_steps: int = 0


class Worker:
    """Answers tickets in the slots of an engine, all of them together, on a thread of its own.

    Every method may be called from any thread.
    """

    def __init__(self, engine: Slots, generator: Generator) -> None:
        """Nobody else may use the engine and the generator as long as the thread runs."""
        self.counts = Counts()
        self._engine = engine
        self._generator = generator
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: dict[int, Ticket] = {}
        # When each slot was last used; an empty one never was.
        self._used = [0.0] * engine.slots
        self._draining = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="abcli-serve", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def slots(self) -> int:
        """How many answers are computed at once."""
        return self._engine.slots

    @property
    def waiting(self) -> int:
        """How many answers wait for a slot."""
        return len(self._waiting)

    @property
    def running(self) -> dict[int, Ticket]:
        """The tickets that are answered now, by slot."""
        return dict(self._running)

    @property
    def accepts(self) -> bool:
        """Whether new tickets are taken."""
        return not (self._draining or self._stopping)

    def submit(self, ticket: Ticket) -> None:
        """Let a ticket be answered. Raises RefusedError where no more are taken."""
        with self._changed:
            self._check_open()
            self._waiting.append(ticket)
            self._changed.notify()

    def give_up(self, ticket: Ticket) -> None:
        """Nobody waits for the answer any more: its slot is free after the running step."""
        ticket.gone = True
        with self._changed:
            self._changed.notify()

    def drain(self) -> None:
        """Take no new tickets; the thread ends when those it has are answered."""
        with self._changed:
            self._draining = True
            self._changed.notify()

    def stop(self) -> None:
        """End now: what waits or runs gets CancelledError."""
        self.stop_soon()
        with self._changed:
            self._changed.notify()

    def stop_soon(self) -> None:
        """As `stop` where something is computed; for signal handlers, which must not wait for a lock."""
        self._stopping = True
        self._generator.cancel()

    def join(self, seconds: float | None = None) -> bool:
        """Wait for the thread to end; whether it has."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _check_open(self) -> None:
        if not self.accepts:
            raise refused(503, "unavailable_error", "the server is stopping", Retry_After="5")

    def _run(self) -> None:
        while self._await_work():
            try:
                self._turn()
            except Exception as error:
                # A fault of ours; the others must not wait for ever.
                log.exception("internal error")
                self._fail(AbcliError(f"internal error: {type(error).__name__}"))
        self._fail(CancelledError())

    def _turn(self) -> None:
        """One round: what each answer gains in it."""
        self._drop_the_lost()
        self._begin_waiting()
        self._score()
        if any(ticket.running is not None for ticket in self._running.values()):
            self._step()

    def _await_work(self) -> bool:
        """Wait until there is something to do; False when the thread is to end."""
        with self._changed:
            while not (self._stopping or self._waiting or self._running):
                if self._draining:
                    return False
                self._changed.wait()
            return not self._stopping

    def _drop_the_lost(self) -> None:
        """Free the slots of those that nobody waits for, or that took too long."""
        now = monotonic()
        for slot, ticket in list(self._running.items()):
            if ticket.gone or now > ticket.deadline:
                self._generator.drop(slot)
                self._leave(slot)
                self._lose(ticket)
        with self._changed:
            lost = [ticket for ticket in self._waiting if ticket.gone or now > ticket.deadline]
            for ticket in lost:
                self._waiting.remove(ticket)
        for ticket in lost:
            self._lose(ticket)

    def _lose(self, ticket: Ticket) -> None:
        self.counts.given_up += 1
        if not ticket.gone:
            error = out_of_time()
            self._deliver(ticket, Delivery(error=error))

    def _begin_waiting(self) -> None:
        """Give free slots to those that wait, in their order, but for those whose beginning is being computed."""
        free = [slot for slot in range(self.slots) if slot not in self._running]
        with self._changed:
            candidates = list(self._waiting)[:_LOOK_AHEAD] if free else []
        for ticket in candidates:
            if not free:
                return
            slot = self._choose_slot(ticket, free)
            if slot is None:
                continue
            with self._changed:
                self._waiting.remove(ticket)
            if self._begin(ticket, slot):
                free.remove(slot)

    def _choose_slot(self, ticket: Ticket, free: Sequence[int]) -> int | None:
        """The slot for a ticket, which holds then what any slot does of its beginning; None where that is to come.

        A slot that mostly holds what the ticket needs goes on with it; else an empty one, or the one that was not used
        for longest, takes over the beginning, so that what others said stays where it is.
        """
        oldest = min(free, key=lambda slot: (bool(self._engine.tokens(slot)), self._used[slot], slot))
        if ticket.fresh or ticket.score is not None:
            self._engine.truncate(oldest, 0)
            return oldest
        held = {slot: self._engine.tokens(slot) for slot in range(self.slots)}
        common = {slot: common_prefix(tokens, ticket.tokens) for slot, tokens in held.items()}
        best = max(common.values())
        computing = {slot: other for slot, other in self._running.items() if not other.begun}
        coming = max((common_prefix(other.tokens, ticket.tokens) for other in computing.values()), default=0)
        if coming >= max(common[slot] for slot in common if slot not in computing) + _WORTH_SHARING:
            return None
        going_on = [slot for slot in free if common[slot] and 2 * common[slot] >= len(held[slot])]
        target = max(going_on, key=lambda slot: common[slot]) if going_on else oldest
        if common[target] < len(held[target]) and not held[oldest]:
            target = oldest
        if best >= common[target] + _WORTH_SHARING:
            self._engine.copy(max(common, key=lambda slot: common[slot]), target)
        return target

    def _begin(self, ticket: Ticket, slot: int) -> bool:
        """Let a ticket be answered in a slot; False where that cannot be, of which it is told."""
        if ticket.score is not None and len(ticket.scored) < len(ticket.tokens) - 1:
            self._running[slot] = ticket
            return True
        try:
            on_progress = partial(self._progressed, ticket, monotonic()) if ticket.progress else None
            ticket.running = self._generator.start(slot, ticket.tokens, ticket.config, on_progress)
        except AbcliError as error:
            self._end_with_error(ticket, error)
            return False
        if on_progress is not None:
            on_progress(0, 0)
        self._running[slot] = ticket
        self._used[slot] = monotonic()
        return True

    def _progressed(self, ticket: Ticket, begin: float, computed: int, _all: int) -> None:
        """Tell how much of a prompt is computed."""
        assert ticket.running is not None  # noqa: S101 - it was started
        statistics = ticket.running.statistics
        cached = statistics.cached_tokens
        progress = Progress(statistics.prompt_tokens, cached, cached + computed, monotonic() - begin)
        self._deliver(ticket, Delivery(progress=progress))

    def _score(self) -> None:
        """Read on in the prompts of which it is asked how likely they are."""
        scoring = {slot: ticket for slot, ticket in self._running.items() if ticket.running is None}
        if not scoring:
            return
        size = max(1, self._engine.outputs // len(scoring))
        parts = {
            slot: ticket.tokens[len(ticket.scored) : min(len(ticket.scored) + size, len(ticket.tokens) - 1)]
            for slot, ticket in scoring.items()
        }
        try:
            found = self._engine.read(parts)
            for slot, ticket in scoring.items():
                for logits in found[slot]:
                    logprobs = self._generator.merged(logits, ticket.config.merge).log_probabilities
                    ticket.scored.append(scored(ticket.tokens[len(ticket.scored) + 1], logprobs, ticket.score or 0))
        except AbcliError as error:
            self._fail(error)
            return
        for slot, ticket in scoring.items():
            if len(ticket.scored) == len(ticket.tokens) - 1:
                self._deliver(ticket, Delivery(scored=tuple(ticket.scored)))
                del self._running[slot]
                self._begin(ticket, slot)

    def _step(self) -> None:
        self.counts.steps += 1
        self.counts.busy += len(self._running)
        try:
            pieces = self._generator.step()
        except AbcliError as error:
            self._fail(error)
            return
        for piece in pieces:
            ticket = self._running[piece.answer.slot]
            ticket.begun = True
            if piece.answer.error is not None:
                self._leave(piece.answer.slot)
                self._end_with_error(ticket, piece.answer.error)
                continue
            if piece.answer.finish_reason is not None:
                self._leave(piece.answer.slot)
                self._count(piece.answer)
            chosen = ticket.watcher.take(len(piece.answer.tokens)) if ticket.watcher is not None else ()
            statistics = replace(piece.answer.statistics) if ticket.timings else None
            self._deliver(ticket, Delivery(ticket.reader.add(piece), chosen, statistics=statistics))

    def _count(self, answer: RunningAnswer) -> None:
        counts, statistics = self.counts, answer.statistics
        counts.answers += 1
        counts.prompt_tokens += statistics.prompt_tokens
        counts.cached_tokens += statistics.cached_tokens
        counts.completion_tokens += statistics.completion_tokens
        counts.prefill_seconds += statistics.prefill_seconds
        counts.decode_seconds += statistics.decode_seconds
        counts.agreement_sum += statistics.agreement_sum
        counts.asked_steps += statistics.asked_steps

    def _fail(self, error: AbcliError) -> None:
        """What concerns the model or the machine ends all that runs, and all that waits if the thread is to end."""
        for slot, ticket in list(self._running.items()):
            self._generator.drop(slot)
            self._leave(slot)
            self._end_with_error(ticket, error)
        if self._stopping:
            with self._changed:
                waiting = list(self._waiting)
                self._waiting.clear()
            for ticket in waiting:
                self._end_with_error(ticket, error)

    def _leave(self, slot: int) -> None:
        del self._running[slot]
        self._used[slot] = monotonic()

    def _end_with_error(self, ticket: Ticket, error: AbcliError) -> None:
        self.counts.errors += 1
        self._deliver(ticket, Delivery(error=error))

    @staticmethod
    def _deliver(ticket: Ticket, delivery: Delivery) -> None:
        if not ticket.gone:
            ticket.deliver(delivery)
