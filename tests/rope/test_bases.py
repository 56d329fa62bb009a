"""How the RoPE bases of the buckets are chosen."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.config import MAX_BUCKETS, BucketConfig
from abcli.errors import UnsupportedModelError, UsageError
from abcli.rope.bases import choose_bases, paper_multipliers, parse_numbers, symmetric_multipliers

counts = st.integers(1, MAX_BUCKETS)
native_bases = st.floats(1000, 1e8)


def test_symmetric_six():
    assert symmetric_multipliers(6) == pytest.approx((0.5, 2**-0.5, 1.0, 2 ** (1 / 3), 2 ** (2 / 3), 2.0), rel=1e-12)


@pytest.mark.parametrize(("count", "expected"), [(1, (1.0,)), (2, (1.0, 2.0)), (3, (0.5, 1.0, 2.0))])
def test_symmetric_few(count, expected):
    assert symmetric_multipliers(count) == expected


@given(counts)
def test_symmetric_is_evenly_spread_on_both_sides_of_one(count):
    multipliers = symmetric_multipliers(count)
    assert len(multipliers) == count
    assert list(multipliers) == sorted(set(multipliers))
    below, above = multipliers[: (count - 1) // 2 + 1], multipliers[(count - 1) // 2 :]
    assert below[-1] == above[0] == 1.0
    for side, end in ((below, 0.5), (above, 2.0)):
        steps = np.diff(np.log(side))
        assert np.allclose(steps, steps[:1])
        assert len(side) == 1 or end in side


def test_paper_six_are_the_papers():
    assert paper_multipliers(6) == (1.0, 1.75, 1.8, 1.9, 2.0, 2.5)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, (1.0,)), (2, (1.0, 2.5)), (3, (1.0, 1.85, 2.5)), (11, (1.0, 1.375, 1.75, 1.775, 1.8, 1.85))],
)
def test_paper_other_counts_are_interpolated(count, expected):
    assert paper_multipliers(count)[: len(expected)] == pytest.approx(expected)


@pytest.mark.parametrize("multipliers", [symmetric_multipliers, paper_multipliers])
@pytest.mark.parametrize("count", [0, -1, MAX_BUCKETS + 1])
def test_counts_out_of_range(multipliers, count):
    with pytest.raises(UsageError, match=str(count)):
        multipliers(count)


@given(counts, st.sampled_from(["symmetric", "paper"]), native_bases)
def test_spreads_are_ascending_float32_with_the_native_base(count, spread, native):
    bases = choose_bases(BucketConfig(count=count, spread=spread), native)
    assert len(bases) == count
    assert list(bases) == sorted(bases)
    assert float(np.float32(native)) in bases
    assert all(base == float(np.float32(base)) for base in bases)


def test_explicit_values_keep_their_order_and_override_the_count():
    bases = choose_bases(BucketConfig(count=3, bases=(20000.0, 10000.1)), 10000.0)
    assert bases == (20000.0, float(np.float32(10000.1)))
    assert choose_bases(BucketConfig(count=9, multipliers=(2.0, 0.5)), 10000.0) == (20000.0, 5000.0)


@pytest.mark.parametrize(
    "config",
    [
        BucketConfig(bases=(1.0,)),
        BucketConfig(bases=(0.0,)),
        BucketConfig(bases=(-5e4,)),
        BucketConfig(bases=(math.nan,)),
        BucketConfig(bases=(math.inf,)),
        BucketConfig(bases=(1e39,)),
        BucketConfig(bases=(1 + 1e-9,)),
        BucketConfig(multipliers=(0.0,)),
        BucketConfig(multipliers=(-1.0,)),
        BucketConfig(multipliers=(math.nan,)),
        BucketConfig(multipliers=(1e36,)),
        BucketConfig(multipliers=(1e-5,)),
        BucketConfig(bases=(5e4,) * (MAX_BUCKETS + 1)),
        BucketConfig(bases=(5e4,), multipliers=(2.0,)),
        BucketConfig(count=0),
        BucketConfig(count=MAX_BUCKETS + 1),
        BucketConfig(spread="wide"),  # type: ignore[arg-type]
    ],
)
def test_impossible_settings(config):
    with pytest.raises(UsageError) as caught:
        choose_bases(config, 10000.0)
    assert caught.value.hint


@pytest.mark.parametrize("native", [0.0, 1.0, -1.0, math.nan, math.inf, 1e39])
def test_a_model_without_a_base(native):
    with pytest.raises(UnsupportedModelError):
        choose_bases(BucketConfig(), native)


def test_parse_numbers():
    assert parse_numbers("50000,100000", "--bases") == (50000.0, 100000.0)
    assert parse_numbers(" 0.5, 1 ,2e0", "--multipliers") == (0.5, 1.0, 2.0)


@pytest.mark.parametrize("text", ["", " ", ",", "1,", "1,,2", "nan", "1,inf", "-inf", "1e999", "x", "1_0", "1;2"])
def test_parse_numbers_names_the_flag(text):
    with pytest.raises(UsageError, match="--bases"):
        parse_numbers(text, "--bases")


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_parse_numbers_reads_back_what_was_written(numbers):
    assert parse_numbers(",".join(map(repr, numbers)), "--bases") == tuple(numbers)
