"""The scheduler on the fake engine: who runs where, what is computed once, and what an error or an interrupt does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from abcli.batch.jobs import BadLine, Job, Result
from abcli.batch.prefixes import BLOCK
from abcli.batch.scheduler import Scheduler, StopSwitch
from abcli.chat.asking import Asked, plain_asked
from abcli.chat.messages import Message
from abcli.errors import CancelledError, GrammarError, NativeError, PromptError, UsageError
from abcli.generate import Generator
from abcli.reuse import ReuseRule
from abcli.sampling import GenerationConfig, SamplingConfig
from tests.support.fakes import END, ByteTokenizer, FakeEngine, GreedySampler

GREEDY = SamplingConfig(temperature=0.0)
SAMPLED = SamplingConfig()
CONTEXT = 1024


def echo_length(tokens: Sequence[int], _bucket: int) -> int:
    """A prompt ends with "N;": its answer is N letters that depend on all tokens so far."""
    end = max(index for index, token in enumerate(tokens) if token == ord(";")) + 1
    number = bytes(token for token in tokens[:end] if token < END).decode().rsplit(" ", 1)[-1].removesuffix(";")
    if len(tokens) - end >= int(number):
        return END
    return ord("a") + sum(tokens) % 26


def job(index: int, prompt: str, sampling: SamplingConfig = SAMPLED, max_tokens: int = -1) -> Job:
    return Job(index, index + 1, str(index), (Message("user", prompt),), GenerationConfig(sampling, max_tokens))


def ask(item: Job) -> Asked:
    text = item.messages[0].content
    if not text:
        raise PromptError("the prompt is empty")
    return plain_asked(list(text.encode()), item.generation)


class PickySampler(GreedySampler):
    """Fails on settings and on tokens that the tests choose."""

    def __init__(self, config: SamplingConfig) -> None:
        if config.top_k == 13:
            raise UsageError("--top-k 13 is unlucky")
        super().__init__(config)
        self._picky = config.top_k == 7
        self._left = config.min_p

    def sample(self, logits: NDArray[np.float32]) -> int:
        if self._picky:
            self._left -= 0.25
            if self._left < 0:
                raise GrammarError("no token is left")
        return super().sample(logits)


@dataclass
class Bench:
    """A scheduler on a fake engine, and what it asked for."""

    slots: int = 2
    reuse: ReuseRule = field(default_factory=ReuseRule)
    look_ahead: int = 256

    def __post_init__(self) -> None:
        self.engine = FakeEngine(echo_length, slots=self.slots, context_size=CONTEXT, piece=256)
        self.generator = Generator(self.engine, ByteTokenizer(), PickySampler)
        self.switch = StopSwitch(self.generator.cancel)
        self.copies: list[tuple[int, int]] = []
        copy = self.engine.copy

        def counted(source: int, target: int) -> None:
            assert source != target
            self.copies.append((source, target))
            copy(source, target)

        self.engine.copy = counted  # type: ignore[method-assign]

    def scheduler(self, items: Iterable[Job | BadLine]) -> Scheduler:
        return Scheduler(
            items, self.engine, self.generator, ask, self.switch, reuse=self.reuse, look_ahead=self.look_ahead
        )

    def run(self, items: Iterable[Job | BadLine]) -> list[Result]:
        self.last = self.scheduler(items)
        results = list(self.last.results())
        assert not self.generator._running
        return results


def expected(prompt: str) -> str:
    tokens = list(prompt.encode())
    begin = len(tokens)
    while (token := echo_length(tokens, 0)) != END:
        tokens.append(token)
    return bytes(tokens[begin:]).decode()


@pytest.fixture(autouse=True)
def _samplers_are_closed() -> Iterator[None]:
    GreedySampler.opened = 0
    yield
    assert GreedySampler.opened == 0


def test_no_jobs_no_results() -> None:
    assert Bench().run([]) == []


def test_results_come_as_they_are_done_and_say_what_was_asked() -> None:
    results = Bench(slots=2).run([job(0, "x 9;"), job(1, "y 2;"), job(2, "z 2;")])
    assert [result.index for result in results] == [1, 2, 0]
    assert results[0] == Result(1, 2, "1", expected("y 2;"), "stop", 0, 4, 2)


def test_a_free_slot_is_taken_at_once() -> None:
    bench = Bench(slots=3)
    bench.run([job(index, f"{'abcdefgh'[index]} {2 + index % 3 * 3};") for index in range(8)])
    # As long as prompts wait, no slot is idle in any step.
    lengths = Counter(bench.engine.advanced)
    assert bench.engine.advanced == sorted(bench.engine.advanced, reverse=True)
    assert lengths[3] > lengths[2] + lengths[1]


def test_unrelated_prompts_are_begun_in_the_order_of_the_input() -> None:
    results = Bench(slots=1).run([job(index, f"{index} 1;") for index in range(30)])
    assert [result.index for result in results] == list(range(30))


def test_a_shared_beginning_is_computed_once() -> None:
    document = "".join(chr(97 + index % 23) for index in range(500))
    prompts = [f"{document}{index:03} 4;" for index in range(50)]
    bench = Bench(slots=4)
    results = bench.run([job(index, prompt) for index, prompt in enumerate(prompts)])
    assert {result.index: result.text for result in results} == {i: expected(p) for i, p in enumerate(prompts)}
    new = sum(result.completion_tokens for result in results)
    # All but the document is 6 characters a prompt; the last answer's tokens are not decoded again.
    assert bench.engine.computed <= 500 + 50 * 6 + new
    totals = bench.last.totals
    assert totals.prompt_tokens - totals.cached_tokens <= 500 + 50 * 6
    assert totals.completion_tokens == new
    assert bench.copies


def test_short_prompts_are_computed_together() -> None:
    bench = Bench(slots=4)
    results = bench.run([job(index, f"{'abcdefgh'[index]} 3;") for index in range(8)])
    assert bench.engine.together == [4, 4]
    assert {result.index: result.text for result in results} == {
        index: expected(f"{'abcdefgh'[index]} 3;") for index in range(8)
    }


def test_long_prompts_are_computed_in_pieces_beside_which_short_ones_fit() -> None:
    bench = Bench(slots=3)
    prompts = [f"{letter * length} 1;" for letter, length in zip("abcde", (400, 30, 200, 90, 20), strict=True)]
    bench.run([job(index, prompt) for index, prompt in enumerate(prompts)])
    # The oldest and the shortest take turns; what then becomes free is taken at once.
    pieces = [sizes for kind, sizes in bench.engine.backend.calls if kind == "piece"]
    assert pieces == [[256], [33, 147], [203], [23, 93]]


def test_a_prompt_that_shares_with_another_waits_for_it() -> None:
    document = "".join(chr(97 + index % 23) for index in range(3 * BLOCK))
    bench = Bench(slots=3)
    bench.run([job(index, f"{document}{index} 1;") for index in range(3)])
    assert bench.engine.together == [1, 2]
    assert bench.engine.computed < len(document) + 20


@pytest.mark.parametrize("place", [0, 1, 2])
def test_one_that_fails_in_a_group_leaves_its_slot_to_the_next(place: int) -> None:
    items = [job(index, f"{'abcd'[index]} 2;") for index in range(4)]
    items[place] = job(place, "bad 2;", SamplingConfig(top_k=13))
    bench = Bench(slots=3)
    results = {result.index: result for result in bench.run(items)}
    assert "unlucky" in (results[place].error or "")
    assert [results[index].text for index in range(4) if index != place] == [
        expected(f"{'abcd'[index]} 2;") for index in range(4) if index != place
    ]
    # The next takes its slot at once, and is computed with the others.
    assert bench.engine.together == [3]


def test_documents_in_turn_are_computed_about_once_each() -> None:
    documents = [chr(97 + index) * 320 for index in range(10)]
    items = [
        job(question * 10 + index, f"{documents[index]}{question} 2;") for question in range(10) for index in range(10)
    ]
    bench = Bench(slots=2)
    results = bench.run(items)
    assert len(results) == 100
    totals = bench.last.totals
    assert totals.prompt_tokens - totals.cached_tokens < 12 * 320


def test_nobody_waits_for_ever() -> None:
    """A stream of prompts that share a document does not keep an unrelated one from its turn."""
    document = "d" * 320

    def endless() -> Iterator[Job]:
        yield job(0, f"{document} 1;")
        yield job(1, "lonely 1;")
        for index in range(2, 400):
            yield job(index, f"{document}{index} 1;")

    results = Bench(slots=1, look_ahead=16).run(endless())
    order = [result.index for result in results]
    assert sorted(order) == list(range(400))
    assert 1 < order.index(1) <= 2 * 16 + 1


def test_the_slot_with_what_others_need_is_spared() -> None:
    """Of two free slots, an unrelated prompt takes the one whose content nobody waits for."""
    document = "d" * 320
    bench = Bench(slots=2, look_ahead=2)
    bench.run([job(0, f"{document}0 1;"), job(1, "x 1;"), job(2, "unrelated 1;"), job(3, f"{document}3 1;")])
    totals = bench.last.totals
    assert totals.cached_tokens >= 320


def test_identical_greedy_prompts_are_computed_once() -> None:
    bench = Bench(slots=2)
    items = [job(index, "same 5;", GREEDY) for index in range(6)] + [job(6, "same 5;", GREEDY, 3)]
    results = bench.run(items)
    assert sorted(result.index for result in results) == list(range(7))
    assert {result.text for result in results if result.index < 6} == {expected("same 5;")}
    assert len({result.identifier for result in results}) == 7
    assert next(result.text for result in results if result.index == 6) == expected("same 5;")[:3]
    assert bench.last.totals.duplicates == 5
    assert bench.last.totals.prompt_tokens == 2 * len("same 5;")


def test_a_greedy_prompt_that_comes_again_much_later_is_remembered() -> None:
    bench = Bench(slots=1, look_ahead=2)
    items = [
        job(0, "same 5;", GREEDY),
        *(job(index, f"{index} 2;") for index in range(1, 20)),
        job(20, "same 5;", GREEDY),
    ]
    results = bench.run(items)
    assert {result.text for result in results if result.index in (0, 20)} == {expected("same 5;")}
    assert bench.last.totals.duplicates == 1


def test_sampled_prompts_are_computed_each() -> None:
    bench = Bench()
    bench.run([job(index, "same 5;") for index in range(3)])
    bench.run([job(index, "same 5;", SamplingConfig(temperature=0, xtc_probability=0.5)) for index in range(3)])
    assert bench.last.totals.duplicates == 0


def test_a_crowd_of_duplicates_does_not_fill_the_memory() -> None:
    read = 0

    def many() -> Iterator[Job]:
        nonlocal read
        for index in range(1000):
            read += 1
            yield job(index, "same 30;", GREEDY)

    results = Bench(slots=1, look_ahead=8).scheduler(many()).results()
    next(results)
    assert read <= 16
    results.close()


ERRORS = {
    "too long": (job(1, "x" * CONTEXT + " 1;"), "the prompt needs"),
    "empty": (job(1, ""), "the prompt is empty"),
    "settings": (job(1, "x 1;", SamplingConfig(top_k=13)), "unlucky"),
    "the first token": (job(1, "x 8;", SamplingConfig(top_k=7, min_p=0.0)), "no token is left"),
    "a later token": (job(1, "x 8;", SamplingConfig(top_k=7, min_p=0.5)), "no token is left"),
    "a bad line": (BadLine(1, 2, None, "the line is not JSON", "make it so"), "not JSON"),
}


@pytest.mark.parametrize("slots", [1, 3])
@pytest.mark.parametrize("case", ERRORS)
def test_an_error_is_the_result_of_its_job_alone(case: str, slots: int) -> None:
    item, message = ERRORS[case]
    bench = Bench(slots=slots)
    results = {result.index: result for result in bench.run([job(0, "a 9;"), item, job(2, "b 9;"), job(3, "c 9;")])}
    assert message in results[1].error
    assert results[1].line == 2
    assert [results[index].text for index in (0, 2, 3)] == [expected("a 9;"), expected("b 9;"), expected("c 9;")]
    assert (bench.last.totals.errors, bench.last.totals.answered) == (1, 3)


def test_duplicates_share_an_error() -> None:
    results = Bench(slots=1).run([job(index, "x 8;", SamplingConfig(temperature=0, top_k=13)) for index in range(3)])
    assert [result.index for result in results] == [0, 1, 2]
    assert all("unlucky" in result.error for result in results)


def test_many_bad_lines_are_not_read_all_at_once() -> None:
    read = 0

    def bad() -> Iterator[BadLine]:
        nonlocal read
        for index in range(1000):
            read += 1
            yield BadLine(index, index + 1, None, "bad")

    results = Bench(look_ahead=8).scheduler(bad()).results()
    next(results)
    assert read <= 8
    assert len(list(results)) == 999


def test_the_models_failure_ends_the_run() -> None:
    bench = Bench()

    def fail(*_arguments: object) -> NDArray[np.float32]:
        raise NativeError("llama.cpp failed to decode")

    bench.engine.step = fail  # type: ignore[method-assign]
    with pytest.raises(NativeError):
        bench.run([job(0, "a 9;"), job(1, "b 9;")])
    assert not bench.generator._running


def test_one_interrupt_finishes_what_is_begun() -> None:
    bench = Bench(slots=2)
    results = bench.scheduler([job(index, f"{index} {1 if index == 0 else 9};") for index in range(9)]).results()
    seen = [next(results)]
    bench.switch.press()
    seen += results
    # The place of the first was free when the switch was pressed: nobody takes it.
    assert [result.index for result in seen] == [0, 1]


def test_the_duplicates_of_what_is_begun_are_answered() -> None:
    bench = Bench(slots=1)
    results = bench.scheduler([job(0, "a 1;"), *(job(index, "b 5;", GREEDY) for index in range(1, 4))]).results()
    assert next(results).index == 0
    first = next(results)
    bench.switch.press()
    assert [first.index, *(result.index for result in results)] == [1, 2, 3]


def test_two_interrupts_stop_at_once() -> None:
    bench = Bench(slots=2)
    results = bench.scheduler([job(0, "a 1;"), job(1, "b 9;"), job(2, "c 9;")]).results()
    next(results)
    bench.switch.press()
    bench.switch.press()
    with pytest.raises(CancelledError):
        list(results)
    assert not bench.generator._running


def test_an_interrupt_ends_the_wait_for_a_line() -> None:
    bench = Bench(slots=1)

    def lines() -> Iterator[Job]:
        yield job(0, "a 3;")
        bench.switch.press()  # as the signal handler does while the line is awaited
        raise AssertionError("the line is still awaited")

    assert [result.index for result in bench.scheduler(lines()).results()] == []
    assert bench.switch.stopping


def test_a_model_that_cannot_go_back_is_not_asked_again() -> None:
    document = "d" * 320
    bench = Bench(slots=2)

    bench.engine.backend.forgets_parts = False
    prompts = [f"{document}{index} 2;" for index in range(6)]
    results = bench.run([job(index, prompt) for index, prompt in enumerate(prompts)])
    assert {result.index: result.text for result in results} == {i: expected(p) for i, p in enumerate(prompts)}
    assert len(bench.copies) <= 1


@given(
    held=st.text("ab", max_size=80), prompt=st.text("ab", min_size=1, max_size=80), least=st.sampled_from([1, 2, 24])
)
def test_only_sound_state_is_reused(held: str, prompt: str, least: int) -> None:
    usable = ReuseRule(least).usable(list(held.encode()), list(prompt.encode()))
    assert held[:usable] == prompt[:usable]
    assert len(prompt) - usable >= min(least, len(prompt))
    if least > 1:
        assert usable == 0 or usable < len(held) >= least


PROMPTS = st.lists(
    st.builds(
        lambda head, tail, number: f"{head * (BLOCK + 5)}{tail} {number};",
        st.sampled_from(["", "p", "q", "pq"]),
        st.text("xyz", max_size=3),
        st.integers(0, 6),
    ),
    max_size=24,
)


@settings(max_examples=60, deadline=None)
@given(prompts=PROMPTS, slots=st.integers(1, 5), look_ahead=st.integers(1, 12), least=st.sampled_from([1, 2, 24]))
def test_results_depend_on_nothing_but_the_prompt(prompts: list[str], slots: int, look_ahead: int, least: int) -> None:
    bench = Bench(slots, ReuseRule(least), look_ahead)
    greedy = [GREEDY if index % 2 else SamplingConfig() for index in range(len(prompts))]
    results = bench.run([job(index, prompt, greedy[index]) for index, prompt in enumerate(prompts)])
    assert sorted(result.index for result in results) == list(range(len(prompts)))
    for result in results:
        assert result.text == expected(prompts[result.index])
        assert result.prompt_tokens == len(prompts[result.index].encode())
    totals = bench.last.totals
    assert totals.answered == len(prompts)
    assert totals.completion_tokens <= sum(result.completion_tokens for result in results)
    assert bench.engine.computed == totals.prompt_tokens - totals.cached_tokens + sum(bench.engine.step_sizes)
