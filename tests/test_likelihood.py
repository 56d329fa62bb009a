"""How likely texts are: against the distributions themselves, and what is computed for it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import abcli
from abcli.config import MergeRule
from abcli.engine.engine import Engine
from abcli.likelihood import Scorer, TokenScore, Walk, pair_tokens, windows
from abcli.merge import Merger
from tests.evals.random_engine import RandomEngine
from tests.support.tiny_gguf import write_tiny_mamba

TOKENS = st.lists(st.integers(0, 2), max_size=5)
PAIRS = st.lists(st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=9), TOKENS), max_size=8)


def scorer(engine: Engine, rule: MergeRule = "confidence", top: int = 0) -> Scorer:
    merger = Merger(len(engine.bases), engine.vocabulary_size)
    return Scorer(engine, lambda logits: merger.merge(logits, rule), top)


def mixture(rows: NDArray[np.float32]) -> NDArray[np.float64]:
    """The log-probabilities of the rule `confidence`, once more."""
    exact = rows.astype(np.float64)
    shares = np.exp(exact - exact.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    weights = shares.max(axis=1) / shares.max(axis=1).sum()
    return np.log(weights @ shares)


@given(PAIRS, st.integers(1, 3), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_each_token_has_its_probability_there(pairs: list[tuple[list[int], list[int]]], slots: int, top: int) -> None:
    engine = RandomEngine(slots=slots)
    done: list[int] = []
    found = scorer(engine, top=top).score(pairs, done.append)
    assert [[score.token for score in scores] for scores in found] == [continuation for _, continuation in pairs]
    for (context, continuation), scores in zip(pairs, found, strict=True):
        for at, score in enumerate(scores):
            exact = mixture(engine.rows([*context, *continuation[:at]]))
            assert score.log_probability == pytest.approx(exact[score.token], abs=1e-4)
            assert score.likeliest == (exact.argmax() == score.token)
            assert [token for token, _ in score.top] == np.argsort(-exact)[:top].tolist()
            assert [log for _, log in score.top] == pytest.approx(np.sort(exact)[::-1][:top].tolist(), abs=1e-4)
    assert done == sorted(set(done))
    assert not pairs or not any(continuation for _, continuation in pairs) or done[-1] == len(pairs)


@given(st.lists(TOKENS, min_size=1, max_size=6), st.integers(1, 4))
@settings(deadline=None)
def test_a_walk_passes_each_beginning_once(continuations: list[list[int]], limit: int) -> None:
    walk = Walk(continuations)
    passed: list[tuple[int, ...]] = []
    while taken := walk.take(limit):
        assert len(taken) <= limit
        for before, after in itertools.pairwise(taken):
            assert before.following[after.token] is after
        passed += [tuple(walk.path[: beginning.length]) for beginning in taken]
    assert sorted(passed) == sorted({tuple(tokens[:at]) for tokens in continuations for at in range(len(tokens))})
    for tokens in continuations:
        assert [beginning.length for beginning in walk.along(tokens)] == list(range(len(tokens)))


def test_what_is_shared_is_computed_once() -> None:
    context, other = list(range(60)), [*range(50), 7, 7]
    answers = [[1, 2, 3, 4], [1, 2, 9], [5], [1, 2]]
    engine = RandomEngine(slots=1)
    scorer(engine).score([(context, answer) for answer in answers] + [(other, [3])])
    beginnings = {tuple(answer[:at]) for answer in answers for at in range(1, len(answer))}
    assert engine.computed == 60 + len(beginnings) + 2
    # Several tokens at once, where nothing branches off.
    assert engine.backend.calls[-1] == ("piece", [3])


def test_slots_take_over_what_contexts_share() -> None:
    shared = list(range(100))
    pairs = [([*shared, number], [1]) for number in range(4)]
    engine = RandomEngine(slots=4)
    scorer(engine).score(pairs)
    assert engine.computed == 100 + 4
    alike = RandomEngine(slots=4)
    scorer(alike).score([([number, *shared], [1, 2]) for number in range(4)])
    assert alike.computed == 4 * 101 + 4
    assert [1, 1, 1, 1] in [sizes for kind, sizes in alike.backend.calls if kind == "rows"]


def test_nothing_is_computed_if_anything_does_not_fit() -> None:
    engine = RandomEngine(context_size=10)
    with pytest.raises(abcli.ContextFullError):
        scorer(engine).score([([1], [2]), ([1] * 6, [2] * 6)])
    assert engine.computed == 0
    (scores,) = scorer(engine).score([([1] * 6, [2] * 5)])
    assert len(scores) == 5


def test_after_a_failure_nothing_is_in_progress() -> None:
    engine = RandomEngine(slots=2)
    engine.backend.fail = lambda _verb: engine.cancel()
    with pytest.raises(abcli.CancelledError):
        scorer(engine).score([([1] * 50, [2]), ([2] * 50, [2])])
    engine.backend.fail = lambda _verb: None
    assert engine.waiting(0) == engine.waiting(1) == 0
    assert scorer(engine).score([([1], [2])])[0][0].token == 2


@given(st.integers(1, 40), st.integers(1, 12), st.data())
def test_windows_cover_a_text(length: int, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(1, size))
    tokens = list(range(length))
    parts = windows(tokens, size, overlap)
    assert [token for _, continuation in parts for token in continuation] == tokens[1:]
    for context, continuation in parts:
        assert [*context, *continuation] == tokens[context[0] : continuation[-1] + 1]
        assert len(context) >= min(overlap, continuation[0])
        assert len(context) + len(continuation) == min(size + 1, length)


@pytest.mark.parametrize(
    ("context", "continuation", "wanted"),
    [
        ("ab", " cd", ("^ab", " cd")),
        ("ab ", "cd", ("^ab", " cd")),
        ("ab \n", " cd", ("^ab", " \n cd")),
        ("", "cd", ("", "cd")),
        ("  ", "cd", ("^  ", "cd")),
        ([1, 2], "cd", ([1, 2], "cd")),
        ("ab", [3], ("^ab", [3])),
        ("", [3], ("", [3])),
    ],
)
def test_a_space_between_belongs_to_what_follows(context: Any, continuation: Any, wanted: tuple[Any, Any]) -> None:
    def tokenize(text: str, *, add_special: bool = True) -> list[int]:
        return [ord(character) for character in ("^" if add_special else "") + text]

    found = pair_tokens(tokenize, context, continuation)
    assert found == tuple([ord(c) for c in part] if isinstance(part, str) else part for part in wanted)


def test_a_model_scores_as_its_logits_say(real_model: Path) -> None:
    question, texts = "The capital of France is", (" Paris.", " Paris, of course", " London")
    with abcli.load(real_model, buckets=3, slots=2, ctx_size=256) as llm:
        found = llm.score([(question, text) for text in texts], top=2)
        before = llm.tokenize(question)
        for text, scores in zip(texts, found, strict=True):
            whole = llm.tokenize(question + text)
            assert whole == [*before, *(score.token for score in scores)]
            for at, score in enumerate(scores, len(before)):
                exact = mixture(llm.logits(whole[:at]))
                assert score.log_probability == pytest.approx(exact[whole[at]], abs=2e-3)
                assert score.top[0][1] == pytest.approx(exact.max(), abs=2e-3)
        assert total(found[0]) > total(found[2])
        with pytest.raises(abcli.PromptError, match="vocabulary"):
            llm.score([([1], [llm.vocabulary_size])])


def total(scores: tuple[TokenScore, ...]) -> float:
    return sum(score.log_probability for score in scores)


def test_a_text_longer_than_the_context(tiny_model: Path) -> None:
    text = [index * 7 % 250 for index in range(150)]
    exact: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off", "prefill": "exact"}
    with abcli.load(tiny_model, buckets=2, slots=3, ctx_size=64, threads=1, **exact) as llm:
        for overlap in (1, 40):
            found = llm.score_text(text, overlap=overlap)
            assert [score.token for score in found] == text
            whole = [llm.first_token, *text]
            at = 100
            spans = [(c[0], c) for c in windows(list(range(151)), 64, overlap) if c[1][0] <= at <= c[1][-1]]
            (first,) = (context[0] for _, (context, _) in spans)
            exactly = mixture(llm.logits(whole[first:at]))
            assert found[at - 1].log_probability == pytest.approx(exactly[whole[at]], abs=1e-3)
        for wrong in (0, 64):
            with pytest.raises(abcli.UsageError, match="overlap"):
                llm.score_text(text, overlap=wrong)
        assert llm.score_text("") == ()


def test_a_recurrent_model_computes_again_what_it_cannot_keep(tmp_path: Path) -> None:
    path = write_tiny_mamba(tmp_path / "model.gguf")
    context, answers = [5, 6, 7, 8], ([1, 2, 3], [1, 4], [9, 1, 2])
    with abcli.load(path, buckets=1, ctx_size=64, threads=1) as llm:
        found = llm.score([(context, answer) for answer in answers])
        for answer, scores in zip(answers, found, strict=True):
            for at, score in enumerate(scores):
                exact = mixture(llm.logits([*context, *answer[:at]]))
                assert score.log_probability == pytest.approx(exact[answer[at]], abs=1e-3)
