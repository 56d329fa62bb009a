"""Who answers which line: every line once, prompts with the same beginning together, nobody idle."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.batch.cluster.distribution import Distribution
from abcli.batch.jobs import Job, Result
from abcli.chat.messages import Message
from abcli.sampling import GenerationConfig


def job(index: int, prompt: str = "") -> Job:
    return Job(index, index + 1, str(index), (Message("user", prompt or f"prompt {index}"),), GenerationConfig())


def result(item: Job) -> Result:
    return Result(item.index, item.line, item.identifier, text=item.messages[0].content)


def distribution(prompts: list[str], workers: int = 2, slots: int = 2, look_ahead: int = 64) -> Distribution:
    made = Distribution(workers, look_ahead)
    for index, prompt in enumerate(prompts):
        made.add(job(index, prompt))
    for worker in range(workers):
        made.join(worker, slots)
    return made


def indices(jobs: list[Job]) -> list[int]:
    return [item.index for item in jobs]


def test_a_worker_gets_half_as_many_again_as_it_has_slots() -> None:
    made = distribution(["p"] * 20, slots=4)
    assert indices(made.take(0)) == [0, 1, 2, 3, 4, 5]
    assert made.take(0) == []
    assert indices(made.take(1)) == [6, 7, 8, 9, 10, 11]


def test_nothing_is_given_to_a_worker_that_is_not_there() -> None:
    made = Distribution(2)
    made.add(job(0))
    assert made.take(0) == []


def test_the_last_prompts_are_split_evenly() -> None:
    made = distribution(["p"] * 6, slots=8)
    made.complete = True
    assert indices(made.take(0)) == [0, 1, 2]
    assert indices(made.take(1)) == [3, 4, 5]


def test_prompts_on_one_document_go_to_one_worker() -> None:
    """Four documents in turn, two workers: each has questions on one of them as long as there are any."""
    documents = [letter * 1000 for letter in "abcd"]
    made = distribution([documents[index % 4] + str(index) for index in range(40)], slots=4)
    for worker, document in ((0, 0), (1, 1)):
        assert {index % 4 for index in indices(made.take(worker))} == {document}
    for worker, document in ((0, 0), (1, 1)):
        made.answered(worker, [result(item) for item in made.given(worker)[:4]])
        assert {index % 4 for index in indices(made.take(worker))} == {document}


def test_a_worker_without_a_document_of_its_own_helps() -> None:
    made = distribution(["a" * 1000 + str(index) for index in range(20)])
    assert indices(made.take(0)) == [0, 1, 2]
    assert indices(made.take(1)) == [3, 4, 5]


def test_the_same_prompt_goes_where_it_was() -> None:
    made = distribution(["one", "two", "three", "four", "one", "two"], slots=2)
    assert indices(made.take(0)) == [0, 4, 1]
    assert indices(made.take(1)) == [2, 3, 5]
    made.answered(0, [result(item) for item in made.given(0)])
    made.add(job(6, "five"))
    made.add(job(7, "one"))
    assert indices(made.take(0)) == [7, 6]


def test_nobody_is_overtaken_for_ever() -> None:
    made = Distribution(1, look_ahead=4)
    made.join(0, 1)
    document = "d" * 1000
    made.add(job(0, document))
    made.answered(0, [result(item) for item in made.take(0)])
    made.add(job(1, "alone"))
    taken: list[int] = []
    for index in range(2, 40):
        made.add(job(index, document + str(index)))
        taken += indices(made.take(0))
        made.answered(0, [result(item) for item in made.given(0)])
    assert taken[0] == 2
    assert taken.index(1) <= 2 * 4


def test_what_a_dead_worker_had_is_done_first_by_whoever_has_room() -> None:
    made = distribution(["p"] * 9)
    made.take(0)
    made.answered(0, [result(job(1))])
    made.take(1)
    assert made.lose(0) == 1
    assert made.given(0) == []
    assert made.take(0) == []
    made.join(0, 2)
    assert indices(made.take(0)) == [0, 2, 6]


def test_deaths_in_a_row_are_counted_until_a_result_comes() -> None:
    made = distribution(["p"] * 9)
    for count in (1, 2):
        assert made.lose(0) == count
        made.join(0, 2)
    (first, *_) = made.take(0)
    made.answered(0, [result(first)])
    assert made.lose(0) == 1
    assert made.lose(1) == 1


def test_a_result_counts_once_and_from_its_worker_only() -> None:
    made = distribution(["p"] * 4)
    (first, *_) = made.take(0)
    assert made.answered(1, [result(first)]) == []
    assert made.answered(0, [result(first), result(first)]) == [result(first)]
    assert made.answered(0, [result(first)]) == []


@dataclass
class Players:
    """Workers that join, answer and die as they are told."""

    made: Distribution
    workers: int
    jobs: Iterator[Job]
    there: set[int] = field(default_factory=set)
    answers: list[int] = field(default_factory=list)

    def act(self, worker: int, action: str, count: int) -> None:
        while not self.made.complete and self.made.wanted:
            item = next(self.jobs, None)
            if item is None:
                self.made.complete = True
            else:
                self.made.add(item)
        getattr(self, action)(worker, count)
        given = [item.index for seat in range(self.workers) for item in self.made.given(seat)]
        assert len(set(given)) == len(given)
        assert not set(given) & set(self.answers)

    def ask(self, worker: int, slots: int) -> None:
        if worker not in self.there:
            self.made.join(worker, slots)
            self.there.add(worker)
        self.made.take(worker)

    def answer(self, worker: int, count: int) -> None:
        results = [result(item) for item in self.made.given(worker)[:count]]
        self.answers += [answer.index for answer in self.made.answered(worker, results * 2)]

    def die(self, worker: int, _count: int) -> None:
        self.made.lose(worker)
        self.there.discard(worker)


@settings(max_examples=200, deadline=None)
@given(
    prompts=st.lists(st.sampled_from(["a", "b" * 300, "b" * 300 + "c", "d" * 200]), max_size=30),
    steps=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from(["ask", "answer", "die"]), st.integers(1, 4)), max_size=80
    ),
    workers=st.integers(1, 4),
    look_ahead=st.integers(1, 12),
)
def test_every_line_is_answered_once_whoever_dies(
    prompts: list[str], steps: list[tuple[int, str, int]], workers: int, look_ahead: int
) -> None:
    made = Distribution(workers, look_ahead)
    players = Players(made, workers, iter([job(index, prompt) for index, prompt in enumerate(prompts)]))
    for worker, action, count in steps:
        players.act(worker % workers, action, count)
    # All others gone for good, one that lives is enough.
    for other in range(1, workers):
        players.act(other, "die", 1)
    for _ in range(len(prompts) + 1):
        players.act(0, "ask", 1)
        players.act(0, "answer", 4)
    assert made.finished
    assert sorted(players.answers) == list(range(len(prompts)))
