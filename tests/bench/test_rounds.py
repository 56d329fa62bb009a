"""Spreads and taking turns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.bench.rounds import Rounds, Spread, Turn, take_turns

times = st.floats(1e-6, 1e6)


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 2.0, 3.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0)
    assert Spread.of([1.0, 2.0]).relative == pytest.approx(0.5 / 1.5)


@given(st.lists(times, min_size=1))
def test_a_spread_is_ordered_and_inside_the_values(values: list[float]) -> None:
    found = Spread.of(values)
    assert min(values) <= found.low <= found.median <= found.high <= max(values)


def test_all_take_turns_and_another_begins_each_round() -> None:
    order: list[str] = []
    now = 0.0

    def turn(name: str, seconds: float) -> Turn:
        def run() -> None:
            nonlocal now
            order.append(name)
            now += seconds

        def prepare() -> None:
            nonlocal now
            now += 50

        return Turn(run, 2, prepare)

    found: Rounds[str] = Rounds()
    turns = {"a": turn("a", 1.0), "b": turn("b", 3.0), "c": turn("c", 4.0)}
    calls = []
    take_turns(turns, 4, found, lambda: calls.append(len(order)), lambda: now)
    assert "".join(order) == "abcbcacababc"
    assert calls == list(range(1, 13))
    # Per token, and without what prepares.
    assert found.seconds("a") == (0.5,) * 4
    assert found.ratios("b", "a") == (3.0,) * 4
    assert found.ratios("c", "nobody") == ()


def test_a_round_that_is_cut_short_keeps_what_it_has() -> None:
    found: Rounds[str] = Rounds()

    def interrupted() -> None:
        if len(found.seconds("b")) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        take_turns({"a": Turn(lambda: None, 1), "b": Turn(interrupted, 1)}, 3, found, clock=iter(range(99)).__next__)
    # The second round began with b.
    assert (len(found.seconds("a")), len(found.seconds("b"))) == (1, 1)
    first = found.begin()
    first["a"] = 7.0
    assert len(found.ratios("a", "b")) == 1


@given(st.lists(st.tuples(times, times, times), min_size=1))
def test_ratios_do_not_change_with_the_speed_of_a_round(rows: list[tuple[float, float, float]]) -> None:
    found: Rounds[str] = Rounds()
    for slow, a, b in rows:
        found.begin().update(a=slow * a, b=slow * b)
    assert found.ratios("a", "b") == pytest.approx([a / b for _, a, b in rows])
