"""Runs a calibration: asks the questions once under every base, chooses, and scores the choice on other questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from abcli.calibrate.gates import GATES, GateTrial, first_base, steps_of, try_gate
from abcli.calibrate.selection import Candidate, Indices, Outcome, Questions, fitted, folds, select, worst_depth
from abcli.calibrate.table import Floats, Table, make_table
from abcli.config import DEFAULT_BUCKETS, MERGE_RULES, BucketConfig, MergeRule
from abcli.errors import ProfileError, UsageError
from abcli.evals.configurations import Configuration, parse_configuration
from abcli.evals.model_under_test import Subject
from abcli.evals.prompts import TokenizedQuestion
from abcli.evals.questions import Question, end_of_context
from abcli.evals.runner import Evaluation, EvaluationSettings, describe, make_questions
from abcli.evals.scoring import score
from abcli.evals.statistics import NATIVE, nearest_depth, paired_difference
from abcli.evals.traces import Trace
from abcli.profiles.profile import Profile
from abcli.rope.bases import choose_bases, symmetric_multipliers
from abcli.text import StageProgress

# Multiples of the native base: the default spread, and far ends for the rule `pool` to turn against.
GRID = (0.25, *symmetric_multipliers(DEFAULT_BUCKETS), 4.0)
PREFILL_MULTIPLIERS = (2**-0.5, 2**0.5)
CALIBRATED = "calibrated"


@dataclass(frozen=True)
class CalibrationSettings:
    """What is asked, and what may be chosen. `grid` and `prefill_multipliers` are multiples of the native base."""

    task: str
    length: int
    limit: int = 160
    """Questions to choose by; whole contexts, so a few more are taken where the last one is not finished."""
    held_out: int = 200
    """Questions to judge the choice by: those that follow."""
    seed: int = 0
    depths: int = 5
    data: Path | None = None
    answers: Path | None = None
    buckets: int = DEFAULT_BUCKETS
    """The most that are chosen."""
    rules: tuple[MergeRule, ...] = MERGE_RULES
    grid: tuple[float, ...] = GRID
    prefill_multipliers: tuple[float, ...] = PREFILL_MULTIPLIERS
    """Bases for a shared prefill to try besides the native one."""

    def asked(self) -> EvaluationSettings:
        """The settings of all questions, those to choose by first."""
        count = self.limit + self.held_out
        return EvaluationSettings(self.task, (self.length,), count, self.seed, self.depths, self.data, self.answers)


@dataclass(frozen=True)
class PrefillTrial:
    """What the chosen buckets are worth with a prefill under another base, by cross-validation on the same questions.

    `difference` is the mean loss less that with the native base's prefill, `error` its standard error.
    """

    base: float
    mean: float
    worst: float
    difference: float
    error: float
    taken: bool


@dataclass(frozen=True)
class Calibration:
    """What was tried on `questions` questions, what was chosen, and how it did on those held out."""

    settings: CalibrationSettings
    questions: int
    contexts: int
    bases: tuple[float, ...]
    """All that could be chosen."""
    tried: tuple[Outcome, ...]
    """The best first."""
    prefills: tuple[PrefillTrial, ...]
    gates: tuple[GateTrial, ...]
    """What each gate would change in the choice; none for one bucket."""
    chosen: Configuration
    held_out: Evaluation
    """Of the native base, the default spread, the paper's and the choice, in this order."""


@dataclass(frozen=True)
class _Asked:
    """Questions as the model reads them, and of each one the number of its context and of its depth."""

    questions: list[Question]
    tokenized: list[TokenizedQuestion]
    groups: Indices
    depths: Indices

    def take(self, part: slice) -> _Asked:
        return _Asked(self.questions[part], self.tokenized[part], self.groups[part], self.depths[part])

    def with_table(self, table: Table) -> Questions:
        return Questions(table, self.groups, self.depths)


def calibrate(
    settings: CalibrationSettings, subject: Subject, on_progress: StageProgress = lambda _what, _done, _all: None
) -> Calibration:
    """Choose bases, merge rule and prefill base for the model of `subject`; traces that are stored are not recomputed.

    Raises UsageError, also for too few questions, EvaluationDataError, and what `Subject.trace` raises.
    """
    asked = _ask(settings, subject)
    cut = end_of_calibration(asked.questions, settings.limit)
    known, held_out = asked.take(slice(cut)), asked.take(slice(cut, None))
    judged = competitors(settings.buckets, subject.native_base)
    grid = choose_bases(BucketConfig(multipliers=settings.grid), subject.native_base)
    bases = tuple(sorted({*grid, *(base for item in judged for base in item.bases)}))
    native = subject.prefill("auto", None)
    traces = subject.trace(asked.tokenized, bases, native, partial(on_progress, "asking under every base"))
    questions = known.with_table(make_table(traces[:cut], bases))
    selection = select(
        questions,
        settings.rules,
        settings.buckets,
        partial(on_progress, "choosing bases"),
        given=[tuple(map(bases.index, item)) for item in given_sets(judged, grid)],
    )
    chosen = configuration(selection.chosen, bases, subject.native_base)
    trials: tuple[PrefillTrial, ...] = ()
    if len(chosen.bases) > 1:
        trials, chosen = _try_prefills(settings, subject, known, questions, bases, chosen, on_progress)
    judged = (*judged, chosen)
    scores = {item.name: tuple(score(found, item) for found in traces[cut:]) for item in judged[:-1]}
    own = traces[cut:]
    prefill = subject.prefill(chosen.prefill, chosen.prefill_base)
    if prefill != native:
        progress = partial(on_progress, "asking those held out")
        own = subject.trace(held_out.tokenized, chosen.bases, prefill, progress)
    scores[chosen.name] = tuple(score(found, chosen) for found in own)
    return Calibration(
        settings,
        cut,
        len(np.unique(known.groups)),
        bases,
        selection.tried,
        trials,
        _try_gates(traces[:cut], known.groups, chosen, subject.native_base),
        chosen,
        Evaluation(tuple(held_out.questions), judged, scores, describe(subject, held_out.questions)),
    )


def end_of_calibration(questions: Sequence[Question], limit: int) -> int:
    """The number of questions to choose by: `limit`, and as many more as end the last one's context.

    Raises UsageError if none are left after them, or if they have fewer than two contexts.
    """
    groups = [question.group for question in questions]
    cut = end_of_context(groups, limit)
    if cut >= len(groups):
        raise UsageError(
            f"no question is left to judge by: {len(groups)} questions are on the contexts of the first {limit}",
            "hold out more questions: `held_out=200`",
        )
    if len(set(groups[:cut])) < 2:
        raise UsageError(
            f"the {cut} questions to choose by have one context in common", "choose by more of them: `limit=160`"
        )
    return cut


def competitors(buckets: int, native_base: float) -> tuple[Configuration, ...]:
    """What a choice has to beat: the native base and the spreads of `buckets` buckets, as `abcli eval` has them."""
    names = (NATIVE, f"spread{buckets}", f"paper{buckets}")
    return tuple(parse_configuration(name, native_base, _no_profile) for name in names)


def given_sets(judged: Sequence[Configuration], grid: Sequence[float]) -> list[tuple[float, ...]]:
    """Sets of bases to try besides those a forward selection finds: the spreads, and the first with its ends far out.

    The far ends see the text badly, which is what the rule `pool` can turn against.
    """
    sets = [item.bases for item in judged if len(item.bases) > 1]
    if sets and len(sets[0]) > 2:
        sets.append((min(grid), *sorted(sets[0])[1:-1], max(grid)))
    return sets


def configuration(candidate: Candidate, bases: Sequence[float], native_base: float) -> Configuration:
    """What was chosen from `bases`, in ascending order.

    A single bucket always computes its prompt itself, so it is to be judged by that.
    """
    order = sorted(range(len(candidate.columns)), key=lambda place: bases[candidate.columns[place]])
    chosen = tuple(bases[candidate.columns[place]] for place in order)
    weights = tuple(candidate.weights[place] for place in order) if candidate.weights else ()
    alone = len(chosen) == 1
    return Configuration(
        CALIBRATED,
        chosen,
        "confidence" if alone else candidate.rule,
        "exact" if alone and chosen[0] != native_base else "auto",
        None,
        weights,
    )


def cross_validated(questions: Questions, rule: MergeRule) -> Floats:
    """The losses [questions] of all of the table's buckets by `rule`, weights fitted without the question's fold."""
    columns = tuple(range(len(questions.table.bases)))
    values = np.full(questions.table.questions, np.nan)
    for training, test in folds(questions.groups):
        candidate = fitted(questions.table.take(training), columns, rule)
        values[test] = candidate.losses(questions.table.take(test))
    return values


def _ask(settings: CalibrationSettings, subject: Subject) -> _Asked:
    questions = make_questions(settings.asked(), subject)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(item.group for item in questions))}
    return _Asked(
        questions,
        [subject.prompts.tokenize(question) for question in questions],
        np.array([numbers[question.group] for question in questions], np.intp),
        np.array([nearest_depth(question.depth, settings.depths) for question in questions], np.intp),
    )


def _try_prefills(
    settings: CalibrationSettings,
    subject: Subject,
    known: _Asked,
    questions: Questions,
    bases: Sequence[float],
    chosen: Configuration,
    on_progress: StageProgress,
) -> tuple[tuple[PrefillTrial, ...], Configuration]:
    """The trials of other prefill bases, and `chosen` with the best of them if one is clearly better.

    That is one with a mean lower by more than its standard error, and a worst depth that is no worse.
    """
    columns = [list(bases).index(base) for base in chosen.bases]
    table = Table(
        chosen.bases,
        questions.table.log_probabilities[:, columns],
        questions.table.entropies[:, columns],
        questions.table.gold,
        questions.table.question,
    )
    usual = cross_validated(known.with_table(table), chosen.merge)
    multiples = choose_bases(BucketConfig(multipliers=(1.0, *settings.prefill_multipliers)), subject.native_base)
    trials: list[PrefillTrial] = []
    tables: dict[float, Table] = {}
    for base in dict.fromkeys(multiples[1:]):
        if base == multiples[0]:
            continue
        progress = partial(on_progress, f"asking with a prefill under base {base:g}")
        traces: list[Trace] = subject.trace(known.tokenized, chosen.bases, subject.prefill("auto", base), progress)
        tables[base] = make_table(traces, chosen.bases)
        values = cross_validated(known.with_table(tables[base]), chosen.merge)
        worst = worst_depth(values, known.depths)
        difference, error = paired_difference(values, usual, known.groups)
        better = difference < -error and worst <= worst_depth(usual, known.depths)
        trials.append(PrefillTrial(base, float(values.mean()), worst, difference, error, better))
    best = min((trial for trial in trials if trial.taken), key=lambda trial: trial.mean, default=None)
    if best is None:
        return tuple(trials), chosen
    again = fitted(tables[best.base], tuple(range(len(chosen.bases))), chosen.merge)
    taken = tuple(replace(trial, taken=trial is best) for trial in trials)
    return taken, replace(chosen, prefill_base=best.base, weights=again.weights)


def _try_gates(
    traces: Sequence[Trace], groups: Indices, chosen: Configuration, native_base: float
) -> tuple[GateTrial, ...]:
    if len(chosen.bases) == 1:
        return ()
    steps = steps_of(traces, chosen, first_base(chosen, native_base))
    return tuple(try_gate(steps, groups, gate) for gate in GATES)


def _no_profile(_name: str | None) -> Profile:
    raise ProfileError("a calibration compares no profiles", "use `abcli eval`")
