"""Scores of traces against the merging of whole distributions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from abcli.config import MERGE_RULES, MergeRule
from abcli.evals.configurations import Configuration
from abcli.evals.scoring import merged_node, score
from abcli.evals.traces import KEPT_TOKENS, Node, Trace, trace
from abcli.merge import PLAUSIBLE_SHARE, merge_kept
from tests.evals.random_engine import BASES, RandomEngine
from tests.support.merging import merge

PROMPT = (3, 1, 4)
# `merge` computes in float32, scores in float64.
ROUNDING = 5e-5
RULES = pytest.mark.parametrize("rule", MERGE_RULES)

chosen_bases = st.permutations(BASES).flatmap(lambda bases: st.integers(1, 3).map(lambda count: tuple(bases[:count])))
prompts = st.lists(st.integers(0, 255), min_size=1, max_size=3).map(tuple)
# Where distributions are flatter, more tokens are plausible than a trace keeps.
scales = st.sampled_from([3.0, 4.0, 10.0])


def merged_whole(engine: RandomEngine, tokens: Sequence[int], item: Configuration) -> NDArray[np.float32]:
    return merge(engine.rows(tokens, item.bases), item.merge, item.weights).log_probabilities


def is_unclear(whole: NDArray[np.float32], logits: NDArray[np.float32], rule: MergeRule) -> bool:
    """Whether rounding may decide which token is the likeliest, is plausible, or which bucket is the surest.

    For `pool` also whether a plausible token may be missing from a trace: then a score is not exact.
    """
    likeliest = np.sort(whole)[-2:]
    if likeliest[1] - likeliest[0] < ROUNDING:
        return True
    if rule == "pool":
        mean = merge(logits, "mean").log_probabilities
        limit = mean.max() + np.log(PLAUSIBLE_SHARE)
        kept = np.argsort(-logits, axis=1)[:, :KEPT_TOKENS]
        missing = np.setdiff1d(np.flatnonzero(mean > limit), kept)
        return bool((abs(mean - limit) < ROUNDING).any() or len(missing))
    if rule == "max" and len(logits) > 1:
        surest = np.sort([merge(row[None], "mean").log_probabilities.max() for row in logits])
        return bool(surest[-1] - surest[-2] < ROUNDING)
    return False


@RULES
@given(prompts, chosen_bases, scales, st.integers(0, 256), st.booleans())
@settings(max_examples=25, deadline=None)
def test_a_score_is_that_of_the_whole_distributions(
    rule: MergeRule, prompt: tuple[int, ...], bases: tuple[float, ...], scale: float, wrong: int, greedy: bool
) -> None:
    weights = (1.4, -0.6, 0.2)[: len(bases)] if rule == "pool" and len(bases) == 3 else ()
    item = Configuration("", bases, rule, weights=weights)
    engine = RandomEngine(scale=scale)
    answer: list[int] = []
    total, exact, slack = 0.0, True, 0.0
    for position in range(3):
        tokens = (*prompt, *answer)
        whole = merged_whole(engine, tokens, item)
        assume(not is_unclear(whole, engine.rows(tokens, bases), rule))
        best = int(np.argmax(whole))
        # Right up to the end, so that both outcomes are common.
        answer.append(best if greedy or position < 2 else wrong)
        exact = exact and answer[-1] == best
        total -= float(whole[answer[-1]])
    found = trace(engine, 0, prompt, [answer])
    if rule == "product":
        slack = sum(product_slack(node, found.select(bases)) for node in found.nodes)
    scored = score(found, item)
    assert scored.exact == exact
    assert scored.rank is None
    assert -ROUNDING <= scored.nll - total / 3 <= slack / 3 + ROUNDING


def product_slack(node: Node, rows: Sequence[int]) -> float:
    """How much too small the merged log-probabilities of `product` may be.

    By Hölder's inequality the tokens that are not kept have at most the geometric mean of the buckets' remaining mass,
    which is what `merge_kept` gives them.
    """
    kept = node.log_probabilities[rows].astype(np.float64)
    others = np.maximum(1 - np.exp(kept).sum(axis=1), 1e-12)
    return float(np.log1p(np.exp(np.log(others).mean()) / np.exp(kept.mean(axis=0)).sum()))


@pytest.mark.parametrize("rule", [rule for rule in MERGE_RULES if rule != "product"])
@given(prompts, chosen_bases, scales)
@settings(max_examples=20, deadline=None)
def test_all_kept_tokens_are_merged_as_in_the_whole(
    rule: MergeRule, prompt: tuple[int, ...], bases: tuple[float, ...], scale: float
) -> None:
    engine = RandomEngine(scale=scale)
    found = trace(engine, 0, prompt, [(0,)])
    whole = merged_whole(engine, prompt, Configuration("", bases, rule))
    assume(not is_unclear(whole, engine.rows(prompt, bases), rule))
    (node,) = found.nodes
    np.testing.assert_allclose(
        merged_node(node, found.select(bases), rule), whole[node.tokens], rtol=1e-5, atol=ROUNDING
    )


def test_product_is_near_where_the_rest_is_small() -> None:
    """On sharp distributions, as those of models are, what is not kept hardly matters."""
    engine = RandomEngine(scale=6.0)
    (node,) = trace(engine, 0, PROMPT, [(0,)]).nodes
    whole = merged_whole(engine, PROMPT, Configuration("", BASES, "product"))
    np.testing.assert_allclose(merged_node(node, [0, 1, 2], "product"), whole[node.tokens], rtol=1e-5, atol=2e-3)


@RULES
def test_candidates_by_the_shared_tree_are_those_computed_one_by_one(rule: MergeRule) -> None:
    # The first is a beginning of the third, the fourth of the first; two share all but the last token.
    candidates = [(5, 6, 7), (5, 6, 8), (5, 6, 7, 7), (5,), (200, 1), (200, 2, 3)]
    item = Configuration("", BASES, rule, weights=(1.4, -0.6, 0.2) if rule == "pool" else ())
    alone = []
    for tokens in candidates:
        scored = score(trace(RandomEngine(), 0, PROMPT, [tokens]), item)
        alone.append(-scored.nll * len(tokens))
    for first in range(len(candidates)):
        order = [first, *(index for index in range(len(candidates)) if index != first)]
        scored = score(trace(RandomEngine(), 0, PROMPT, [candidates[index] for index in order]), item)
        # A token of a later candidate widens what is kept, which moves the rest that `product` has to guess.
        tolerance = 1e-2 if rule == "product" else 1e-9
        assert -scored.nll * len(candidates[first]) == pytest.approx(alone[first], abs=tolerance)
        assert scored.rank == sum(other > alone[first] for other in alone)


def node(*rows: Sequence[float], tokens: Sequence[int] = (10, 20, 30)) -> Node:
    probabilities = np.array(rows)
    with np.errstate(divide="ignore"):
        logs = np.log(probabilities).astype(np.float32)
    safe = np.where(probabilities > 0, probabilities, 1)
    return Node(np.array(tokens, np.int32), logs, -(safe * np.log(safe)).sum(axis=1).astype(np.float32))


def test_nll_is_the_mean_over_the_tokens_and_the_rank_that_of_the_sum() -> None:
    item = Trace(
        (1e4,),
        (node([0.5, 0.3, 0.2]), node([0.1, 0.8, 0.1])),
        (((0, 10), (1, 10)), ((0, 20),), ((0, 10), (1, 20)), ((0, 30),)),
    )
    scored = score(item, Configuration("", (1e4,)))
    assert scored.nll == pytest.approx(-(np.log(0.5) + np.log(0.1)) / 2)
    assert not scored.exact
    # 0.05 against 0.3, 0.4 and 0.2.
    assert scored.rank == 3


def test_equally_likely_candidates_share_the_better_rank() -> None:
    item = Trace((1e4,), (node([0.4, 0.4, 0.2]),), (((0, 20),), ((0, 10),), ((0, 30),)))
    scored = score(item, Configuration("", (1e4,)))
    assert scored.rank == 0
    # Greedy decoding takes the first of equals.
    assert not scored.exact


def test_only_the_buckets_of_the_configuration_count_and_in_its_order() -> None:
    item = Trace((1e4, 2e4, 3e4), (node([0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]),), (((0, 10),),))

    def nll(bases: tuple[float, ...], weights: tuple[float, ...] = ()) -> float:
        return score(item, Configuration("", bases, "pool" if weights else "mean", weights=weights)).nll

    assert nll((1e4,)) == pytest.approx(-np.log(0.7))
    assert nll((2e4, 3e4)) == pytest.approx(-np.log(0.1))
    assert nll((1e4, 3e4)) == pytest.approx(-np.log(0.4))
    assert nll((1e4, 3e4), (0.9, 0.1)) == pytest.approx(nll((3e4, 1e4), (0.1, 0.9)))
    assert nll((1e4, 3e4), (0.9, 0.1)) < nll((1e4, 3e4), (0.1, 0.9))
    with pytest.raises(KeyError):
        nll((5e4,))


@RULES
def test_one_bucket_is_left_as_it_is(rule: MergeRule) -> None:
    one = node([0.5, 0.3, 0.2])
    np.testing.assert_allclose(merged_node(one, [0], rule), np.log([0.5, 0.3, 0.2]), atol=1e-6)
    np.testing.assert_allclose(
        merged_node(node([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]), [0, 1], rule), merged_node(one, [0], rule)
    )


@RULES
def test_a_token_is_impossible_where_the_whole_distribution_says_so(rule: MergeRule) -> None:
    rows = np.array([[0.6, 0.4, 0.0, 0.0], [0.5, 0.0, 0.5, 0.0]])
    with np.errstate(divide="ignore"):
        logs = np.log(rows).astype(np.float32)
    entropies = -np.where(rows > 0, rows * np.where(rows > 0, logs, 0), 0).sum(axis=1)
    found = merge_kept(logs, entropies.astype(np.float32), rule)
    np.testing.assert_allclose(found, merge(logs, rule).log_probabilities, atol=ROUNDING)
    assert found[3] == -np.inf
