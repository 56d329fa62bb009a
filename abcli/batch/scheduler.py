"""Answers a stream of jobs in the slots of one engine: a finished prompt's place is taken at once by the next."""

from __future__ import annotations

import hashlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TypeVar

from abcli.batch.jobs import BadLine, Job, Result, result_of
from abcli.batch.prefixes import HeldPrompts, PrefixKeys, prefix_keys
from abcli.chat.asking import Asked
from abcli.engine.engine import Engine
from abcli.errors import AbcliError, CancelledError, ContextFullError, NativeError, OutOfMemoryError
from abcli.generate import Answer as RunningAnswer
from abcli.generate import Generator
from abcli.reuse import ReuseRule

LOOK_AHEAD = 256
# How many blocks more than the oldest prompt another must share with a slot to be taken first.
_WORTH_OVERTAKING = 2
# Greedy answers that are remembered for prompts that come again.
_REMEMBERED = 10_000
# They concern the model or the machine, not one prompt.
_FATAL = (NativeError, OutOfMemoryError, CancelledError)

Ask = Callable[[Job], Asked]

Item = TypeVar("Item")


class _ReadingStoppedError(BaseException):
    """Leaves the reading of a job, which may wait for ever, from a signal handler."""


class _End:
    """What stands for a job at the end of the input."""


_END = _End()


class StopSwitch:
    """How a run is interrupted: first it finishes what it has begun, then it stops."""

    def __init__(self, cancel: Callable[[], None]) -> None:
        """`cancel` makes a running computation raise CancelledError."""
        self._cancel = cancel
        self.stopping = False
        """No further job is begun."""
        self.cancelled = False
        """Nothing more is computed."""
        self._reading = False

    def press(self) -> None:
        """Finish what is begun; at the second call, stop at once. Made for a signal handler."""
        if self.stopping:
            self.cancelled = True
            self._cancel()
            return
        self.stopping = True
        if self._reading:
            raise _ReadingStoppedError

    def read(self, read: Callable[[], Item]) -> Item | None:
        """What `read` gives, which may wait for ever: None if the switch is pressed meanwhile."""
        with suppress(_ReadingStoppedError):
            self._reading = True
            try:
                return read()
            finally:
                self._reading = False
        return None


@dataclass
class Totals:
    """What a scheduler has done so far; numbers of tokens and of results."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    answered: int = 0
    duplicates: int = 0
    errors: int = 0


@dataclass(frozen=True)
class _Waiting:
    job: Job
    asked: Asked
    keys: PrefixKeys
    digest: bytes
    """Stands for the prompt and its settings if any two answers would be the same, else empty."""
    begun: int
    """How many prompts had been begun when this one came."""


@dataclass
class _Running:
    item: _Waiting
    counted: int = 0
    """How many of the answer's tokens are in the totals."""


@dataclass
class _Known:
    """A greedy answer, or who waits for it."""

    result: Result | None = None
    followers: list[Job] = field(default_factory=list)


class Scheduler:
    """Answers jobs in all slots of an engine together. One thread at a time; one use."""

    def __init__(
        self,
        jobs: Iterable[Job | BadLine | None],
        engine: Engine,
        generator: Generator,
        ask: Ask,
        switch: StopSwitch,
        *,
        reuse: ReuseRule | None = None,
        look_ahead: int = LOOK_AHEAD,
        totals: Totals | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> None:
        """`ask` gives what is asked for a job and may raise AbcliError, which becomes the job's error.

        `jobs` gives None if there is no job now, but may be later; while the scheduler is `idle` it should wait.
        Among `look_ahead` jobs those are found that share what they begin with. `totals` are counted up as it goes;
        `on_step` is called after every step.
        """
        self.totals = totals or Totals()
        self.finished = False
        """Whether every job has had its result."""
        self._jobs = iter(jobs)
        self._engine = engine
        self._generator = generator
        self._ask = ask
        self._switch = switch
        self._reuse = reuse or ReuseRule()
        self._look_ahead = look_ahead
        self._on_step = on_step or (lambda: None)
        self._exhausted = False
        self._waiting: list[_Waiting] = []
        self._following = 0
        self._running: dict[int, _Running] = {}
        # The slots of those whose prompts are not complete, so that nobody can take them over yet.
        self._computing: set[int] = set()
        self._free = list(range(engine.slots))
        self._held = HeldPrompts()
        self._known: OrderedDict[bytes, _Known] = OrderedDict()
        self._ready: deque[Result] = deque()
        self._begun = 0
        self._sharing = True
        self._left_out = False

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do until another job comes."""
        return not (self._waiting or self._running or self._ready)

    def results(self) -> Iterator[Result]:
        """The results as they become ready; every job has one, unless the run is stopped.

        Raises CancelledError when the switch is pressed twice, and what concerns the model rather than a job:
        NativeError, OutOfMemoryError. Answers in progress are then dropped.
        """
        try:
            while True:
                self._fill()
                while self._ready:
                    yield self._ready.popleft()
                self._begin_waiting()
                if self._running:
                    self._step()
                elif self.idle and (self._exhausted or self._switch.stopping):
                    self.finished = self._exhausted and not self._left_out
                    return
        finally:
            for slot in self._running:
                self._generator.drop(slot)

    def _fill(self) -> None:
        """Read jobs until enough are known to look ahead."""
        while len(self._waiting) + self._following < self._look_ahead and len(self._ready) < self._look_ahead:
            item = self._read()
            if item is None:
                return
            if isinstance(item, BadLine):
                self.totals.errors += 1
                self._ready.append(item.result())
            else:
                self._admit(item)

    def _read(self) -> Job | BadLine | None:
        """The next item of the input; None at its end, if there is none now, and when the run is to stop."""
        if self._exhausted or self._switch.stopping:
            return None
        item = self._switch.read(lambda: next(self._jobs, _END))
        if isinstance(item, _End):
            self._exhausted = True
            return None
        return item

    def _admit(self, job: Job) -> None:
        """Let a job wait for a slot, unless its answer or an error is already known."""
        try:
            asked = self._ask(job)
            if len(asked.tokens) > self._engine.context_size:
                raise ContextFullError(len(asked.tokens), self._engine.context_size)
        except _FATAL:
            raise
        except AbcliError as error:
            self._fail(job, error)
            return
        digest = _digest(job, asked)
        if digest:
            known = self._known.get(digest)
            if known is None:
                self._known[digest] = _Known()
            elif known.result is None:
                known.followers.append(job)
                self._following += 1
                return
            else:
                self._known.move_to_end(digest)
                self._repeat(known.result, job)
                return
        self._waiting.append(_Waiting(job, asked, prefix_keys(asked.tokens), digest, self._begun))

    def _begin_waiting(self) -> None:
        """Give every free slot a prompt, as long as there are any whose shared beginning is not being computed yet."""
        if self._switch.stopping and self._waiting:
            self._left_out = True
            self._waiting.clear()
        while self._free and self._waiting and not self._switch.stopping:
            index = self._next_index()
            if index is None:
                return
            item = self._waiting[index]
            slot = self._choose_slot(item)
            del self._waiting[index]
            self._begin(item, slot, self._held.owner(item.keys, self._computing))

    def _next_index(self) -> int | None:
        """The place of the oldest prompt, or of one that shares much more with what the slots hold.

        None is overtaken for long, except one that shares with a prompt that is being computed: it waits for that.
        """
        coming = self._computing
        ready = [
            index
            for index, item in enumerate(self._waiting)
            if not coming or self._held.owner(item.keys, coming) not in coming
        ]
        if not ready:
            return None
        blocks = {index: self._held.blocks(self._waiting[index].keys) for index in ready}
        oldest, best = ready[0], max(ready, key=lambda index: (blocks[index], -index))
        patient = self._begun - self._waiting[oldest].begun < 2 * self._look_ahead
        return best if patient and blocks[best] >= blocks[oldest] + _WORTH_OVERTAKING else oldest

    def _choose_slot(self, item: _Waiting) -> int:
        """The free slot whose content those that wait would miss least, preferably one that `item` can use."""
        if len(self._free) == 1:
            return self._free[0]
        waiting = [other.keys for other in self._waiting]
        owner = self._held.owner(item.keys)
        return min(self._free, key=lambda slot: (self._held.loss(slot, item.keys, waiting), slot != owner, slot))

    def _begin(self, item: _Waiting, slot: int, source: int | None) -> None:
        """Let the prompt be computed, apart from what `slot` or `source` holds of it."""
        self._begun += 1
        self._take_over(item, slot, source)
        try:
            answer = self._generator.start(slot, item.asked.tokens, item.asked.generation)
        except _FATAL:
            raise
        except AbcliError as error:
            self._held.forget(slot)
            self._end(item, error)
            return
        self._free.remove(slot)
        self._held.hold(slot, item.asked.tokens, item.keys)
        self._running[slot] = _Running(item)
        self._computing.add(slot)
        self.totals.prompt_tokens += answer.statistics.prompt_tokens
        self.totals.cached_tokens += answer.statistics.cached_tokens

    def _take_over(self, item: _Waiting, slot: int, source: int | None) -> None:
        """Leave in `slot` what the prompt may have of what the slot or `source` holds, but no more."""
        usable, tokens = 0, item.asked.tokens
        if self._sharing:
            usable = self._reuse.usable(self._held.prompt(slot), tokens)
            if source is not None and (more := self._reuse.usable(self._held.prompt(source), tokens)) > usable:
                self._engine.copy(source, slot)
                usable = more
        # A recurrent model cannot go back to a shared beginning, so there is no use in copying.
        self._sharing = self._engine.truncate(slot, usable) == usable and self._sharing

    def _step(self) -> None:
        """One token for every answer in progress, and a piece of the prompts that wait."""
        if self._switch.cancelled:
            raise CancelledError
        for piece in self._generator.step():
            self._computing.discard(piece.answer.slot)
            self._note(piece.answer)
        self._on_step()

    def _note(self, answer: RunningAnswer) -> None:
        """Count what an answer has gained, and end it if it is complete."""
        running = self._running[answer.slot]
        self.totals.completion_tokens += answer.statistics.completion_tokens - running.counted
        running.counted = answer.statistics.completion_tokens
        if answer.error is None and answer.finish_reason is None:
            return
        del self._running[answer.slot]
        self._free.append(answer.slot)
        self._end(running.item, answer.error or answer)

    def _end(self, item: _Waiting, outcome: RunningAnswer | AbcliError) -> None:
        """Make a result for a job, and for those with the same prompt that wait for it."""
        known = self._known.get(item.digest)
        followers = known.followers if known is not None else []
        self._following -= len(followers)
        if isinstance(outcome, AbcliError):
            self._known.pop(item.digest, None)
            for job in (item.job, *followers):
                self._fail(job, outcome)
            return
        result = result_of(item.job, item.asked.reader().whole(outcome))
        self.totals.answered += 1
        self._ready.append(result)
        if known is not None:
            known.result, known.followers = result, []
            for job in followers:
                self._repeat(result, job)
            self._forget_some()

    def _forget_some(self) -> None:
        """Keep the number of known answers in bounds; those that are awaited stay."""
        while len(self._known) > _REMEMBERED + self._look_ahead:
            oldest = next((digest for digest, known in self._known.items() if known.result is not None), None)
            if oldest is None:
                return
            del self._known[oldest]

    def _repeat(self, result: Result, job: Job) -> None:
        """Answer `job` with the result of a job that has the same prompt."""
        self.totals.answered += 1
        self.totals.duplicates += 1
        seed = job.generation.sampling.seed
        self._ready.append(
            replace(
                result,
                index=job.index,
                line=job.line,
                identifier=job.identifier,
                seed=seed if seed >= 0 else result.seed,
                extra=job.extra,
            )
        )

    def _fail(self, job: Job, error: AbcliError) -> None:
        self.totals.errors += 1
        result = Result(job.index, job.line, job.identifier, error=error.message, hint=error.hint, extra=job.extra)
        self._ready.append(result)


def _digest(job: Job, asked: Asked) -> bytes:
    """Equal for jobs whose answers must be equal; empty if chance has a say in the answer."""
    sampling = job.generation.sampling
    if sampling.temperature > 0 or sampling.xtc_probability > 0:
        return b""
    same = replace(job.generation, sampling=replace(sampling, seed=0))
    return hashlib.blake2b(repr((same, job.options, list(asked.tokens))).encode(), digest_size=16).digest()
