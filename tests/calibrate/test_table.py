"""Losses from tables: against the merge that decodes, against the evaluation's scores, and the fit of the weights."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.calibrate.table import PoolProblem, losses, make_table
from abcli.config import MERGE_RULES
from abcli.evals.configurations import Configuration
from abcli.evals.scoring import score
from tests.calibrate.planted import as_traces, random_answers
from tests.support.merging import merge

BASES = (2500.0, 5000.0, 10_000.0, 20_000.0, 40_000.0)

seeds = st.integers(0, 2**32 - 1)
columns_of_some = st.lists(st.integers(0, len(BASES) - 1), min_size=1, max_size=len(BASES), unique=True)


def weights_for(rule: str, count: int, seed: int) -> tuple[float, ...]:
    """Some weights with the sum 1, negative ones among them; none for other rules than `pool`."""
    if rule != "pool" or count == 1:
        return ()
    weights = np.random.default_rng(seed).normal(1, 1.5, count)
    return tuple((weights + (1 - weights.sum()) / count).tolist())


@pytest.mark.parametrize("rule", MERGE_RULES)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, columns=columns_of_some)
def test_losses_are_those_of_the_merge_that_decodes(rule, seed, columns):
    answers = random_answers(seed, len(BASES), questions=5)
    table = make_table(as_traces(answers, BASES, each=None), BASES)
    weights = weights_for(rule, len(columns), seed)
    expected = [
        np.mean([-merge(logits[columns], rule, weights).log_probabilities[gold] for logits, gold in answer])
        for answer in answers
    ]
    assert losses(table, columns, rule, weights) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize("rule", MERGE_RULES)
@settings(max_examples=25, deadline=None)
@given(seed=seeds, columns=columns_of_some, scale=st.sampled_from((1.0, 8.0)))
def test_losses_are_those_of_an_evaluation(rule, seed, columns, scale):
    """Also with few tokens kept, a different number at every step, and with buckets that differ by many nats."""
    traces = as_traces(random_answers(seed, len(BASES), questions=5, scale=scale), BASES, each=4)
    weights = weights_for(rule, len(columns), seed)
    chosen = Configuration("some", tuple(BASES[column] for column in columns), rule, weights=weights)
    expected = [score(trace, chosen).nll for trace in traces]
    table = make_table(traces, BASES)
    # What `product` takes to be left over is a small difference of sums.
    assert losses(table, columns, rule, weights) == pytest.approx(expected, abs=1e-5 if rule == "product" else 1e-9)


def test_equal_weights_are_usual():
    table = make_table(as_traces(random_answers(0, 3), BASES[:3], each=6), BASES[:3])
    equal = losses(table, [0, 1, 2], "pool", (1 / 3, 1 / 3, 1 / 3))
    assert losses(table, [0, 1, 2], "pool") == pytest.approx(equal)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, chosen=st.sets(st.integers(0, 7), min_size=1))
def test_some_questions_of_a_table(seed, chosen):
    table = make_table(as_traces(random_answers(seed, 3, questions=8), BASES[:3], each=5), BASES[:3])
    taken = sorted(chosen)
    part = table.take(np.array(taken, np.intp))
    assert part.questions == len(taken)
    for rule in MERGE_RULES:
        whole = losses(table, [0, 2], rule)
        assert losses(part, [0, 2], rule) == pytest.approx(whole[taken], abs=1e-12)


def test_only_the_bases_asked_for_in_their_order():
    traces = as_traces(random_answers(1, len(BASES)), BASES, each=8)
    all_of_them = make_table(traces, BASES)
    some = make_table(traces, (BASES[3], BASES[0]))
    assert losses(some, [0], "mean") == pytest.approx(losses(all_of_them, [3], "mean"))
    with pytest.raises(KeyError):
        make_table(traces, (123.0,))


def test_a_forbidden_token_is_next_to_impossible():
    answers = random_answers(2, 2, questions=2, longest=1)
    answers[0][0][0][0, answers[0][0][1]] = -np.inf
    with np.errstate(invalid="ignore"):  # the entropy of 0 log 0
        table = make_table(as_traces(answers, BASES[:2], each=None), BASES[:2])
    assert losses(table, [0], "mean")[0] > 1000
    for rule in ("mean", "confidence", "max", "product", "pool"):
        assert np.isfinite(losses(table, [0, 1], rule)).all()


def problem(seed: int) -> tuple[PoolProblem, np.ndarray]:
    """Buckets of which some know the answer and some mislead, and an importance for each token."""
    answers = random_answers(seed, 4, questions=30, scale=1.0)
    for answer in answers:
        for logits, gold in answer:
            logits[:3, gold] += np.array([2.0, 1.0, 0.5], np.float32)
    table = make_table(as_traces(answers, BASES[:4], each=None), BASES[:4])
    return PoolProblem(table, [0, 1, 2, 3]), 1 / np.bincount(table.question)[table.question]


@pytest.mark.parametrize("penalty", [0.01, 1.0, 100.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_fitted_weights_are_an_optimum(seed, penalty):
    pool, importance = problem(seed)

    def cost(weights):
        return float(importance @ pool.losses(weights) + penalty / 2 * ((weights - 0.25) ** 2).sum())

    found = pool.fit(importance, penalty)
    assert found.sum() == pytest.approx(1)
    step = 1e-4
    for first in range(4):
        for second in range(first):
            direction = np.zeros(4)
            direction[[first, second]] = 1, -1
            slope = (cost(found + step * direction) - cost(found - step * direction)) / (2 * step)
            assert abs(slope) < 1e-2
    random = np.random.default_rng(seed)
    for size in (0.001, 0.01, 0.1, 1.0, 3.0):
        for _ in range(20):
            change = random.normal(0, size, 4)
            assert cost(found + change - change.mean()) >= cost(found) - 1e-6
    assert cost(found) < cost(np.full(4, 0.25))


def test_a_heavy_penalty_keeps_weights_equal():
    pool, importance = problem(0)
    assert pool.fit(importance, 1e9) == pytest.approx(np.full(4, 0.25), abs=1e-4)


def test_what_misleads_gets_a_small_weight():
    pool, importance = problem(0)
    weights = pool.fit(importance, 0.01)
    assert weights.argmax() == 0
    assert weights.argmin() == 3
