from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from abcli.errors import CancelledError, ContextFullError, PromptError, UsageError
from abcli.generate import Generator, common_prefix
from abcli.sampling import Choice, GenerationConfig, SamplingConfig
from abcli.text_stream import TextStream
from tests.support.fakes import END, ByteTokenizer, FakeEngine, GreedySampler, reciting

PROMPT = list(b"What?")


def make(engine: FakeEngine) -> Generator:
    return Generator(engine, ByteTokenizer(), GreedySampler)


def answer_text(engine: FakeEngine, config: GenerationConfig | None = None) -> tuple[str, str | None, list[str]]:
    with make(engine) as generator:
        pieces = list(generator.stream(0, PROMPT, config or GenerationConfig()))
    return pieces[-1].answer.text, pieces[-1].answer.finish_reason, [piece.text for piece in pieces]


def test_an_answer_streams_and_stops_at_the_end_token() -> None:
    engine = FakeEngine(reciting(b"So.", len(PROMPT)))
    text, reason, pieces = answer_text(engine)
    assert (text, reason) == ("So.", "stop")
    assert pieces == ["S", "o", ".", ""]
    assert GreedySampler.opened == 0


def test_what_is_complete_ends_without_another_step() -> None:
    class UpToDot(GreedySampler):
        def sample(self, logits: NDArray[np.float32]) -> int:
            token = super().sample(logits)
            self.finished = token == ord(".")
            return token

    engine = FakeEngine(reciting(b"So. And", len(PROMPT)))
    with Generator(engine, ByteTokenizer(), UpToDot) as generator:
        pieces = list(generator.stream(0, PROMPT, GenerationConfig(ignore_eos=True, max_tokens=3)))
    assert (pieces[-1].answer.text, pieces[-1].answer.finish_reason) == ("So.", "stop")
    assert len(pieces) == 3


def test_characters_split_over_tokens_come_out_whole() -> None:
    text, _, pieces = answer_text(FakeEngine(reciting("né€🙂".encode(), len(PROMPT))))
    assert text == "né€🙂"
    assert "�" not in "".join(pieces)


def test_a_character_without_its_end_is_left_out() -> None:
    text, _, pieces = answer_text(FakeEngine(reciting(b"ab\xe2\x82", len(PROMPT))))
    assert (text, "".join(pieces)) == ("ab", "ab")
    cut = GenerationConfig(max_tokens=6)
    assert answer_text(FakeEngine(reciting("🙂🙂".encode(), len(PROMPT))), cut)[0] == "🙂"


def test_bytes_that_are_no_text_are_replaced() -> None:
    text, _, _ = answer_text(FakeEngine(reciting(b"a\xffb\xe2c", len(PROMPT))))
    assert text == "a�b�c"


def test_max_tokens_ends_with_length() -> None:
    text, reason, _ = answer_text(FakeEngine(reciting(b"abcdef", len(PROMPT))), GenerationConfig(max_tokens=3))
    assert (text, reason) == ("abc", "length")


def test_no_tokens_wanted() -> None:
    engine = FakeEngine(reciting(b"abc", len(PROMPT)))
    assert answer_text(engine, GenerationConfig(max_tokens=0)) == ("", "length", [""])
    assert GreedySampler.opened == 0


def test_the_end_token_can_be_ignored() -> None:
    config = GenerationConfig(max_tokens=4, ignore_eos=True)
    with make(FakeEngine(reciting(b"ab", len(PROMPT)))) as generator:
        answer = [piece.answer for piece in generator.stream(0, PROMPT, config)][-1]
    assert answer.tokens == [ord("a"), ord("b"), END, END]
    assert answer.finish_reason == "length"


def test_a_full_context_ends_with_length() -> None:
    engine = FakeEngine(reciting(b"x" * 100, len(PROMPT)), context_size=len(PROMPT) + 3)
    text, reason, _ = answer_text(engine)
    # The last token needs no place in the context, since nothing follows it.
    assert (text, reason) == ("xxxx", "length")
    assert len(engine.tokens(0)) == engine.context_size


def test_a_prompt_that_does_not_fit_is_refused_with_numbers() -> None:
    engine = FakeEngine(reciting(b"", 0), context_size=4)
    with make(engine) as generator, pytest.raises(ContextFullError) as caught:
        generator.start(0, PROMPT, GenerationConfig())
    assert (caught.value.used, caught.value.available) == (5, 4)


def test_an_empty_prompt_is_refused() -> None:
    with make(FakeEngine(reciting(b"", 0))) as generator, pytest.raises(PromptError):
        generator.start(0, [], GenerationConfig())


def test_stop_strings_across_tokens_are_held_back_and_cut() -> None:
    text, reason, pieces = answer_text(
        FakeEngine(reciting(b"one END two", len(PROMPT))), GenerationConfig(stop=("END", "nothing"))
    )
    assert (text, reason) == ("one ", "stop")
    assert "E" not in "".join(pieces)


@given(
    text=st.text(alphabet="abE", max_size=30),
    stop=st.lists(st.text(alphabet="abE", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=5),
)
def test_text_stream_equals_cutting_the_whole_text(text: str, stop: list[str], cuts: list[int]) -> None:
    stream = TextStream(stop)
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    out = "".join(stream.feed(text[a:b].encode()) for a, b in pairwise(edges))
    out += stream.feed(b"", final=True)
    # The stream acts at the first moment at which any stop string is complete.
    ends = [
        (end, min(text[:end].find(s) for s in stop if s in text[:end]))
        for end in edges[1:]
        if any(s in text[:end] for s in stop)
    ]
    assert out == (text[: ends[0][1]] if ends else text)


def test_empty_stop_strings_are_refused() -> None:
    with pytest.raises(UsageError):
        TextStream([""])


def test_what_a_slot_holds_is_not_computed_again() -> None:
    engine = FakeEngine(reciting(b"yes", len(PROMPT)))
    with make(engine) as generator:
        list(generator.stream(0, PROMPT, GenerationConfig()))
        before = engine.computed
        longer = [*PROMPT, *b"yes", *b" more"]
        answer = generator.start(0, longer, GenerationConfig())
        assert generator.step() == []
        (piece,) = generator.step()
        assert piece.answer is answer
        assert engine.computed - before == len(b" more")
        assert answer.statistics.cached_tokens == len(PROMPT) + 3
        before = engine.computed
        generator.start(0, longer, GenerationConfig())
        generator.step()
        assert engine.computed - before == 1


def test_slots_decode_together_in_one_step() -> None:
    engine = FakeEngine(reciting(b"abc", len(PROMPT)), slots=3, piece=100)
    with make(engine) as generator:
        answers = [generator.start(slot, PROMPT, GenerationConfig(max_tokens=slot + 1)) for slot in range(3)]
        while generator.step():
            pass
    assert [answer.text for answer in answers] == ["a", "ab", "abc"]
    assert engine.together == [3]
    assert engine.step_sizes == [2, 1]
    assert GreedySampler.opened == 0


def test_cancel_during_the_prefill_comes_before_the_next_piece() -> None:
    engine = FakeEngine(reciting(b"abc", 20))
    with make(engine) as generator:

        def progress(done: int, _total: int) -> None:
            if done == 8:
                generator.cancel()

        with pytest.raises(CancelledError):
            list(generator.stream(0, list(range(20)), GenerationConfig(), progress))
        assert list(engine.tokens(0)) == list(range(8))
        assert engine.waiting(0) == 0
        assert generator.step() == []
    assert GreedySampler.opened == 0


def test_cancel_between_steps_stops_the_stream_and_the_next_answer_works() -> None:
    engine = FakeEngine(reciting(b"abcdef", len(PROMPT)))
    with make(engine) as generator:
        stream = generator.stream(0, PROMPT, GenerationConfig())
        assert [next(stream).text, next(stream).text] == ["a", "b"]
        generator.cancel()
        with pytest.raises(CancelledError):
            next(stream)
        assert generator.step() == []
        assert "".join(piece.text for piece in generator.stream(0, PROMPT, GenerationConfig())) == "abcdef"


def test_agreement_and_seed_are_reported() -> None:
    def split(tokens: list[int], bucket: int) -> int:
        return END if len(tokens) > len(PROMPT) + 2 else ord("a") + bucket

    engine = FakeEngine(split, bases=(1.0, 2.0))
    with make(engine) as generator:
        config = GenerationConfig(SamplingConfig(seed=7))
        answer = [piece.answer for piece in generator.stream(0, PROMPT, config)][-1]
    assert answer.seed == 7
    assert 0 < answer.statistics.agreement < 0.5


def test_an_observer_sees_what_each_token_was_chosen_from() -> None:
    engine = FakeEngine(
        lambda tokens, bucket: END if len(tokens) > len(PROMPT) + 1 else ord("a") + bucket, bases=(1.0, 2.0)
    )
    seen: list[tuple[int, list[int], int, float, float | None]] = []

    def note(choice: Choice) -> None:
        rows = [int(row.argmax()) for row in choice.logits]
        seen.append((choice.token, rows, int(choice.merged.argmax()), float(choice.weights.sum()), choice.agreement))

    with make(engine) as generator:
        answer = [piece.answer for piece in generator.stream(0, PROMPT, GenerationConfig(observer=note))][-1]
        gated = GenerationConfig(observer=note, gate=0.5)
        list(generator.stream(0, PROMPT, gated))
    ungated, last = seen[:3], seen[2]
    assert [token for token, *_ in ungated] == [*answer.tokens, END]
    assert [rows for _, rows, *_ in ungated] == [[ord("a"), ord("b")], [ord("a"), ord("b")], [END, END]]
    assert all(token == merged and total == pytest.approx(1) for token, _, merged, total, _ in seen)
    assert last[-1] == pytest.approx(1)
    assert [(rows, agreement) for _, rows, *_, agreement in seen[3:]] == [
        *[([ord("a")], None)] * 2,
        ([END], None),
    ]


@given(st.lists(st.integers(0, 2), max_size=8), st.lists(st.integers(0, 2), max_size=8))
def test_common_prefix(left: list[int], right: list[int]) -> None:
    length = common_prefix(left, right)
    assert left[:length] == right[:length]
    assert length == min(len(left), len(right)) or left[length] != right[length]
