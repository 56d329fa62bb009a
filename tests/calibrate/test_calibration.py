"""The run of a calibration on a subject of which it is known what is good for it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.calibrate.calibration import (
    CALIBRATED,
    GRID,
    CalibrationSettings,
    calibrate,
    competitors,
    configuration,
    cross_validated,
    end_of_calibration,
)
from abcli.calibrate.gates import GATES, steps_of, try_gate
from abcli.calibrate.selection import Candidate, Questions, fitted, folds
from abcli.calibrate.table import losses, make_table
from abcli.config import BucketConfig
from abcli.errors import UsageError
from abcli.evals.model_under_test import Prefill
from abcli.evals.questions import Question
from abcli.evals.scoring import score
from abcli.evals.statistics import paired_difference
from abcli.rope.bases import choose_bases
from tests.calibrate.planted import NATIVE_BASE, PlantedSubject, as_traces, random_answers

SETTINGS = CalibrationSettings("kv", 400, limit=30, held_out=30, depths=3, buckets=2, rules=("mean", "pool"))
NATIVELY = Prefill("shared", NATIVE_BASE)


def half_is_good(multiple: float, _prefill: float, _depth: float) -> float:
    return 6.0 if multiple == 0.5 else 1.0


def ends_are_good(multiple: float, _prefill: float, depth: float) -> float:
    """The lowest base knows what stands early, the highest what stands late."""
    return 6.0 if (multiple == 0.25 and depth < 0.6) or (multiple == 4 and depth >= 0.4) else 0.0


def question(group: str) -> Question:
    return Question(group, group, "", "", "", "", 0.0, 400)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(1, 8), min_size=2, max_size=12), data=st.data())
def test_no_context_is_in_both_parts(sizes, data):
    questions = [question(str(number)) for number, size in enumerate(sizes) for _ in range(size)]
    limit = data.draw(st.integers(1, len(questions)))
    ends = np.cumsum(sizes).tolist()
    cut = next(end for end in ends if end >= limit)
    if cut == len(questions) or cut == sizes[0]:
        with pytest.raises(UsageError):
            end_of_calibration(questions, limit)
        return
    assert end_of_calibration(questions, limit) == cut
    known, held_out = ({item.group for item in part} for part in (questions[:cut], questions[cut:]))
    assert not known & held_out


def test_the_grid_spans_the_default_spread_and_more():
    assert [round(multiple, 4) for multiple in GRID] == [0.25, 0.5, 0.7071, 1, 1.2599, 1.5874, 2, 4]


@pytest.mark.parametrize("buckets", [1, 2, 5, 6, 16])
def test_what_has_to_be_beaten_are_the_usual_sets(buckets):
    native, spread, paper = competitors(buckets, NATIVE_BASE)
    assert (native.name, native.bases) == ("native", (NATIVE_BASE,))
    assert (spread.name, spread.merge) == (f"spread{buckets}", "confidence")
    assert spread.bases == choose_bases(BucketConfig(count=buckets), NATIVE_BASE)
    assert (paper.name, paper.merge) == (f"paper{buckets}", "confidence")
    assert paper.bases == choose_bases(BucketConfig(count=buckets, spread="paper"), NATIVE_BASE)


def test_a_choice_is_put_in_order_with_its_weights():
    bases = (2500.0, 5000.0, 10_000.0)
    chosen = configuration(Candidate((2, 0, 1), "pool", (0.7, -0.1, 0.4)), bases, NATIVE_BASE)
    assert (chosen.bases, chosen.weights) == (bases, (-0.1, 0.4, 0.7))
    assert (chosen.name, chosen.merge, chosen.prefill, chosen.prefill_base) == (CALIBRATED, "pool", "auto", None)
    # One bucket always computes its prompt itself.
    assert configuration(Candidate((1,), "pool"), bases, NATIVE_BASE).prefill == "exact"
    assert configuration(Candidate((2,), "pool"), bases, NATIVE_BASE).prefill == "auto"
    assert configuration(Candidate((2,), "pool"), bases, NATIVE_BASE).merge == "confidence"


def test_the_error_of_a_difference_counts_contexts():
    random = np.random.default_rng(0)
    values, baseline = random.normal(size=40), random.normal(size=40)
    mean, error = paired_difference(values, baseline, np.arange(40))
    assert mean == pytest.approx((values - baseline).mean())
    assert error == pytest.approx((values - baseline).std() / np.sqrt(40))
    # Every question three times over tells no more than once.
    again = paired_difference(np.repeat(values, 3), np.repeat(baseline, 3), np.repeat(np.arange(40), 3))
    assert again == pytest.approx((mean, error))


@pytest.mark.parametrize("rule", ["mean", "pool"])
def test_weights_are_judged_without_the_questions_they_are_fitted_to(rule):
    bases = (1000.0, 2000.0, 3000.0)
    table = make_table(as_traces(random_answers(0, 3, questions=20), bases, each=None), bases)
    questions = Questions(table, np.arange(20) // 2, np.arange(20) % 3)
    values = cross_validated(questions, rule)
    for training, test in folds(questions.groups):
        weights = fitted(table.take(training), (0, 1, 2), rule).weights
        assert values[test] == pytest.approx(losses(table, (0, 1, 2), rule, weights)[test])


def test_a_good_base_is_chosen_and_judged_on_other_questions():
    subject = PlantedSubject(half_is_good)
    found = calibrate(replace(SETTINGS, buckets=1), subject)
    assert found.chosen.bases == (NATIVE_BASE / 2,)
    assert found.prefills == ()
    asked, known = subject.asked, subject.asked[: found.questions]
    assert len(asked) == 60
    assert found.questions >= 30
    assert list(found.held_out.questions) == asked[found.questions :]
    assert found.contexts == len({item.group for item in known})
    assert not {item.group for item in known} & {item.group for item in found.held_out.questions}
    # All questions under all bases at once; then those held out as a single bucket will compute them.
    (first, second) = subject.calls
    assert first == (60, tuple(sorted(found.bases)), NATIVELY)
    assert second == (60 - found.questions, (NATIVE_BASE / 2,), Prefill("exact", NATIVE_BASE))


def test_what_may_be_chosen_includes_all_that_is_judged():
    found = calibrate(
        replace(SETTINGS, buckets=5, rules=("mean",), prefill_multipliers=()), PlantedSubject(half_is_good)
    )
    assert {item.name for item in found.held_out.configurations} == {"native", "spread5", "paper5", CALIBRATED}
    for item in found.held_out.configurations:
        assert set(item.bases) <= set(found.bases)
    assert set(choose_bases(BucketConfig(multipliers=GRID), NATIVE_BASE)) <= set(found.bases)
    assert list(found.bases) == sorted(set(found.bases))


def test_the_scores_are_those_of_the_questions_held_out():
    subject = PlantedSubject(ends_are_good)
    found = calibrate(replace(SETTINGS, prefill_multipliers=()), subject)
    assert set(found.chosen.bases) == {NATIVE_BASE / 4, NATIVE_BASE * 4}
    assert len(subject.calls) == 1
    tokenized = [subject.tokenize(item) for item in found.held_out.questions]
    traces = subject.trace(tokenized, found.bases, NATIVELY, lambda _done, _all: None)
    assert list(found.held_out.scores) == ["native", "spread2", "paper2", CALIBRATED]
    for item in found.held_out.configurations:
        assert found.held_out.scores[item.name] == tuple(score(trace, item) for trace in traces)
    means = {name: np.mean([one.nll for one in scores]) for name, scores in found.held_out.scores.items()}
    assert means[CALIBRATED] == min(means.values())
    assert tuple(trial.gate for trial in found.gates) == GATES


def test_gates_are_tried_on_the_questions_to_choose_by():
    def strength(multiple: float, prefill: float, depth: float) -> float:
        # The native base is sure of what stands early, somewhat sure of what stands in the middle.
        return ends_are_good(multiple, prefill, depth) + (multiple == 1) * 6 * (1 - depth)

    subject = PlantedSubject(strength)
    found = calibrate(replace(SETTINGS, prefill_multipliers=()), subject)
    known = subject.asked[: found.questions]
    traces = subject.trace([subject.tokenize(item) for item in known], found.bases, NATIVELY, lambda _done, _all: None)
    groups = np.unique([item.group for item in known], return_inverse=True)[1]
    steps = steps_of(traces, found.chosen, NATIVE_BASE)
    assert found.gates == tuple(try_gate(steps, groups, gate) for gate in GATES)
    assert 0 < found.gates[0].asked < found.gates[-1].asked <= 1
    assert calibrate(replace(SETTINGS, buckets=1), PlantedSubject(half_is_good)).gates == ()


def test_a_better_prefill_base_is_taken():
    def strength(multiple: float, prefill: float, depth: float) -> float:
        return ends_are_good(multiple, prefill, depth) + (1.5 if 1.2 < prefill < 1.6 else 0.0)

    subject = PlantedSubject(strength)
    found = calibrate(SETTINGS, subject)
    better = choose_bases(BucketConfig(multipliers=(2**0.5,)), NATIVE_BASE)[0]
    assert found.chosen.prefill_base == better
    assert [trial.taken for trial in found.prefills] == [trial.base == better for trial in found.prefills]
    assert len(found.prefills) == 2
    taken = next(trial for trial in found.prefills if trial.taken)
    assert taken.difference < -taken.error < 0
    chosen = tuple(found.chosen.bases)
    assert subject.calls[1:] == [
        *((found.questions, chosen, Prefill("shared", trial.base)) for trial in found.prefills),
        (60 - found.questions, chosen, Prefill("shared", better)),
    ]


def test_weights_are_fitted_again_under_another_prefill_base():
    def strength(multiple: float, prefill: float, depth: float) -> float:
        # The other prefill helps both of the good bases, one of them more.
        help_of_prefill = {0.25: 1.0, 4: 2.0}.get(multiple, 0.0) if prefill > 1 else 0.0
        return 0.5 * ends_are_good(multiple, prefill, depth) + help_of_prefill

    subject = PlantedSubject(strength, noise=1.0)
    settings = replace(SETTINGS, rules=("pool",), prefill_multipliers=(2.0,))
    found = calibrate(settings, subject)
    assert found.chosen.prefill_base == 2 * NATIVE_BASE
    known = [subject.tokenize(item) for item in subject.asked[: found.questions]]
    traces = subject.trace(known, found.chosen.bases, Prefill("shared", 2 * NATIVE_BASE), lambda _done, _all: None)
    again = fitted(make_table(traces, found.chosen.bases), tuple(range(len(found.chosen.bases))), "pool")
    assert found.chosen.weights == pytest.approx(again.weights)
    before = calibrate(replace(settings, prefill_multipliers=()), PlantedSubject(strength, noise=1.0)).chosen
    assert before.bases == found.chosen.bases
    assert before.weights != pytest.approx(again.weights, abs=0.1)


def test_what_noise_may_have_done_is_not_taken():
    subject = PlantedSubject(ends_are_good, prefill_noise=0.5)
    found = calibrate(replace(SETTINGS, prefill_multipliers=(0.6, 0.7)), subject)
    assert all(-trial.error < trial.difference < 0 for trial in found.prefills)
    assert found.chosen.prefill_base is None


def test_a_prefill_base_that_is_no_better_is_not_taken():
    subject = PlantedSubject(ends_are_good)
    found = calibrate(SETTINGS, subject)
    assert found.chosen.prefill_base is None
    assert [(trial.difference, trial.error, trial.taken) for trial in found.prefills] == [(0.0, 0.0, False)] * 2
    assert len(subject.calls) == 3


def test_a_prefill_base_that_is_worse_at_the_worst_depth_is_not_taken():
    def strength(multiple: float, prefill: float, depth: float) -> float:
        change = 0.0 if prefill == 1 else (-0.5 if depth < 0.3 else 2.0)
        return 0.5 * ends_are_good(multiple, prefill, depth) + change

    found = calibrate(SETTINGS, PlantedSubject(strength))
    assert all(trial.difference < -trial.error for trial in found.prefills)
    assert not any(trial.taken for trial in found.prefills)
    assert found.chosen.prefill_base is None


def test_the_native_base_is_no_other_prefill():
    subject = PlantedSubject(ends_are_good)
    assert calibrate(replace(SETTINGS, prefill_multipliers=(1.0,)), subject).prefills == ()
    assert len(subject.calls) == 1


def test_the_same_settings_give_the_same_calibration():
    first, second = (calibrate(SETTINGS, PlantedSubject(ends_are_good)) for _ in range(2))
    assert first.chosen == second.chosen
    assert first.held_out == second.held_out
    assert [item.mean for item in first.tried] == [item.mean for item in second.tried]


def test_progress_names_every_stage():
    steps: list[tuple[str, int, int]] = []
    calibrate(SETTINGS, PlantedSubject(ends_are_good), lambda *step: steps.append(step))
    stages = list(dict.fromkeys(what for what, _, _ in steps))
    assert stages[:2] == ["asking under every base", "choosing bases"]
    assert len(stages) == 4
    for (what, done, total), (next_what, next_done, _) in pairwise(steps):
        assert done <= total
        assert next_what != what or next_done >= done


def test_too_few_questions_are_refused():
    with pytest.raises(UsageError, match="one context") as error:
        calibrate(replace(SETTINGS, limit=2), PlantedSubject(half_is_good))
    assert "`limit=" in error.value.hint
    with pytest.raises(UsageError, match="no question is left") as error:
        calibrate(replace(SETTINGS, held_out=1), PlantedSubject(half_is_good))
    assert "`held_out=" in error.value.hint
