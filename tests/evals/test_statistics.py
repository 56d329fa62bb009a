"""Statistics: against plain loops, what must hold for any scores, and the little that they refuse."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.errors import EvaluationDataError
from abcli.evals.scores import Score
from abcli.evals.statistics import (
    FEWEST_GROUPS,
    Estimate,
    LengthSummary,
    Measures,
    Summary,
    choose_baseline,
    nearest_depth,
    summarise,
)


@dataclass(frozen=True)
class Place:
    """All that statistics know of a question."""

    group: str
    depth: float
    length: int = 1024


MEANS = ("accuracy", "ranked_first", "nll")


def made_up(names=("native", "other"), questions=60, per_group=4, depths=5, seed=0, candidates=True):
    """Questions with their depths in turn, and random scores."""
    generator = np.random.default_rng(seed)
    places = [Place(f"group {index // per_group}", index % depths / max(1, depths - 1)) for index in range(questions)]
    scores = {
        name: tuple(
            Score(float(generator.exponential()), bool(generator.random() < 0.4), rank if candidates else None)
            for rank in generator.integers(0, 3, questions).tolist()
        )
        for name in names
    }
    return places, scores


places_and_scores = st.lists(
    st.tuples(
        st.integers(0, 6),
        st.floats(0, 1),
        *[st.tuples(st.floats(0, 20), st.booleans(), st.integers(0, 3)) for _ in range(2)],
    ),
    min_size=1,
    max_size=30,
).map(
    lambda rows: (
        [Place(f"{row[0]}", row[1]) for row in rows],
        {name: tuple(Score(*row[2 + column]) for row in rows) for column, name in enumerate(("native", "other"))},
    )
)


def only(found: tuple[LengthSummary, ...]) -> LengthSummary:
    (summary,) = found
    return summary


def estimates(measures: Measures[Estimate]) -> list[Estimate]:
    """All estimates, those by depth too."""
    found = []
    for item in fields(measures):
        value = getattr(measures, item.name)
        found += list(value) if isinstance(value, tuple) else [value] if value is not None else []
    return found


def plain_measures(places, scores, depths, drawn):
    """The measures of the questions of the groups in `drawn`, each as often as it is there, with loops alone."""
    chosen = [(p, s) for group in drawn for p, s in zip(places, scores, strict=True) if p.group == group]
    grid = [index / (depths - 1) for index in range(depths)]
    nll, accuracy = {}, {}
    for depth in grid:
        here = [s for p, s in chosen if min(grid, key=lambda other: (abs(other - p.depth), -other)) == depth]
        if here:
            nll[depth] = math.fsum(round(s.nll, 6) for s in here) / len(here)
            accuracy[depth] = sum(s.exact for s in here) / len(here)
    return {
        "accuracy": sum(s.exact for _, s in chosen) / len(chosen),
        "ranked_first": sum(s.rank == 0 for _, s in chosen) / len(chosen),
        "nll": math.fsum(round(s.nll, 6) for _, s in chosen) / len(chosen),
        "worst_nll": max(nll.values()),
        "worst_accuracy": min(accuracy.values()),
        "nll_gap": max(nll.values()) - min(nll.values()),
        "accuracy_gap": max(accuracy.values()) - min(accuracy.values()),
        "nll_by_depth": nll,
        "accuracy_by_depth": accuracy,
    }


def test_estimates_are_those_of_plain_loops():
    places, scores = made_up()
    # Depths as tasks give them: near the asked ones. One depth has no question.
    shift = np.random.default_rng(1).uniform(-0.12, 0.12, len(places))
    places = [replace(p, depth=min(1, max(0, p.depth + s))) for p, s in zip(places, shift, strict=True)]
    kept = [index for index, p in enumerate(places) if not 0.125 <= p.depth < 0.375]
    places = [places[index] for index in kept]
    scores = {name: tuple(of[index] for index in kept) for name, of in scores.items()}
    found = only(summarise(places, scores, 5))
    groups = list(dict.fromkeys(p.group for p in places))
    assert (found.questions, found.groups, found.baseline) == (len(places), len(groups), "native")
    assert found.depths == (0.0, 0.5, 0.75, 1.0)
    expected = {name: plain_measures(places, of, 5, groups) for name, of in scores.items()}
    for summary in found.summaries:
        mine, base = expected[summary.configuration], expected["native"]
        for name in (*MEANS, "worst_nll", "worst_accuracy", "nll_gap", "accuracy_gap"):
            assert getattr(summary.measures, name).value == pytest.approx(mine[name], abs=1e-8)
            if summary.difference is not None:
                assert getattr(summary.difference, name).value == pytest.approx(mine[name] - base[name], abs=1e-8)
        for name in ("nll_by_depth", "accuracy_by_depth"):
            values = [estimate.value for estimate in getattr(summary.measures, name)]
            assert values == pytest.approx([mine[name][depth] for depth in found.depths], abs=1e-8)
        worst = max(mine["nll_by_depth"], key=mine["nll_by_depth"].__getitem__)
        assert summary.worst_nll_depth == worst
        assert mine["accuracy_by_depth"][summary.worst_accuracy_depth] == mine["worst_accuracy"]
    assert [summary.difference is None for summary in found.summaries] == [True, False]
    assert sum(found.counts) == len(places)


def test_intervals_and_errors_are_those_of_plain_loops_over_the_same_draws_of_groups():
    places, scores = made_up(questions=48)
    found = only(summarise(places, scores, 5, seed=4, resamples=300))
    groups = list(dict.fromkeys(p.group for p in places))
    weights = np.random.default_rng([4, 1024]).multinomial(len(groups), [1 / len(groups)] * len(groups), size=300)
    drawn = [[group for group, times in zip(groups, row, strict=True) for _ in range(times)] for row in weights]
    assert all(len(draw) == len(groups) for draw in drawn)
    resampled = {name: [plain_measures(places, of, 5, draw) for draw in drawn] for name, of in scores.items()}
    other = found.summaries[1]
    assert other.difference is not None
    for name in (*MEANS, "worst_nll", "worst_accuracy", "nll_gap", "accuracy_gap"):
        values = np.array([item[name] for item in resampled["other"]])
        paired = values - [item[name] for item in resampled["native"]]
        for numbers, estimate in ((values, getattr(other.measures, name)), (paired, getattr(other.difference, name))):
            assert estimate.error == pytest.approx(numbers.std(ddof=1), abs=1e-8)
            limits = np.percentile(numbers, (2.5, 97.5))
            assert (estimate.low, estimate.high) == pytest.approx(tuple(limits), abs=1e-8)


def test_answers_on_one_context_are_not_counted_as_independent():
    alone, scores = made_up(questions=64, per_group=1)
    # All questions of a group have the same score: eight of them tell no more than one.
    places = [place for place in alone for _ in range(8)]
    repeated = {name: tuple(score for score in of for _ in range(8)) for name, of in scores.items()}
    for single, eight in zip(
        only(summarise(alone, scores, 5)).summaries, only(summarise(places, repeated, 5)).summaries, strict=True
    ):
        assert eight.measures.nll.value == single.measures.nll.value
        assert eight.measures.nll.error == pytest.approx(single.measures.nll.error, rel=0.05)


def test_pairing_sees_a_small_difference_in_the_noise():
    places, scores = made_up(("native",), questions=200)
    native = scores["native"]
    better = tuple(replace(score, nll=score.nll - 0.01) for score in native)
    found = only(summarise(places, {"native": native, "better": better}, 5))
    difference = found.summaries[1].difference
    assert difference is not None
    assert (difference.nll.low, difference.nll.high) == pytest.approx((-0.01, -0.01), abs=1e-6)
    assert difference.nll.clear
    assert difference.nll.error < 1e-6 < found.summaries[1].measures.nll.error


def test_an_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(3)
    trials, inside = 200, 0
    for trial in range(trials):
        context = np.repeat(generator.normal(0, 1, 40), 4)
        nll = 5 + context + generator.normal(0, 1, 160)
        places = [Place(f"{index // 4}", 0.0) for index in range(160)]
        scores = {"native": tuple(Score(float(value), exact=True) for value in nll)}
        interval = only(summarise(places, scores, 1, seed=trial, resamples=400)).summaries[0].measures.nll
        inside += interval.low <= 5 <= interval.high
    # 95 % with a standard error of 1.5 % over 200 trials.
    assert 0.89 <= inside / trials <= 0.99


@settings(max_examples=60, deadline=None)
@given(places_and_scores, st.integers(1, 7), st.integers(0, 3))
def test_what_holds_for_any_scores(made, depths, seed):
    places, scores = made
    found = only(summarise(places, scores, depths, seed=seed, resamples=200))
    assert sum(found.counts) == found.questions == len(places)
    assert len(found.depths) == len(found.counts) <= depths
    assert all(count > 0 for count in found.counts)
    for summary in found.summaries:
        measures, difference = summary.measures, summary.difference
        for estimate in estimates(measures) + ([] if difference is None else estimates(difference)):
            assert estimate.low <= estimate.high
            assert estimate.error >= 0
            assert all(map(math.isfinite, (estimate.value, estimate.low, estimate.high)))
        for item in (measures, difference):
            for name in MEANS if item is not None else ():
                estimate = getattr(item, name)
                assert estimate.low - 1e-9 <= estimate.value <= estimate.high + 1e-9
        by_depth = [estimate.value for estimate in measures.nll_by_depth]
        assert measures.worst_nll.value == max(by_depth)
        assert measures.worst_nll.value >= measures.nll.value - 1e-8
        assert measures.nll_gap.value == pytest.approx(max(by_depth) - min(by_depth), abs=1e-8)
        assert summary.worst_nll_depth in found.depths
        assert summary.worst_accuracy_depth in found.depths


@settings(max_examples=60, deadline=None)
@given(places_and_scores, st.integers(1, 7))
def test_equal_configurations_differ_by_exactly_nothing(made, depths):
    places, scores = made
    same = dict.fromkeys(("first", "second", "third"), scores["native"])
    found = only(summarise(places, same, depths, resamples=100))
    assert found.baseline == "first"
    for summary in found.summaries[1:]:
        assert summary.difference is not None
        for estimate in estimates(summary.difference):
            assert estimate == Estimate(0.0, 0.0, 0.0, 0.0)
            assert not estimate.clear


@settings(max_examples=60, deadline=None)
@given(places_and_scores, st.randoms(use_true_random=False))
def test_the_order_of_questions_and_rounding_to_a_report_change_nothing(made, shuffler):
    places, scores = made
    found = only(summarise(places, scores, 5, resamples=50))
    stored = {name: tuple(replace(score, nll=round(score.nll, 6)) for score in of) for name, of in scores.items()}
    assert only(summarise(places, stored, 5, resamples=50)) == found
    # Groups keep their order of first appearance, which the draws depend on.
    order = sorted(range(len(places)), key=lambda index: (first_of(places, index), shuffler.random()))
    mixed = {name: tuple(of[index] for index in order) for name, of in scores.items()}
    assert only(summarise([places[index] for index in order], mixed, 5, resamples=50)) == found


def first_of(places, index):
    """Where the group of a question first appears."""
    return next(at for at, place in enumerate(places) if place.group == places[index].group)


def test_the_differences_reverse_with_the_baseline():
    places, scores = made_up(("one", "two"))
    there = only(summarise(places, scores, 5)).summaries[1].difference
    back = only(summarise(places, dict(reversed(scores.items())), 5)).summaries[1].difference
    assert there is not None
    assert back is not None
    for forwards, backwards in zip(estimates(there), estimates(back), strict=True):
        assert forwards.value == -backwards.value
        assert (forwards.low, forwards.high) == pytest.approx((-backwards.high, -backwards.low), abs=1e-8)


def test_lengths_are_summarised_apart_in_ascending_order():
    places, scores = made_up(questions=40)
    longer, others = made_up(questions=20, seed=5)
    together = [replace(place, length=2048) for place in longer] + places
    found = summarise(together, {name: others[name] + scores[name] for name in scores}, 5)
    assert [(item.length, item.questions) for item in found] == [(1024, 40), (2048, 20)]
    assert found[0] == only(summarise(places, scores, 5))


def test_the_seed_decides_about_the_draws_alone():
    places, scores = made_up()
    first, again, other = (only(summarise(places, scores, 5, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    mine, theirs = first.summaries[0].measures.nll, other.summaries[0].measures.nll
    assert mine.value == theirs.value
    assert (mine.low, mine.high) != (theirs.low, theirs.high)


def test_without_candidates_nothing_is_ranked():
    places, scores = made_up(candidates=False)
    for summary in only(summarise(places, scores, 5)).summaries:
        assert summary.measures.ranked_first is None
        assert summary.difference is None or summary.difference.ranked_first is None


def test_a_single_context_has_no_width_and_is_not_reliable():
    places, scores = made_up(questions=5, per_group=5)
    found = only(summarise(places, scores, 5))
    assert not found.reliable
    assert found.summaries[0].measures.nll.error == 0
    assert only(summarise(*made_up(questions=FEWEST_GROUPS, per_group=1), 5)).reliable


def test_many_weights_are_drawn_in_pieces(monkeypatch):
    places, scores = made_up()
    whole = only(summarise(places, scores, 5))
    monkeypatch.setattr("abcli.evals.statistics._MAX_WEIGHTS", 100)
    assert only(summarise(places, scores, 5)) == whole


@given(st.floats(0, 1), st.integers(1, 50))
def test_a_depth_belongs_to_the_nearest_asked_one(depth, depths):
    index = nearest_depth(depth, depths)
    grid = np.linspace(0, 1, depths)
    assert 0 <= index < depths
    assert abs(grid[index] - depth) <= np.abs(grid - depth).min() + 1e-6


def test_two_equally_near_depths():
    assert [nearest_depth(depth, 5) for depth in (0.125, 0.375, 0.1249999999)] == [1, 2, 1]


def test_the_baseline():
    assert choose_baseline(["spread6", "native"]) == "native"
    assert choose_baseline(["spread6", "paper6"]) == "spread6"


@pytest.mark.parametrize("nll", [math.nan, math.inf, -math.inf])
def test_a_likelihood_that_is_no_number_is_refused(nll):
    places, scores = made_up(questions=3)
    scores["other"] = (*scores["other"][:2], replace(scores["other"][2], nll=nll))
    with pytest.raises(EvaluationDataError, match="other gives the answer of question 3") as caught:
        summarise(places, scores, 5)
    assert caught.value.hint


def test_nothing_to_summarise():
    with pytest.raises(EvaluationDataError, match="nothing to summarise"):
        summarise([], {"native": ()}, 5)
    with pytest.raises(EvaluationDataError, match="nothing to summarise"):
        summarise([Place("a", 0.5)], {}, 5)


def test_summaries_name_all_configurations_in_order():
    places, scores = made_up(("c", "native", "a"))
    found: tuple[Summary, ...] = only(summarise(places, scores, 5)).summaries
    assert [summary.configuration for summary in found] == ["c", "native", "a"]
