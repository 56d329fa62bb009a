"""Merging against the formulas written out naively in float64."""

import math
import threading

import llama_cpp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from abcli.config import MERGE_RULES
from abcli.errors import NativeError, UsageError
from abcli.merge import PLAUSIBLE_SHARE, Merger, likeliest
from tests.support.merging import merge

RULES = pytest.mark.parametrize("rule", MERGE_RULES)
MIXTURES = pytest.mark.parametrize("rule", ["confidence", "mean", "entropy"])


def naive(logits, rule, pool_weights=()):
    """(probabilities, weights, agreement, log_normalizer) in float64, by the definitions."""
    logits = logits.astype(np.float64)
    normalizers = np.array([row.max() + math.log(np.exp(row - row.max()).sum()) for row in logits])
    p = np.exp(logits - normalizers[:, None])
    if rule == "confidence":
        weights = p.max(axis=1)
    elif rule == "entropy":
        weights = np.array([math.exp(sum(x * math.log(x) for x in row if x > 0)) for row in p])
    elif rule == "max":
        weights = np.eye(len(p))[int(np.argmax(p.max(axis=1)))]
    else:
        weights = np.ones(len(p))
    weights = weights / weights.sum()
    if rule == "product":
        with np.errstate(divide="ignore"):
            merged = np.exp(np.log(p).mean(axis=0))
        merged = merged / merged.sum()
    elif rule == "pool":
        merged = p.mean(axis=0)
        plausible = merged >= 0.01 * merged.max()
        weights = np.array(pool_weights) if pool_weights else weights
        floored = np.maximum(p[:, plausible], math.exp(-10) * merged[plausible])
        pooled = np.prod(floored ** weights[:, None], axis=0)
        merged[plausible] = pooled / pooled.sum() * merged[plausible].sum()
    else:
        merged = weights @ p
    return merged, weights, p.min(axis=0).sum(), weights @ normalizers


def near_tie(logits):
    """Whether two buckets are about equally confident."""
    confidences = np.sort(naive(logits, "confidence")[1])
    return bool((np.diff(confidences) < 1e-5).any())


def random_logits(buckets, vocabulary, seed=0, scale=4.0):
    random = np.random.default_rng(seed)
    shared = random.normal(0, scale, vocabulary)
    return (shared + random.normal(0, scale / 3, (buckets, vocabulary))).astype(np.float32)


finite_logits = st.integers(1, 5).flatmap(
    lambda buckets: st.integers(2, 12).flatmap(
        lambda vocabulary: arrays(np.float32, (buckets, vocabulary), elements=st.floats(-60, 60, width=32))
    )
)
masked_logits = finite_logits.flatmap(
    # Token 0 stays possible everywhere, so that the product has a token too.
    lambda logits: arrays(np.bool_, logits.shape).map(
        lambda mask: np.where(mask & (np.arange(logits.shape[1]) > 0), np.float32(-np.inf), logits)
    )
)


def near_the_plausible_share(logits):
    """Whether rounding may decide which tokens the rule `pool` takes."""
    mean = naive(logits, "mean")[0]
    shares = mean / mean.max()
    return bool((abs(shares - PLAUSIBLE_SHARE) < 1e-5).any())


@RULES
@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (3, 1000), (6, 20000), (16, 9001)])
def test_agrees_with_the_definition(rule, shape):
    logits = random_logits(*shape, seed=shape[1])
    merged = merge(logits, rule)
    probabilities, weights, agreement, log_normalizer = naive(logits, rule)
    np.testing.assert_allclose(merged.log_probabilities, np.log(probabilities), atol=2e-5)
    np.testing.assert_allclose(merged.weights, weights, rtol=1e-5)
    assert merged.agreement == pytest.approx(agreement, rel=1e-5)
    assert merged.log_normalizer == pytest.approx(log_normalizer, rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(merged.logits, np.log(probabilities) + log_normalizer, atol=3e-5)


@RULES
@given(logits=masked_logits)
@settings(max_examples=60, deadline=None)
def test_agrees_with_the_definition_where_tokens_are_forbidden(rule, logits):
    # Whom rounding makes the most confident is tested by itself below.
    assume(rule != "max" or not near_tie(logits))
    assume(rule != "pool" or not near_the_plausible_share(logits))
    merged = merge(logits, rule)
    probabilities, weights, agreement, _ = naive(logits, rule)
    np.testing.assert_allclose(np.exp(merged.log_probabilities), probabilities, rtol=1e-4, atol=1e-35)
    np.testing.assert_allclose(merged.weights, weights, rtol=1e-4)
    assert np.exp(merged.log_probabilities.astype(np.float64)).sum() == pytest.approx(1, abs=1e-5)
    assert merged.weights.sum() == pytest.approx(1)
    assert 0 <= merged.agreement <= 1
    assert merged.agreement == pytest.approx(agreement, abs=1e-5)


@RULES
@given(logits=masked_logits)
@settings(max_examples=60, deadline=None)
def test_a_token_is_impossible_exactly_where_the_rule_says(rule, logits):
    merged = merge(logits, rule)
    impossible = np.isneginf(logits)
    expected = {
        "product": impossible.any(axis=0),
        "max": impossible[int(np.argmax(merged.weights))],
    }.get(rule, impossible.all(axis=0))
    np.testing.assert_array_equal(np.isneginf(merged.log_probabilities), expected)
    np.testing.assert_array_equal(np.isneginf(merged.logits), expected)
    assert not np.isnan(merged.logits).any()


@RULES
@given(logits=finite_logits, data=st.data())
@settings(max_examples=40, deadline=None)
def test_order_of_buckets_does_not_matter(rule, logits, data):
    order = data.draw(st.permutations(range(len(logits))))
    before, after = merge(logits, rule), merge(logits[order], rule)
    if rule != "max" or not near_tie(logits):
        np.testing.assert_allclose(after.weights, before.weights[order], rtol=1e-5)
        np.testing.assert_allclose(after.log_probabilities, before.log_probabilities, atol=1e-4)
    assert after.agreement == pytest.approx(before.agreement, rel=1e-4, abs=1e-6)


@RULES
@pytest.mark.parametrize("shift", [-50.0, 1000.0])
def test_shifting_a_bucket_changes_only_the_normalizer(rule, shift):
    # Multiples of 1/64, so that a shift by up to 1000 is exact in float32.
    logits = np.round(random_logits(4, 3000) * 64) / np.float32(64)
    shifted = logits.copy()
    shifted[2] += np.float32(shift)
    before, after = merge(logits, rule), merge(shifted, rule)
    np.testing.assert_allclose(after.log_probabilities, before.log_probabilities, atol=2e-4)
    np.testing.assert_allclose(after.weights, before.weights, rtol=1e-5)
    assert after.log_normalizer == pytest.approx(before.log_normalizer + shift * before.weights[2], rel=1e-6)


@RULES
@given(row=arrays(np.float32, 50, elements=st.floats(-1e4, 1e4, width=32)), buckets=st.integers(2, 16))
@settings(max_examples=40, deadline=None)
def test_identical_buckets_give_back_their_logits(rule, row, buckets):
    merged = merge(np.tile(row, (buckets, 1)), rule)
    # Rounding of values as large as the distance of the logits from the normalizer.
    np.testing.assert_allclose(merged.logits, row, atol=1e-6 * (1 + np.abs(row).max()))
    assert merged.agreement == pytest.approx(1, abs=1e-5)


@RULES
@given(row=arrays(np.float32, (1, 40), elements=st.floats(width=32, allow_nan=False, max_value=2.0**120)))
@settings(max_examples=60, deadline=None)
def test_one_bucket_is_returned_bit_for_bit(rule, row):
    row[0, 0] = 1.5
    merged = merge(row, rule)
    assert merged.logits.tobytes() == row.tobytes()
    assert merged.agreement == 1.0
    assert merged.weights.tolist() == [1.0]


@pytest.mark.parametrize("vocabulary", [7, 50000])
def test_one_bucket_has_exact_log_probabilities_beside_a_large_normalizer(vocabulary):
    logits = np.full((1, vocabulary), np.float32(1e6))
    assert merge(logits, "mean").log_probabilities == pytest.approx(-math.log(vocabulary), abs=1e-6)


def test_max_takes_the_first_of_equals_bit_for_bit():
    logits = np.array([[0, 1], [5, 0], [0, 5], [5, 0]], np.float32)
    merged = merge(logits, "max")
    assert merged.weights.tolist() == [0, 1, 0, 0]
    assert merged.logits.tobytes() == logits[1].tobytes()


@MIXTURES
@pytest.mark.parametrize("gap", [88.0, 103.0, 150.0, 1e4, 1e30])
def test_probabilities_below_float32_are_right_in_the_logarithm(rule, gap):
    logits = random_logits(3, 9000)
    logits[:, 17] -= np.float32(gap)
    logits[:, 8000] -= np.float32(gap)
    merged = merge(logits, rule)
    terms = logits.astype(np.float64) - [[naive(row[None], "mean")[3]] for row in logits]
    terms = terms[:, [17, 8000]] + np.log(merged.weights)[:, None]
    expected = terms.max(axis=0) + np.log(np.exp(terms - terms.max(axis=0)).sum(axis=0))
    np.testing.assert_allclose(merged.log_probabilities[[17, 8000]], expected, rtol=1e-6)


@MIXTURES
def test_a_token_possible_in_one_unlikely_bucket_only(rule):
    logits = np.full((2, 6000), -np.inf, np.float32)
    logits[:, 0] = 0
    logits[1, 5999] = -200
    merged = merge(logits, rule)
    assert merged.log_probabilities[5999] == pytest.approx(math.log(0.5) - 200, rel=1e-6)
    assert np.isneginf(merged.log_probabilities[1:5999]).all()


@RULES
def test_a_single_possible_token_is_certain(rule):
    logits = np.full((3, 5000), -np.inf, np.float32)
    logits[:, 4321] = (3.4e38, 0, -3.4e38)
    merged = merge(logits, rule)
    assert merged.log_probabilities[4321] == pytest.approx(0, abs=1e-6)
    assert np.isneginf(np.delete(merged.log_probabilities, 4321)).all()
    assert merged.agreement == pytest.approx(1)


@RULES
def test_huge_logits(rule):
    logits = np.array([[3e38, -3e38, 0], [-3e38, -3e38, 3e38]], np.float32)
    merged = merge(logits, rule)
    if rule == "max":
        assert merged.log_probabilities.tolist()[0] == 0
    elif rule != "product":
        assert merged.log_probabilities[[0, 2]] == pytest.approx(math.log(0.5), abs=1e-6)
    assert not np.isnan(merged.log_probabilities).any()
    assert merged.agreement == 0


@RULES
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("position", [0, 7999])
def test_a_broken_bucket_is_named(rule, value, position):
    logits = random_logits(4, 8000)
    logits[2, position] = value
    with pytest.raises(NativeError, match="bucket 2"):
        merge(logits, rule)


@RULES
@pytest.mark.parametrize("buckets", [1, 3])
def test_a_bucket_of_forbidden_tokens_is_named(rule, buckets):
    logits = random_logits(buckets, 5000)
    logits[-1] = -np.inf
    with pytest.raises(NativeError, match=f"bucket {buckets - 1}"):
        merge(logits, rule)


def test_product_of_buckets_without_a_common_token():
    logits = np.array([[0, -np.inf], [-np.inf, 0]], np.float32)
    with pytest.raises(NativeError, match="no token"):
        merge(logits, "product")


def test_a_merger_is_reusable_after_an_error_and_leaves_its_input_alone():
    merger = Merger(3, 5000)
    broken = random_logits(3, 5000)
    broken[1, 4000] = math.nan
    with pytest.raises(NativeError):
        merger.merge(broken, "entropy")
    for seed, rule in enumerate((*MERGE_RULES, *MERGE_RULES)):
        logits = random_logits(3, 5000, seed)
        copy = logits.copy()
        again = merger.merge(logits, rule)
        fresh = merge(logits, rule)
        np.testing.assert_array_equal(again.log_probabilities, fresh.log_probabilities)
        np.testing.assert_array_equal(again.logits, fresh.logits)
        np.testing.assert_array_equal(logits, copy)


@pytest.mark.parametrize("rule", MERGE_RULES)
def test_several_threads_compute_the_same_numbers(rule):
    mergers = [Merger(3, 200_000, threads) for threads in (1, 4)]
    assert [merger._threads for merger in mergers] == [1, 4]
    for seed in range(3):
        one, several = (merger.merge(random_logits(3, 200_000, seed), rule) for merger in mergers)
        np.testing.assert_array_equal(several.log_probabilities, one.log_probabilities)
        np.testing.assert_array_equal(several.logits, one.logits)
        assert several.agreement == one.agreement
        np.testing.assert_array_equal(several.weights, one.weights)


def test_an_exception_in_a_thread_comes_out_and_spoils_nothing(monkeypatch):
    merger = Merger(3, 200_000, 4)
    logits = random_logits(3, 200_000)
    wanted = merger.merge(logits, "mean").logits.copy()
    here, exp = threading.current_thread(), np.exp
    with monkeypatch.context() as patch:
        patch.setattr(np, "exp", lambda *a, **k: exp(*a, **k) if threading.current_thread() is here else broken())
        with pytest.raises(MemoryError):
            merger.merge(logits, "mean")
    np.testing.assert_array_equal(merger.merge(logits, "mean").logits, wanted)


def broken():
    raise MemoryError


def test_a_small_merge_takes_one_thread():
    assert Merger(6, 30_000, 16)._threads == 1


def test_rows_of_a_larger_array_can_be_merged():
    slots = random_logits(6, 3000).reshape(3, 2, 3000)
    expected = merge(np.ascontiguousarray(slots[:, 1]), "confidence")
    np.testing.assert_allclose(merge(slots[:, 1], "confidence").logits, expected.logits, atol=1e-6)


def test_wrong_input():
    with pytest.raises(UsageError, match="geometric"):
        merge(random_logits(2, 5), "geometric")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="float64"):
        merge(random_logits(2, 5).astype(np.float64), "mean")
    with pytest.raises(UsageError, match=r"\(3, 5\)"):
        Merger(2, 5).merge(random_logits(3, 5), "mean")
    with pytest.raises(UsageError):
        Merger(2, 5).merge(random_logits(2, 5)[0], "mean")
    with pytest.raises(UsageError):
        Merger(0, 5)


@pytest.fixture(scope="module")
def real_logits(real_model):
    """Next-token logits of the real model with three RoPE bases, from three separate contexts."""
    rows = []
    for base in (50_000.0, 100_000.0, 200_000.0):
        model = llama_cpp.Llama(
            str(real_model), n_ctx=64, rope_freq_base=base, n_threads=1, logits_all=False, verbose=False
        )
        model.eval(model.tokenize(b"The capital of France is the city of"))
        pointer = llama_cpp.llama_get_logits_ith(model.ctx, -1)
        rows.append(np.ctypeslib.as_array(pointer, (model.n_vocab(),)).copy())
        model.close()
    return np.stack(rows)


@RULES
def test_real_model(rule, real_logits):
    assert len(np.unique(real_logits[:, 0])) == 3
    merged = merge(real_logits, rule)
    probabilities, weights, agreement, log_normalizer = naive(real_logits, rule)
    np.testing.assert_allclose(merged.log_probabilities, np.log(probabilities), atol=2e-5)
    np.testing.assert_allclose(merged.weights, weights, rtol=1e-5)
    assert merged.agreement == pytest.approx(agreement, rel=1e-5)
    np.testing.assert_allclose(merged.logits, np.log(probabilities) + log_normalizer, atol=3e-5)


@given(logits=masked_logits, data=st.data())
@settings(max_examples=80, deadline=None)
def test_pool_with_weights_agrees_with_the_definition(logits, data):
    assume(not near_the_plausible_share(logits))
    drawn = data.draw(st.lists(st.floats(-2, 2), min_size=len(logits) - 1, max_size=len(logits) - 1))
    weights = (*drawn, 1 - sum(drawn))
    merged = merge(logits, "pool", weights)
    expected = naive(logits, "pool", weights)
    np.testing.assert_allclose(np.exp(merged.log_probabilities), expected[0], rtol=2e-3, atol=1e-6)
    np.testing.assert_array_equal(merged.weights, weights)


def test_pool_turns_against_a_bucket_with_a_negative_weight():
    seeing, blind = np.log([[0.5, 0.4, 0.1], [0.8, 0.1, 0.1]]).astype(np.float32)
    merged = merge(np.stack([seeing, blind]), "pool", (1.5, -0.5))
    assert int(np.argmax(seeing)) == 0
    assert int(np.argmax(merged.log_probabilities)) == 1


@pytest.mark.parametrize("weights", [(1.0,), (0.5, 0.6), (float("nan"), 1.0), (0.2, 0.3, 0.5)])
def test_pool_refuses_wrong_weights(weights):
    with pytest.raises(UsageError):
        merge(random_logits(2, 10), "pool", weights)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=12), st.integers(0, 14))
def test_the_likeliest_come_first_and_of_equals_the_smaller_token(values: list[int], count: int) -> None:
    numbers = np.array(values, np.float32)
    found = likeliest(numbers, count).tolist()
    assert sorted(numbers[found], reverse=True) == sorted(numbers, reverse=True)[:count]
    assert found == sorted(found, key=lambda token: (-numbers[token], token))
