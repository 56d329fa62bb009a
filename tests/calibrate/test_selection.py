"""The choice of bases: what was planted is found, and nothing is judged by questions it was chosen with."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.calibrate.selection import Questions, fitted, folds, forward, select, worst_depth
from abcli.calibrate.table import losses, make_table
from abcli.config import MERGE_RULES
from tests.calibrate.planted import as_traces, random_answers

BASES = (1000.0, 2000.0, 3000.0, 4000.0)
DEPTHS = 2


def planted(strengths: np.ndarray, seed: int = 0, count: int = 60, noise: float = 0.3) -> Questions:
    """Questions in contexts of 3, where base b adds `strengths` [depths, bases] to the right token's logit."""
    answers = random_answers(seed, len(BASES), questions=count, longest=2, scale=noise)
    depths = np.arange(count) % DEPTHS
    for depth, answer in zip(depths, answers, strict=True):
        for logits, gold in answer:
            logits[:, gold] += strengths[depth].astype(np.float32)
    return Questions(make_table(as_traces(answers, BASES, each=None), BASES), np.arange(count) // 3, depths)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=12), count=st.integers(2, 7))
def test_folds_part_questions_but_no_contexts(sizes, count):
    groups = np.repeat(np.arange(len(sizes)) * 3, sizes)
    parts = folds(groups, count)
    assert len(parts) == min(count, len(sizes))
    tested = np.concatenate([test for _, test in parts])
    assert sorted(tested.tolist()) == list(range(len(groups)))
    for training, test in parts:
        assert len(training) > 0
        assert sorted([*training.tolist(), *test.tolist()]) == list(range(len(groups)))
        assert not set(groups[training]) & set(groups[test])


@settings(max_examples=60, deadline=None)
@given(items=st.lists(st.tuples(st.floats(0, 20), st.integers(0, 4)), min_size=1, max_size=30))
def test_the_worst_depth(items):
    values, depths = np.array([value for value, _ in items]), np.array([depth for _, depth in items])
    means = [np.mean([value for value, depth in items if depth == at]) for at in {depth for _, depth in items}]
    assert worst_depth(values, depths) == pytest.approx(max(means))


@pytest.mark.parametrize("rule", MERGE_RULES)
@pytest.mark.parametrize("good", range(len(BASES)))
def test_a_good_base_is_found(rule, good):
    strengths = np.zeros((DEPTHS, len(BASES)))
    strengths[:, good] = 5.0
    found = select(planted(strengths), [rule], 1)
    assert found.chosen.columns == (good,)
    assert forward(planted(strengths), rule, 3)[-1].columns[0] == good


@pytest.mark.parametrize("pair", [(0, 3), (1, 2), (2, 0)])
def test_bases_that_cover_each_other_s_depths_are_found(pair):
    """Each of two bases answers at one depth and errs, without confidence, at the other."""
    strengths = np.zeros((DEPTHS, len(BASES)))
    strengths[0, pair[0]] = strengths[1, pair[1]] = 5.0
    found = select(planted(strengths), ["max", "confidence"], 2)
    assert set(found.chosen.columns) == set(pair)
    # The rules are told apart: the most confident bucket is always the one that knows.
    assert found.chosen.rule == "max"
    assert found.tried[0].mean < min(outcome.mean for outcome in found.tried if outcome.buckets == 1)


def test_a_given_set_is_taken_where_no_path_leads_to_it():
    strengths = np.zeros((DEPTHS, len(BASES)))
    strengths[0, 0] = strengths[1, 3] = 5.0
    found = select(planted(strengths), ["max"], 1, given=[(0, 3)])
    assert found.chosen.columns == (0, 3)
    assert found.tried[0].given
    assert not any(outcome.given for outcome in found.tried[1:])


def test_outcomes_are_of_questions_that_were_not_chosen_by():
    questions = planted(np.zeros((DEPTHS, len(BASES))), noise=2.0)
    for rule in ("mean", "pool"):
        tried = select(questions, [rule], 3, given=[(1, 2)]).tried
        assert sorted((outcome.buckets, outcome.given) for outcome in tried) == [
            *((1, False), (2, False), (2, True), (3, False))
        ]
        expected = {size: np.full(questions.table.questions, np.nan) for size in (1, 2, 3, "given")}
        for training, test in folds(questions.groups):
            known = questions.take(training)
            for candidate in forward(known, rule, 3):
                expected[len(candidate.columns)][test] = candidate.losses(questions.table.take(test))
            expected["given"][test] = fitted(known.table, (1, 2), rule).losses(questions.table.take(test))
        for outcome in tried:
            values = expected["given" if outcome.given else outcome.buckets]
            assert outcome.losses == pytest.approx(values)
            assert outcome.mean == pytest.approx(values.mean())
            assert outcome.worst == pytest.approx(worst_depth(values, questions.depths))


def test_with_one_bucket_all_rules_are_one():
    tried = select(planted(np.zeros((DEPTHS, len(BASES)))), ["mean", "max", "pool"], 2).tried
    assert [outcome.buckets for outcome in tried].count(1) == 1
    assert sorted(outcome.rule for outcome in tried if outcome.buckets == 2) == ["max", "mean", "pool"]


def test_no_more_buckets_than_bases():
    found = select(planted(np.zeros((DEPTHS, len(BASES)))), ["mean"], 16)
    assert max(outcome.buckets for outcome in found.tried) == len(BASES)


def test_every_step_of_the_path_adds_one_base():
    path = forward(planted(np.zeros((DEPTHS, len(BASES))), noise=2.0), "pool", 4)
    assert [len(candidate.columns) for candidate in path] == [1, 2, 3, 4]
    for before, after in pairwise(path):
        assert after.columns[:-1] == before.columns
        assert sum(after.weights) == pytest.approx(1)


def test_progress_comes_to_its_end():
    steps = []
    select(planted(np.zeros((DEPTHS, len(BASES)))), ["mean", "max"], 2, lambda done, total: steps.append((done, total)))
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[0][0] == 0
    assert steps[-1][0] == steps[-1][1]
    assert len({total for _, total in steps}) == 1


def test_a_candidate_scores_by_its_rule_and_weights():
    questions = planted(np.zeros((DEPTHS, len(BASES))), noise=2.0)
    candidate = fitted(questions.table, (0, 2), "pool")
    assert candidate.losses(questions.table) == pytest.approx(
        losses(questions.table, (0, 2), "pool", candidate.weights)
    )
    assert fitted(questions.table, (0,), "pool").weights == ()
    assert fitted(questions.table, (0, 2), "mean").weights == ()
