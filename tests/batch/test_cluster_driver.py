"""A batch on a pool of workers that are no processes: what happens to the lines when workers die."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.batch.cluster.driver import MOST_FAILURES, ClusterRun
from abcli.batch.cluster.pool import Died, Event, Joined, Refused, WorkerReport
from abcli.batch.jobs import BadLine, Job, Result
from abcli.batch.scheduler import StopSwitch, Totals
from abcli.chat.messages import Message
from abcli.errors import BatchError, CancelledError, ModelFileError
from abcli.sampling import GenerationConfig

SLOTS = 2
LETHAL = "lethal"


def job(index: int, prompt: str = "p") -> Job:
    return Job(index, index + 1, str(index), (Message("user", prompt),), GenerationConfig())


def result(item: Job) -> Result:
    return Result(item.index, item.line, item.identifier, text=f"answer {item.index}", completion_tokens=3)


@dataclass
class FakePool:
    """Answers some of what a worker has at each question; a worker dies by chance, or of a lethal prompt."""

    workers: int
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    death: float = 0.0
    """The probability that a worker dies instead of answering."""
    refusal: int | None = None
    """The worker that cannot open its model."""
    unborn: frozenset[int] = frozenset()
    """Those that never come to be."""
    warnings: tuple[str, ...] = ()
    """What every worker says whenever it says something."""

    def __post_init__(self) -> None:
        self.events: list[Event] = []
        self.started: list[int] = []
        self.stopped: set[int] = set()
        self.closed = 0
        self.given: Counter[int] = Counter()
        self._has: dict[int, list[Job]] = {}
        self._totals: dict[int, Totals] = {}

    def start(self, worker: int) -> None:
        assert worker not in self._has, "there is one already"
        self.started.append(worker)
        if worker in self.unborn:
            return
        if worker == self.refusal:
            self.events.append(Refused(worker, ModelFileError("there is no file")))
            return
        self._has[worker] = []
        self._totals[worker] = Totals()
        self.events.append(Joined(worker, SLOTS, "on a machine", self.warnings))

    def exchange(self, worker: int, jobs: Sequence[Job], *, stop: bool) -> None:
        has = self._has[worker]
        has.extend(jobs)
        self.given.update(item.index for item in jobs)
        if stop:
            self.stopped.add(worker)
            del has[SLOTS:]
        lethal = any(item.messages[0].content == LETHAL for item in has)
        # What it answers before it dies may be lost on the way.
        if lethal or self.chance.random() < self.death:
            del self._has[worker]
            self.events.append(Died(worker, "killed"))
            return
        done = [has.pop(self.chance.randrange(len(has))) for _ in range(self.chance.randint(0, len(has)))]
        totals = self._totals[worker]
        totals.completion_tokens += 3 * len(done)
        totals.answered += len(done)
        copy = Totals(completion_tokens=totals.completion_tokens, answered=totals.answered)
        self.events.append(WorkerReport(worker, [result(item) for item in done], copy, stop and not has, self.warnings))

    def wait(self, seconds: float) -> Sequence[Event]:
        # One worker has at most one event: it is asked again only after the last answer.
        self.chance.shuffle(self.events)
        count = self.chance.randint(1, max(1, len(self.events)))
        now, self.events = self.events[:count], self.events[count:]
        return now

    def close(self) -> None:
        self.closed += 1


def run(
    pool: FakePool, items: list[Job | BadLine], switch: StopSwitch | None = None
) -> tuple[ClusterRun, list[Result]]:
    made = ClusterRun(iter(items), pool, switch or StopSwitch(lambda: None))
    found = list(made.results())
    assert pool.closed == 1
    return made, found


def test_no_lines_no_results() -> None:
    made, found = run(FakePool(2), [])
    assert (found, made.finished) == ([], True)


def test_every_line_has_its_result() -> None:
    bad = BadLine(1, 2, None, "not JSON")
    made, found = run(FakePool(2), [job(0), bad, *(job(index) for index in range(2, 50))])
    assert sorted(item.index for item in found) == list(range(50))
    assert [item.error for item in found if item.index == 1] == ["not JSON"]
    assert made.finished
    assert made.totals == Totals(completion_tokens=49 * 3, answered=49, errors=1)


@settings(max_examples=150, deadline=None)
@given(
    lines=st.integers(0, 60),
    workers=st.integers(1, 4),
    death=st.floats(0, 0.6),
    seed=st.integers(),
    unborn=st.booleans(),
)
def test_random_deaths_lose_and_double_nothing(lines: int, workers: int, death: float, seed: int, unborn: bool) -> None:
    pool = FakePool(workers, random.Random(seed), death, unborn=frozenset({0} if unborn and workers > 1 else ()))
    found: list[Result] = []
    made = ClusterRun(iter([job(index) for index in range(lines)]), pool, StopSwitch(lambda: None))
    problem = ""
    try:
        found.extend(made.results())
    except BatchError as error:
        problem = error.message
    assert made.finished == (problem == "")
    assert (f"died {MOST_FAILURES} times in a row" in problem) == (problem != "")
    assert len(found) == lines or problem
    assert len({item.index for item in found}) == len(found)
    assert all(item == result(job(item.index)) for item in found)
    assert pool.closed == 1


def test_what_many_say_is_told_once() -> None:
    told: list[str] = []
    pool = FakePool(3, warnings=("the same", "and another"))
    list(
        ClusterRun(iter([job(index) for index in range(9)]), pool, StopSwitch(lambda: None), warn=told.append).results()
    )
    assert sorted(line.split(": ")[1] for line in told) == ["and another", "the same"]
    assert all(line.startswith("worker ") for line in told)


def test_a_dead_worker_is_replaced_and_its_lines_redone() -> None:
    pool = FakePool(2, random.Random(5), 0.2)
    warnings: list[str] = []
    made = ClusterRun(iter([job(index) for index in range(80)]), pool, StopSwitch(lambda: None), warn=warnings.append)
    assert sorted(item.index for item in made.results()) == list(range(80))
    assert len(pool.started) > 2
    assert len(warnings) == len(pool.started) - 2
    assert any("died and is replaced (killed)" in text and "given out again" in text for text in warnings)
    assert max(pool.given.values()) > 1


def test_workers_that_keep_dying_end_the_run_and_name_the_lines() -> None:
    items: list[Job | BadLine] = [job(index) for index in range(10)]
    items.append(job(10, LETHAL))
    pool = FakePool(1)
    found: list[Result] = []
    made = ClusterRun(iter(items), pool, StopSwitch(lambda: None))
    with pytest.raises(BatchError, match=r"died 3 times in a row without an answer, at line.* 11") as caught:
        found.extend(made.results())
    assert "same command" in caught.value.hint
    assert not made.finished
    assert pool.closed == 1


def test_what_no_worker_can_open_ends_the_run() -> None:
    pool = FakePool(2, refusal=1)
    with pytest.raises(ModelFileError):
        list(ClusterRun(iter([job(index) for index in range(500)]), pool, StopSwitch(lambda: None)).results())
    assert pool.closed == 1


def test_an_interrupt_lets_workers_finish_what_they_have_begun() -> None:
    switch = StopSwitch(lambda: None)
    pool = FakePool(2)
    made = ClusterRun((job(index) for index in range(200)), pool, switch, look_ahead=8)
    found = []
    for item in made.results():
        found.append(item)
        if len(found) == 30:
            switch.press()
            given = sum(pool.given.values())
    assert sum(pool.given.values()) == given
    assert pool.stopped
    assert 30 <= len(found) < 200
    assert not made.finished


def test_a_second_interrupt_ends_it_at_once() -> None:
    switch = StopSwitch(lambda: None)
    pool = FakePool(2)
    results = ClusterRun((job(index) for index in range(200)), pool, switch, look_ahead=8).results()
    for _ in range(10):
        next(results)
    switch.press()
    switch.press()
    with pytest.raises(CancelledError):
        list(results)
    assert pool.closed == 1


def test_an_interrupt_before_any_worker_is_ready_ends_it() -> None:
    switch = StopSwitch(lambda: None)
    switch.press()
    pool = FakePool(1, unborn=frozenset({0}))
    assert list(ClusterRun([job(0)], pool, switch).results()) == []
    assert pool.closed == 1


def test_it_is_told_once_that_nobody_works() -> None:
    switch = StopSwitch(lambda: None)
    notes: list[str] = []
    seconds = iter(range(0, 1000, 10))
    made = ClusterRun(
        iter([job(0)]),
        FakePool(1, unborn=frozenset({0})),
        switch,
        note=notes.append,
        clock=lambda: float(next(seconds)),
        on_step=lambda: switch.press() if len(notes) else None,
    )
    assert list(made.results()) == []
    assert len(notes) == 1
    assert "no worker is ready yet" in notes[0]
