"""What fits into a length is found with few measurements; depths come in turn; settings are checked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.errors import UsageError
from abcli.evals.placement import asked_depths, check_settings, depth_range, most_that_fit, random_for
from abcli.evals.questions import TaskSettings


@given(
    st.lists(st.integers(1, 90), max_size=300),
    st.integers(0, 200),
    st.integers(-5, 3000),
    st.integers(-10, 10_000),
)
def test_most_that_fit_is_what_a_search_through_all_finds(costs: list[int], frame: int, limit: int, guess: int) -> None:
    sizes = [frame + int(total) for total in np.cumsum([0, *costs])]
    measured = []

    def size(number: int) -> int:
        measured.append(number)
        return sizes[number]

    expected = max((number for number, total in enumerate(sizes) if total <= limit), default=-1)
    assert most_that_fit(size, limit, len(costs), guess) == expected
    assert len(measured) <= 20


@given(st.integers(20, 2000), st.integers(10, 20), st.integers(0, 100_000))
def test_even_sizes_need_few_measurements(limit: int, cost: int, noise: int) -> None:
    jitter = np.random.default_rng(noise).integers(-2, 3, limit + 1)
    sizes = np.cumsum(cost + jitter)
    measured = []

    def size(number: int) -> int:
        measured.append(number)
        return int(sizes[number])

    found = most_that_fit(size, limit, limit, limit // cost)
    assert sizes[found + 1] > limit
    assert found == -1 or sizes[found] <= limit
    assert len(measured) <= 8


@pytest.mark.parametrize("power", [0.2, 3, 8])
@pytest.mark.parametrize("answer", [1, 700, 4999, 9998])
def test_uneven_sizes_are_bisected_in_the_end(power: float, answer: int) -> None:
    measured = []

    def size(number: int) -> int:
        measured.append(number)
        return int(1e6 * number**power)

    limit = int(1e6 * answer**power)
    assert most_that_fit(size, limit, 10_000, 1) == answer
    assert len(measured) <= 24


def test_a_size_that_does_not_quite_grow_still_ends_with_one_that_fits() -> None:
    sizes = [5, 9, 8, 12, 11, 15, 14, 18]
    found = most_that_fit(sizes.__getitem__, 11, 7, 3)
    assert sizes[found] <= 11


@given(st.integers(1, 40), st.integers(0, 100), st.integers(0, 100))
def test_depths_come_in_turn_and_follow_on_each_other(depths: int, first: int, number: int) -> None:
    asked = asked_depths(depths, 0, first) + asked_depths(depths, first, number)
    assert asked == asked_depths(depths, 0, first + number)
    np.testing.assert_allclose(asked_depths(depths, 0, depths), np.linspace(0, 1, depths), atol=1e-12)
    numbers = [asked.count(depth) for depth in asked_depths(depths, 0, depths)]
    assert sum(numbers) == first + number
    assert max(numbers) - min(numbers) <= 1


@given(st.integers(2, 40), st.floats(0, 1))
def test_a_depth_is_in_the_range_of_the_asked_depth_nearest_to_it(depths: int, depth: float) -> None:
    grid = asked_depths(depths, 0, depths)
    nearest = min(grid, key=lambda other: abs(other - depth))
    low, high = depth_range(nearest, depths)
    assert low - 1e-9 <= depth <= high + 1e-9


def test_the_range_of_a_single_depth_is_everything() -> None:
    assert depth_range(0.0, 1) == (0.0, 1.0)


@pytest.mark.parametrize("value", [0, -1, 2**31, 10**400])
@pytest.mark.parametrize("field", ["length", "limit", "depths"])
def test_settings_out_of_range_are_refused(field: str, value: int) -> None:
    settings = TaskSettings(**{"length": 100, "limit": 10, "depths": 5, field: value})
    with pytest.raises(UsageError, match=field) as raised:
        check_settings(settings)
    assert f"`{field}=" in raised.value.hint


def test_generators_differ_by_task_length_seed_context_and_purpose() -> None:
    settings = TaskSettings(100, 10)
    states = {
        random_for(*arguments).random()
        for arguments in (
            ("kv", settings, 0),
            ("needle", settings, 0),
            ("kv", TaskSettings(101, 10), 0),
            ("kv", TaskSettings(100, 10, seed=1), 0),
            ("kv", settings, 1),
            ("kv", settings, 0, "prose"),
        )
    }
    assert len(states) == 6
    # What no question may depend on: with it in the seed, more questions would be other questions.
    assert random_for("kv", TaskSettings(100, 99), 0).random() in states
