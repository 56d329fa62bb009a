"""Lets the workers of a pool answer a stream of jobs; the counterpart of the scheduler for many processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from time import perf_counter

from abcli.batch.cluster.distribution import Distribution
from abcli.batch.cluster.pool import Died, Event, Joined, Pool, Refused, WorkerReport
from abcli.batch.jobs import BadLine, Job, Result
from abcli.batch.scheduler import LOOK_AHEAD, StopSwitch, Totals
from abcli.errors import BatchError, CancelledError

# A worker that dies so often in a row, without a single result, will do so again.
MOST_FAILURES = 3
# Seconds between two looks at the switch while nothing happens.
_MOMENT = 0.2
# Seconds after which it is said that there is nobody to work.
_PATIENCE = 30.0
_SHOWN_LINES = 5
_END = object()

Notice = Callable[[str], None]


@dataclass
class _State:
    joined: bool = False
    asked: bool = False
    """Whether it owes a report."""
    ended: bool = False
    """Whether it was told to stop, and has."""


class ClusterRun:
    """Answers jobs with the workers of a pool. One use."""

    def __init__(
        self,
        jobs: Iterable[Job | BadLine],
        pool: Pool,
        switch: StopSwitch,
        *,
        look_ahead: int = LOOK_AHEAD,
        totals: Totals | None = None,
        on_step: Callable[[], None] | None = None,
        note: Notice = lambda _text: None,
        warn: Notice = lambda _text: None,
        clock: Callable[[], float] = perf_counter,
    ) -> None:
        """`totals` are counted up as reports come, and `on_step` is called after them; both at least every moment.

        `note` is told which workers there are, and `warn` of those that die.
        """
        self.totals = totals or Totals()
        self._jobs = iter(jobs)
        self._pool = pool
        self._switch = switch
        self._on_step = on_step or (lambda: None)
        self._note = note
        self._warn = warn
        self._clock = clock
        self._distribution = Distribution(pool.workers, look_ahead)
        self._states = [_State() for _ in range(pool.workers)]
        self._counted: list[Totals] = [Totals() for _ in range(pool.workers)]
        self._before = Totals()
        self._ready: deque[Result] = deque()
        self._told: set[str] = set()

    @property
    def finished(self) -> bool:
        """Whether every job has had its result."""
        return self._distribution.finished and not self._ready

    def results(self) -> Iterator[Result]:
        """The results as they become ready; every job has one, unless the run is stopped.

        Raises CancelledError when the switch is pressed twice, BatchError if workers keep dying, and what a worker
        says that makes going on useless. The workers are ended whenever this is.
        """
        begin, told = self._clock(), False
        try:
            for worker in range(self._pool.workers):
                self._pool.start(worker)
            while True:
                self._fill()
                while self._ready:
                    yield self._ready.popleft()
                if self._switch.cancelled:
                    raise CancelledError
                self._hand_out()
                if self._distribution.finished or (self._switch.stopping and self._is_quiet()):
                    return
                for event in self._pool.wait(_MOMENT):
                    # What came before an error is kept.
                    yield from self._take_in(event)
                self._on_step()
                if not told and self._clock() - begin > _PATIENCE:
                    told = True
                    self._tell_if_alone()
        finally:
            self._pool.close()

    def _fill(self) -> None:
        """Read jobs until enough are known to look ahead."""
        while not self._distribution.complete and self._distribution.wanted and len(self._ready) < LOOK_AHEAD:
            if self._switch.stopping:
                return
            item = self._switch.read(lambda: next(self._jobs, _END))
            if isinstance(item, Job):
                self._distribution.add(item)
            elif isinstance(item, BadLine):
                self._before.errors += 1
                self._ready.append(item.result())
            elif item is _END:
                self._distribution.complete = True
        self._sum_up()

    def _hand_out(self) -> None:
        """Give every worker that has reported what it has room for, and ask for the next report."""
        stop = self._switch.stopping
        for worker, state in enumerate(self._states):
            if not state.joined or state.asked or (stop and state.ended):
                continue
            jobs = [] if stop else self._distribution.take(worker)
            if jobs or self._distribution.given(worker):
                self._pool.exchange(worker, jobs, stop=stop)
                state.asked = True

    def _is_quiet(self) -> bool:
        """Whether no worker owes anything, once all are told to stop."""
        return not any(state.asked for state in self._states)

    def _take_in(self, event: Event) -> list[Result]:
        """Keep account of what has happened; the results that it brings."""
        state = self._states[event.worker]
        if isinstance(event, Refused):
            raise event.error
        if isinstance(event, Died):
            self._replace(event)
            return []
        if isinstance(event, Joined):
            state.joined = True
            self._distribution.join(event.worker, event.slots)
            self._note(f"worker {event.worker + 1} of {self._pool.workers}, {event.text}")
            self._pass_on(event)
            return []
        self._pass_on(event)
        state.asked, state.ended = False, event.ended
        self._counted[event.worker] = event.totals
        self._sum_up()
        return self._distribution.answered(event.worker, event.results)

    def _pass_on(self, event: Joined | WorkerReport) -> None:
        """The warnings of a worker, each once whoever says it."""
        for warning in event.warnings:
            if warning not in self._told:
                self._told.add(warning)
                self._warn(f"worker {event.worker + 1}: {warning}")

    def _replace(self, event: Died) -> None:
        """Put another in the place of a worker that has died, unless that has been of no use."""
        worker = event.worker
        lost = self._distribution.given(worker)
        failures = self._distribution.lose(worker)
        _add(self._before, self._counted[worker])
        self._counted[worker] = Totals()
        self._states[worker] = _State()
        if self._switch.stopping:
            return
        if failures >= MOST_FAILURES:
            raise BatchError(
                f"worker {worker + 1} died {failures} times in a row without an answer{_at(lost)}: {event.reason}",
                "what is finished is kept: look at the memory of its machine, then run the same command again",
            )
        redone = f"; {len(lost):,} lines are given out again" if len(lost) > 1 else "; its line is given out again"
        self._warn(f"worker {worker + 1} died and is replaced ({event.reason}){redone if lost else ''}")
        self._pool.start(worker)

    def _tell_if_alone(self) -> None:
        if not any(state.joined for state in self._states):
            self._note(
                "no worker is ready yet: it may load or fetch its model, or wait until the cluster has processors free"
            )

    def _sum_up(self) -> None:
        """What this process and all workers, dead or alive, have done."""
        for item in fields(Totals):
            setattr(self.totals, item.name, 0)
        for part in (self._before, *self._counted):
            _add(self.totals, part)


def _add(totals: Totals, more: Totals) -> None:
    for item in fields(Totals):
        setattr(totals, item.name, getattr(totals, item.name) + getattr(more, item.name))


def _at(lost: list[Job]) -> str:
    """What a worker had in hand, e.g. ", at lines 3, 5"."""
    lines = sorted(job.line for job in lost)
    shown = ", ".join(str(line) for line in lines[:_SHOWN_LINES]) + (", ..." if len(lines) > _SHOWN_LINES else "")
    return f", at {'line' if len(lines) == 1 else 'lines'} {shown}" if lines else ""
