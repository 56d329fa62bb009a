"""The thread that computes: slots, queue, time limits, clients that go, ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from time import monotonic

import pytest

from abcli.chat.answer import Answer
from abcli.chat.asking import AnswerReader
from abcli.chat.options import ChatOptions
from abcli.errors import AbcliError, CancelledError, NativeError
from abcli.generate import Generator
from abcli.sampling import GenerationConfig
from abcli.serve.problems import RefusedError
from abcli.serve.tickets import Delivery, Ticket
from abcli.serve.worker import Worker
from tests.support.fakes import PIECE, ByteTokenizer, FakeEngine, GreedySampler

# Nothing waits for it to pass.
PATIENCE = 30
LETTER = ord("a")


def always_a(_tokens: Sequence[int], _bucket: int) -> int:
    return LETTER


class Valve:
    """Lets the engine compute so many times, or freely."""

    def __init__(self) -> None:
        self._free = threading.Event()
        self._permits = threading.Semaphore(0)
        self.waits = threading.Semaphore(0)
        """Released whenever the engine is about to compute."""

    def __call__(self, verb: str) -> None:
        self.waits.release()
        if not self._free.is_set():
            assert self._permits.acquire(timeout=PATIENCE)

    def pass_on(self, times: int = 1) -> None:
        """Let it compute so often, and wait until it is about to compute once more."""
        for _ in range(times):
            assert self.waits.acquire(timeout=PATIENCE)
            self._permits.release()
        assert self.waits.acquire(timeout=PATIENCE)
        self.waits.release()

    def open(self) -> None:
        """Let it compute as it likes."""
        self._free.set()
        self._permits.release(1000)


@dataclass(eq=False)
class Heard:
    """A ticket, and what was delivered of it."""

    ticket: Ticket
    deliveries: list[Delivery] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)

    def hear(self, delivery: Delivery) -> None:
        self.deliveries.append(delivery)
        if delivery.error is not None or (delivery.piece is not None and delivery.piece.answer is not None):
            self.ended.set()

    @property
    def answer(self) -> Answer:
        assert self.ended.wait(PATIENCE)
        last = self.deliveries[-1]
        if last.error is not None:
            raise last.error
        assert last.piece is not None
        assert last.piece.answer is not None
        return last.piece.answer


class Rig:
    """A worker on a fake engine."""

    def __init__(self, slots: int = 1, context_size: int = 256) -> None:
        self.engine = FakeEngine(always_a, slots=slots, context_size=context_size)
        self.valve = Valve()
        self.engine.backend.fail = self.valve
        self.generator = Generator(self.engine, ByteTokenizer(), GreedySampler)
        self.worker = Worker(self.engine, self.generator)

    def ask(
        self,
        prompt: bytes,
        tokens: int = 4,
        *,
        fresh: bool = False,
        seconds: float = PATIENCE,
        score: int | None = None,
        progress: bool = False,
        timings: bool = False,
    ) -> Heard:
        reader = AnswerReader(None, ChatOptions())
        config = GenerationConfig(max_tokens=tokens)
        heard: list[Heard] = []
        ticket = Ticket(
            list(prompt),
            config,
            reader,
            lambda delivery: heard[0].hear(delivery),
            monotonic() + seconds,
            fresh,
            score,
            progress,
            timings,
        )
        heard.append(Heard(ticket))
        self.worker.submit(ticket)
        return heard[0]


@pytest.fixture
def make() -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make_rig(**settings: int) -> Rig:
        made.append(Rig(**settings))
        return made[-1]

    yield make_rig
    for rig in made:
        rig.valve.open()
        rig.worker.stop()
        assert rig.worker.join(PATIENCE)
        assert not rig.generator._running


def test_those_that_nobody_waits_for_are_dropped_also_from_the_queue(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.worker.start()
    first = rig.ask(b"first", 100)
    rig.valve.pass_on(5)
    waiting, third = rig.ask(b"second"), rig.ask(b"third")
    rig.worker.give_up(waiting.ticket)
    rig.worker.give_up(first.ticket)
    rig.valve.pass_on()
    # The step that ran then was the last one: what is computed next is the third prompt.
    assert rig.worker.running == {0: third.ticket}
    rig.valve.open()
    assert third.answer.text == "aaaa"
    assert waiting.ticket.running is None
    assert rig.worker.counts.given_up == 2
    assert (rig.worker.counts.answers, rig.worker.waiting) == (1, 0)


def test_a_prompt_that_nobody_waits_for_is_left_after_a_piece(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.worker.start()
    long = rig.ask(b"x" * 200)
    rig.valve.pass_on(2)
    rig.worker.give_up(long.ticket)
    after = rig.ask(b"y")
    rig.valve.open()
    assert after.answer.text == "aaaa"
    assert rig.engine.computed < 40
    assert long.deliveries == []


def test_a_short_answer_ends_while_a_long_one_goes_on(make: Callable[..., Rig]) -> None:
    rig = make(slots=2)
    rig.worker.start()
    long = rig.ask(b"x" * 100, 150)
    rig.valve.pass_on()
    short = rig.ask(b"y", 3)
    rig.valve.pass_on(12)
    assert short.answer.text == "aaa"
    assert not long.ended.is_set()
    rig.valve.open()
    assert long.answer.usage.completion_tokens == 150


@pytest.mark.parametrize("running", [True, False])
def test_a_request_has_a_time_limit(make: Callable[..., Rig], running: bool) -> None:
    rig = make()
    rig.worker.start()
    blocker = None if running else rig.ask(b"blocker", 50)
    if not running:
        rig.valve.pass_on(2)
    late = rig.ask(b"late", 50, seconds=0.05)
    assert not late.ended.wait(0.1)
    rig.valve.open()
    with pytest.raises(RefusedError, match="longer than the server allows"):
        _ = late.answer
    if blocker is not None:
        assert len(blocker.answer.tokens) == 50
    assert rig.ask(b"next").answer.text == "aaaa"


def test_what_fails_in_a_step_ends_those_that_run_and_no_others(make: Callable[..., Rig]) -> None:
    rig = make(slots=2)
    calls = 0

    def fail(_verb: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise NativeError("broken")
        if calls == 8:
            raise ZeroDivisionError

    rig.engine.backend.fail = fail
    rig.worker.start()
    with pytest.raises(NativeError, match="broken"):
        _ = rig.ask(b"abc", 50).answer
    with pytest.raises(AbcliError, match="internal error: ZeroDivisionError"):
        _ = rig.ask(b"def", 50).answer
    assert rig.ask(b"ghi").answer.text == "aaaa"


def test_conversations_stay_where_they_are(make: Callable[..., Rig]) -> None:
    rig = make(slots=3)
    rig.valve.open()
    rig.worker.start()
    documents = [bytes([number]) * 80 for number in range(1, 3)]
    for document in documents:
        assert rig.ask(document).answer.usage.cached_tokens == 0
    for document in documents:
        continued = document + b"aaaa and more"
        assert rig.ask(continued).answer.usage.cached_tokens == 83
    # Another question about the first takes over its beginning, and leaves the conversation where it is.
    assert rig.ask(documents[0] + b"other").answer.usage.cached_tokens == 80
    assert rig.ask(documents[0] + b"aaaa and moreaaaa yes").answer.usage.cached_tokens == 96
    assert rig.ask(documents[0] + b"another", fresh=True).answer.usage.cached_tokens == 0


def test_what_is_being_computed_is_waited_for(make: Callable[..., Rig]) -> None:
    rig = make(slots=3)
    rig.worker.start()
    prompt = b"p" * 120
    first = rig.ask(prompt + b"1", 20)
    rig.valve.pass_on(3)
    others = [rig.ask(prompt + b"2", 20), rig.ask(prompt + b"3", 20)]
    elsewhere = rig.ask(b"else", 20)
    rig.valve.open()
    # It does not wait with them, though it came later.
    assert elsewhere.answer.text == "a" * 20
    assert first.answer.usage.cached_tokens == 0
    assert [other.answer.usage.cached_tokens for other in others] == [120, 120]


def test_a_scored_prompt_is_read_beside_answers(make: Callable[..., Rig]) -> None:
    rig = make(slots=2)
    rig.valve.open()
    rig.worker.start()
    running = rig.ask(b"abc", 100)
    scored = rig.ask(b"xaay", 3, score=2)
    assert scored.answer.text == "aaa"
    (found,) = [delivery.scored for delivery in scored.deliveries if delivery.scored]
    assert [item.token for item in found] == list(b"aay")
    assert [item.logprob > -0.1 for item in found] == [True, True, False]
    assert [item.top[0].token for item in found] == [LETTER] * 3
    assert running.answer.text == "a" * 100


def test_a_worker_drains_or_stops(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.worker.start()
    begun, waiting = rig.ask(b"abc", 20), rig.ask(b"def", 20)
    rig.valve.pass_on(2)
    rig.worker.drain()
    with pytest.raises(RefusedError, match="stopping"):
        rig.ask(b"ghi")
    rig.valve.open()
    assert begun.answer.text == waiting.answer.text == "a" * 20
    assert rig.worker.join(PATIENCE)

    rig = make()
    rig.worker.start()
    begun, waiting = rig.ask(b"abc", 20), rig.ask(b"def", 20)
    rig.valve.pass_on(2)
    rig.worker.stop()
    rig.valve.open()
    for heard in (begun, waiting):
        with pytest.raises(CancelledError):
            _ = heard.answer
    assert rig.worker.join(PATIENCE)


def test_how_much_of_a_prompt_is_computed(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.valve.open()
    rig.worker.start()
    prompt = b"x" * 3 * PIECE
    assert rig.ask(prompt, 2).answer.usage.cached_tokens == 0
    heard = rig.ask(prompt + b"y" * 2 * PIECE, 2, progress=True)
    usage = heard.answer.usage
    told = [delivery.progress for delivery in heard.deliveries if delivery.progress is not None]
    # They come before everything else; the first one tells what was there already.
    assert all(delivery.progress is None for delivery in heard.deliveries[len(told) :])
    assert {(progress.total, progress.cached) for progress in told} == {(5 * PIECE, usage.cached_tokens)}
    processed = [progress.processed for progress in told]
    assert (processed[0], processed[-1]) == (3 * PIECE, 5 * PIECE)
    assert processed == sorted(set(processed))
    assert len(processed) > 2
    assert told[0].seconds <= told[-1].seconds < PATIENCE


def test_each_piece_comes_with_the_numbers_so_far(make: Callable[..., Rig]) -> None:
    rig = make()
    rig.valve.open()
    rig.worker.start()
    heard = rig.ask(b"abc", 4, timings=True)
    assert heard.answer.usage.completion_tokens == 4
    statistics = [delivery.statistics for delivery in heard.deliveries]
    assert [item.completion_tokens for item in statistics if item is not None] == [1, 2, 3, 4]
