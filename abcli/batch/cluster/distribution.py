"""Which worker answers which line of a batch: every line is answered once, however many workers die."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil

from abcli.batch.jobs import Job, Result
from abcli.batch.prefixes import HeldPrompts, PrefixKeys, prefix_keys
from abcli.batch.scheduler import LOOK_AHEAD

# In bytes of text, about as much as the scheduler's blocks of tokens.
_BLOCK = 128


@dataclass(frozen=True)
class _Waiting:
    job: Job
    keys: PrefixKeys
    begun: int
    """How many prompts had been handed out when this one came."""


@dataclass
class _Seat:
    """A worker's place, which another takes when it dies."""

    room: int = 0
    """The most prompts it is given at once; 0 while nobody is there."""
    given: dict[int, _Waiting] = field(default_factory=dict)
    """What it has not answered yet, by the lines' indices."""
    recent: HeldPrompts = field(default_factory=HeldPrompts)
    """The prompts it was given last, which its slots may still hold."""
    count: int = 0
    """How many it was given."""
    failures: int = 0
    """How many workers in a row have died here without any result."""


class Distribution:
    """Hands prompts out to workers and keeps account of them. Knows nothing of processes or machines.

    No worker that has room is left without a prompt while one waits. Among those that wait it gets one that begins
    like prompts it had before, else one that begins like no other worker's, else the oldest; none is overtaken by
    more than twice as many others as are looked at ahead.
    """

    def __init__(self, workers: int, look_ahead: int = LOOK_AHEAD) -> None:
        self._seats = [_Seat() for _ in range(workers)]
        self._look_ahead = look_ahead
        self._waiting: list[_Waiting] = []
        self._begun = 0
        self.complete = False
        """Whether all jobs have been added; to be set by the one who adds them."""

    @property
    def wanted(self) -> int:
        """How many more jobs should be added, if there are any, to look ahead."""
        return max(0, self._look_ahead - len(self._waiting))

    @property
    def finished(self) -> bool:
        """Whether every job has its result."""
        return self.complete and not self._waiting and not any(seat.given for seat in self._seats)

    def add(self, job: Job) -> None:
        """A further job."""
        self._waiting.append(_Waiting(job, _keys(job), self._begun))

    def join(self, worker: int, slots: int) -> None:
        """A worker is ready. It gets half as many prompts again as it has slots, so that none has to wait for more."""
        self._seats[worker].room = slots + ceil(slots / 2)

    def take(self, worker: int) -> list[Job]:
        """What `worker` should do besides what it has been given before."""
        seat = self._seats[worker]
        jobs = []
        while self._waiting and len(seat.given) < min(seat.room, self._fair_share()):
            item = self._waiting.pop(self._choose(seat))
            seat.given[item.job.index] = item
            seat.recent.hold(seat.count % seat.room, (), item.keys)
            seat.count += 1
            self._begun += 1
            jobs.append(item.job)
        return jobs

    def given(self, worker: int) -> list[Job]:
        """What `worker` has not answered yet."""
        return [item.job for item in self._seats[worker].given.values()]

    def answered(self, worker: int, results: Iterable[Result]) -> list[Result]:
        """Those of `results` that answer what `worker` was given and has not answered before."""
        seat = self._seats[worker]
        new = [result for result in results if seat.given.pop(result.index, None) is not None]
        if new:
            seat.failures = 0
        return new

    def lose(self, worker: int) -> int:
        """`worker` has died: what it had waits again, before all else. How many died there in a row for nothing."""
        seat = self._seats[worker]
        # Those that were begun longest ago overtake no more; 0 makes them impatient.
        again = [_Waiting(item.job, item.keys, -2 * self._look_ahead) for item in seat.given.values()]
        self._waiting[:0] = sorted(again, key=lambda item: item.job.index)
        failures = seat.failures + 1
        self._seats[worker] = _Seat(failures=failures)
        return failures

    def _fair_share(self) -> int:
        """The most that one worker should have: towards the end, what leaves as much for each of the others."""
        if not self.complete:
            return self._look_ahead
        left = len(self._waiting) + sum(len(seat.given) for seat in self._seats)
        return ceil(left / len(self._seats))

    def _choose(self, seat: _Seat) -> int:
        """The index of the prompt that is best for a worker among those that wait."""
        if self._begun - self._waiting[0].begun >= 2 * self._look_ahead:
            return 0
        own = [seat.recent.blocks(item.keys) for item in self._waiting]
        most = max(own)
        best = [index for index, blocks in enumerate(own) if blocks == most]
        if len(best) == 1:
            return best[0]
        others = [other.recent for other in self._seats if other is not seat]
        return min(best, key=lambda index: (_most_blocks(others, self._waiting[index].keys), index))


def _most_blocks(held: Sequence[HeldPrompts], keys: PrefixKeys) -> int:
    return max((prompts.blocks(keys) for prompts in held), default=0)


def _keys(job: Job) -> PrefixKeys:
    """Keys of the beginnings of a job's prompt, and one of all of it, so that prompts that come again are known."""
    text = "\0".join(f"{message.role}\0{message.content}" for message in job.messages).encode()
    return (*prefix_keys(text, _BLOCK), hash(text))
