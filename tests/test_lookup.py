"""Drafts change how an answer is computed, and nothing else of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.engine.make import Kind, make_engine
from abcli.errors import CancelledError, UsageError
from abcli.generate import Answer, Generator
from abcli.lookup import Budget, Lookup
from abcli.native.sampler import SamplerChain
from abcli.sampling import GenerationConfig, LookupLength, SamplingConfig, check_lookup, parse_lookup
from tests.support.fakes import END, ByteTokenizer, FakeEngine, GreedySampler, reciting
from tests.support.models import open_model, set_up

TOKEN = st.integers(0, 3)


@given(st.lists(TOKEN, max_size=60), st.integers(-1, 9), st.integers(1, 20))
def test_a_draft_is_what_followed_the_same_tokens(text: list[int], longest: int, step: int) -> None:
    grown = Lookup()
    for end in range(0, len(text), step):
        grown.draft(text[:end], 0)
    draft = grown.draft(text, longest)
    assert draft == Lookup().draft(text, longest)
    assert len(draft) <= max(0, longest)
    places = [place for place in range(3, len(text)) if text[place - 3 : place] == text[-3:]]
    assert bool(draft) == bool(places and longest > 0)
    if draft:
        assert any(text[place : place + len(draft)] == draft for place in places)


def test_the_place_with_the_longest_match_is_taken_and_of_equal_ones_the_last() -> None:
    assert Lookup().draft([1, 2, 3, 4, 9, 0, 2, 3, 4, 8, 1, 2, 3, 4], 2) == [9, 0]
    assert Lookup().draft([2, 3, 4, 9, 0, 2, 3, 4, 8, 1, 2, 3, 4], 2) == [8, 1]


def test_drafts_grow_while_they_are_right_and_end_where_they_lose_time() -> None:
    right, wrong = Budget(), Budget()
    assert right.tokens == 0
    lengths, lost = [], 0.0
    for budget in (right, wrong):
        budget.chosen(0.010)
    for _ in range(20):
        lengths.append(right.tokens)
        right.tried(lengths[-1], lengths[-1], 0.010 * (1 + 0.6 * lengths[-1]))
    assert lengths == sorted(lengths)
    assert lengths[-1] > 16
    for _ in range(1000):
        again = 0.010
        if drafted := wrong.tokens:
            wrong.tried(drafted, 0, 0.010 * (1 + 0.6 * drafted))
            # The token after a draft takes longer, too.
            again = 0.013
            lost += 0.6 * drafted + 0.3
        wrong.chosen(again)
    assert lost < 1.0 + 0.3 + 0.005 * 1000
    # What one answer won is not the next one's to lose.
    right.begin()
    assert right.tokens <= 2


def test_a_wrong_guess_makes_drafts_shorter_and_so_does_their_cost() -> None:
    lengths = {}
    for cost in (0.3, 0.6):
        budget = Budget()
        budget.chosen(0.010)
        for _ in range(20):
            budget.tried(10, 10, 0.010 * (1 + cost * 10))
        before = budget.tokens
        budget.tried(10, 0, 0.010 * (1 + cost * 10))
        lengths[cost] = budget.tokens
        assert 0 < budget.tokens < before / 2
    assert lengths[0.6] < lengths[0.3]


def chaotic(seed: int, buckets_agree: bool) -> Any:
    """A text of a few letters that repeats itself now and then."""

    def next_token(tokens: Sequence[int], bucket: int) -> int:
        recent = tokens[-(2 + seed % 3) :]
        value = hash((seed, *recent)) % 23
        own = 0 if buckets_agree else bucket * (value % 5 == 0)
        return END if value == 22 else 97 + (value + own) % 4

    return next_token


def answered(engine: FakeEngine, prompt: list[int], config: GenerationConfig) -> tuple[Answer, str, list[int]]:
    with Generator(engine, ByteTokenizer(), Unsure) as generator:
        pieces = list(generator.stream(0, prompt, config))
    return pieces[-1].answer, "".join(piece.text for piece in pieces), list(engine.tokens(0))


class Unsure(GreedySampler):
    """Is sure of some tokens."""

    def confidence(self, logits: Any) -> float:
        return float(logits.argmax() % 3) / 2


@settings(deadline=None)
@given(
    seed=st.integers(0, 99),
    agree=st.booleans(),
    prompt=st.lists(st.integers(97, 100), min_size=1, max_size=12),
    lookup=st.sampled_from(["auto", 1, 2, 3, 8]),
    gate=st.sampled_from([None, 0.0, 0.4, 0.9, 1.0]),
    limit=st.sampled_from([-1, 0, 1, 5, 17]),
    stop=st.sampled_from([(), ("ab",), ("abca",)]),
    buckets=st.sampled_from([1, 3]),
)
def test_an_answer_is_what_it_is_without_drafts(
    seed: int,
    agree: bool,
    prompt: list[int],
    lookup: LookupLength,
    gate: float | None,
    limit: int,
    stop: tuple[str, ...],
    buckets: int,
) -> None:
    found = []
    for length in (None, lookup):
        engine = FakeEngine(chaotic(seed, agree), bases=(1e4, 2e4, 3e4)[:buckets], piece=5)
        config = GenerationConfig(SamplingConfig(), limit, stop, gate=gate, lookup=length)
        answer, text, held = answered(engine, prompt, config)
        statistics = answer.statistics
        counted = (statistics.steps, statistics.asked_steps, statistics.completion_tokens)
        found.append((answer.tokens, answer.text, text, answer.finish_reason, held, counted))
        assert statistics.guessed_tokens <= statistics.drafted_tokens
    assert found[0] == found[1]


def test_a_repeated_text_takes_fewer_steps() -> None:
    prompt = list(b"the quick brown fox. ")
    engine = FakeEngine(reciting(b"the quick brown fox.", len(prompt)), piece=8, bases=(1e4, 2e4))
    answer, text, _ = answered(engine, prompt, GenerationConfig(lookup=7))
    assert text == "the quick brown fox."
    assert answer.statistics.guessed_tokens >= 14
    assert [sizes for kind, sizes in engine.backend.calls if kind == "piece"][-2:] == [[8], [8]]
    assert len(engine.step_sizes) < 7


def test_several_answers_and_slots_that_cannot_forget_have_no_drafts() -> None:
    prompt = list(b"abcabcabc")
    engine = FakeEngine(lambda tokens, _bucket: tokens[-3], slots=2, piece=8)
    with Generator(engine, ByteTokenizer(), GreedySampler) as generator:
        found = [generator.start(slot, prompt, GenerationConfig(max_tokens=9, lookup=4)) for slot in range(2)]
        while generator.step():
            pass
    assert [answer.statistics.drafted_tokens for answer in found] == [0, 0]
    alone = FakeEngine(lambda tokens, _bucket: tokens[-3], piece=8)
    alone.forgets = False
    assert answered(alone, prompt, GenerationConfig(max_tokens=9, lookup=4))[0].statistics.drafted_tokens == 0


def test_a_draft_that_is_cancelled_leaves_the_answer_as_it_was() -> None:
    prompt = list(b"abcabcabc")
    engine = FakeEngine(lambda tokens, _bucket: tokens[-3], piece=8)
    with Generator(engine, ByteTokenizer(), GreedySampler) as generator:
        answer = generator.start(0, prompt, GenerationConfig(max_tokens=9, lookup=4))
        while not answer.tokens:
            generator.step()
        held = list(engine.tokens(0))
        engine.backend.fail = lambda _verb: generator.cancel()
        with pytest.raises(CancelledError):
            generator.step()
        assert (list(engine.tokens(0)), answer.tokens) == (held, [prompt[0]])
        engine.backend.fail = lambda _verb: None
        while generator.step():
            pass
    assert answer.text == "abcabcabc"


@pytest.mark.parametrize("kind", ["contexts", "fused"])
@pytest.mark.parametrize("gate", [None, 0.0, 0.05])
@pytest.mark.parametrize("sampling", [SamplingConfig(temperature=0), SamplingConfig(seed=5, repeat_penalty=1.2)])
def test_a_real_context_gives_the_same_answer(
    tiny_model: Path, kind: Kind, gate: float | None, sampling: SamplingConfig
) -> None:
    exact: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off"}
    chosen = set_up(bases=(5e3, 1e4, 2e4), context_size=256, threads=1, gated=gate is not None, **exact)
    prompt = [3, 5, 7, 11, 13, 17, 19, 23] * 5
    bias = tuple((token, 40.0) for token in set(prompt))
    found = []
    with open_model(tiny_model) as model, make_engine(kind, model, *chosen) as engine:
        for lookup in (None, 6):
            config = GenerationConfig(
                SamplingConfig(**{**vars(sampling), "logit_bias": bias}), 40, ignore_eos=True, gate=gate, lookup=lookup
            )
            with Generator(engine, model, lambda sampling: SamplerChain(model, sampling)) as generator:
                *_, piece = generator.stream(0, prompt, config)
            found.append(piece.answer)
            engine.truncate(0, 0)
    assert found[0].tokens == found[1].tokens
    assert found[0].statistics.asked_steps == found[1].statistics.asked_steps
    assert found[1].statistics.drafted_tokens > 0


def test_only_sensible_lengths() -> None:
    assert [parse_lookup(text) for text in ("off", "auto", "8")] == [None, "auto", 8]
    for wrong in (0, -1, 33, 2.0, True, "often"):
        with pytest.raises(UsageError, match="lookup"):
            check_lookup(wrong)
