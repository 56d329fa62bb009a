"""Greedy searches for bases whose waves complement each other."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from abcli.errors import UsageError
from abcli.rope.search import candidate_multipliers, search_envelope, search_paper
from abcli.rope.waveform import envelope

SEARCHES = [search_paper, search_envelope]
tables = st.integers(2, 7).flatmap(lambda rows: arrays(np.float64, (rows, 40), elements=st.integers(0, 9)))


def lowest(waves, chosen):
    return float(envelope(waves[list(chosen)]).min())


def bumps(*positions, at=10.0, length=60):
    """A flat wave of 5 with a spike at each position."""
    wave = np.full(length, 5.0)
    wave[list(positions)] = at
    return wave


@pytest.mark.parametrize("search", SEARCHES)
@given(tables, st.data())
def test_a_search_returns_different_candidates_from_the_native_one_on(search, waves, data):
    native = data.draw(st.integers(0, len(waves) - 1))
    count = data.draw(st.integers(1, len(waves)))
    chosen = search(waves, native, count)
    assert chosen[0] == native
    assert len(set(chosen)) == len(chosen) == count
    assert all(0 <= index < len(waves) for index in chosen)
    assert search(waves.copy(), native, count) == chosen


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("count", [0, 4])
def test_impossible_counts(search, count):
    with pytest.raises(UsageError, match=f"{count} bases") as caught:
        search(np.ones((3, 9)), 0, count)
    assert caught.value.hint


@given(tables)
def test_two_bases_by_envelope_are_the_best_pair(waves):
    chosen = search_envelope(waves, 0, 2)
    assert lowest(waves, chosen) == max(lowest(waves, (0, other)) for other in range(1, len(waves)))


@given(tables)
def test_the_envelope_search_never_does_worse_with_more_bases_or_than_any_exchange(waves):
    chosen = search_envelope(waves, 0, min(3, len(waves)))
    reached = lowest(waves, chosen)
    assert reached >= lowest(waves, (0,))
    for place in range(1, len(chosen)):
        for other in range(1, len(waves)):
            assert reached >= lowest(waves, (*chosen[:place], other, *chosen[place + 1 :]))


def test_exchanging_repairs_a_greedy_choice():
    """Greedy takes wave 1 first, the best alone; only 2 and 3 together cover everything."""
    waves = np.array([[1.0, 1, 1, 1], [2, 2, 2, 2], [9, 9, 1, 1], [1, 1, 9, 9]])
    assert set(search_envelope(waves, 0, 2)) == {0, 1}
    assert set(search_envelope(waves, 0, 3)) == {0, 2, 3}
    best = max(combinations(range(1, 4), 2), key=lambda pair: lowest(waves, (0, *pair)))
    assert set(best) == {2, 3}


def test_the_papers_search_puts_peaks_on_troughs():
    native = bumps(10, 30, 50, at=0.0)
    waves = np.array([native, bumps(5, 20, 40), bumps(10, 20, 40), bumps(10, 31, 49)])
    assert search_paper(waves, 0, 2, radius=3, tolerance=3) == (0, 3)
    # With less tolerance a peak next to a trough no longer counts.
    assert search_paper(waves, 0, 2, radius=3, tolerance=0) == (0, 2)


def test_the_papers_search_also_puts_troughs_on_peaks():
    waves = np.array([bumps(10, 30), bumps(20, 40, at=0.0), bumps(11, 40, at=0.0)])
    assert search_paper(waves, 0, 2, radius=3, tolerance=1) == (0, 2)


def test_the_papers_search_prefers_the_nearer_of_equally_many():
    waves = np.array([bumps(10, 30, at=0.0), bumps(12, 32), bumps(11, 31), bumps(11, 31)])
    assert search_paper(waves, 0, 2, radius=3, tolerance=3) == (0, 2)


def test_troughs_that_are_covered_are_covered_once():
    """After wave 1 only the trough at 50 is open, so wave 3 comes before 2, which would cover two again."""
    native = bumps(10, 30, 50, at=0.0)
    waves = np.array([native, bumps(10, 30), bumps(10, 31), bumps(50)])
    assert search_paper(waves, 0, 3, radius=3, tolerance=3) == (0, 1, 3)


def test_waves_without_extrema_are_taken_in_order():
    assert search_paper(np.ones((4, 20)), 2, 3) == (2, 0, 1)


def test_candidates():
    assert candidate_multipliers(0.5, 2.5, 5) == (0.5, 1.0, 1.5, 2.0, 2.5)
    assert candidate_multipliers(1.5, 2.5, 3) == (1.0, 1.5, 2.0, 2.5)
    fine = candidate_multipliers(0.5, 2.5, 201)
    assert (len(fine), fine[50], fine[1]) == (201, 1.0, 0.51)


@given(st.floats(0.01, 10), st.floats(1.01, 10), st.integers(2, 300))
def test_candidates_are_ascending_within_the_range_and_have_the_native_base(low, factor, count):
    multipliers = candidate_multipliers(low, low * factor, count)
    assert list(multipliers) == sorted(set(multipliers))
    assert 1.0 in multipliers
    assert count <= len(multipliers) <= count + 1
    inside = [m for m in multipliers if m != 1.0]
    assert all(low - 1e-8 <= m <= low * factor + 1e-8 for m in inside)


@pytest.mark.parametrize(
    ("low", "high", "count"), [(2, 1, 9), (1, 1, 9), (0, 1, 9), (-1, 1, 9), (1, np.inf, 9), (1, 2, 1)]
)
def test_impossible_candidates(low, high, count):
    with pytest.raises(UsageError) as caught:
        candidate_multipliers(low, high, count)
    assert caught.value.hint
