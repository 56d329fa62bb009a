"""Chooses bases and merge rule by forward selection, the depth that does worst coming first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from abcli.calibrate.table import Floats, PoolProblem, Table, losses
from abcli.config import MergeRule

FOLDS = 5
# Per question, in nats: enough to tame weights that few questions decide about.
POOL_PENALTY = 0.005
# Losses at the worst depth that differ by no more than this share are equal.
_EQUAL_SHARE = 0.01

Indices = NDArray[np.intp]


@dataclass(frozen=True)
class Candidate:
    """Some bases (as columns of a table), a rule to merge them, and the weights of the rule `pool`."""

    columns: tuple[int, ...]
    rule: MergeRule
    weights: tuple[float, ...] = ()

    def losses(self, table: Table) -> Floats:
        """The loss [questions] on the questions of `table`, in nats per token."""
        return losses(table, self.columns, self.rule, self.weights)


@dataclass(frozen=True)
class Outcome:
    """What a way of choosing is worth on questions that were not used for it: a rule and a number of buckets.

    `given` says that the bases were a set given beforehand, of which at most the weights had to be found.
    """

    rule: MergeRule
    buckets: int
    given: bool
    losses: Floats = field(repr=False)
    """[questions]"""
    mean: float
    worst: float
    """The mean loss of the depth where it is highest."""


@dataclass(frozen=True)
class Selection:
    """The choice, and what else was tried, in the order of preference."""

    chosen: Candidate
    tried: tuple[Outcome, ...]


@dataclass(frozen=True)
class Questions:
    """The calibration questions: their table, and of each one the number of its context and of its depth."""

    table: Table
    groups: Indices
    depths: Indices

    def take(self, questions: Indices) -> Questions:
        """Some of them, by index in ascending order."""
        return Questions(self.table.take(questions), self.groups[questions], self.depths[questions])


def worst_depth(values: Floats, depths: Indices) -> float:
    """The highest of the depths' means of `values` [questions]."""
    counts = np.bincount(depths)
    present = counts > 0
    return float((np.bincount(depths, values)[present] / counts[present]).max())


def best(options: Sequence[Floats], depths: Indices) -> int:
    """The index of the best of some losses [questions]: the lowest worst depth, and among equals the lowest mean.

    Equal are those whose worst depth lies within one standard error of the best one's.
    """
    worst = np.array([worst_depth(values, depths) for values in options])
    first = int(worst.argmin())
    counts = np.bincount(depths)
    fewest = counts[counts > 0].min()
    equal = [
        index
        for index, values in enumerate(options)
        if worst[index] <= worst[first] + float((values - options[first]).std() / np.sqrt(fewest))
    ]
    return min(equal, key=lambda index: float(options[index].mean()))


def forward(questions: Questions, rule: MergeRule, buckets: int) -> list[Candidate]:
    """The best candidates of 1, 2, ... `buckets` buckets, each made of the one before and one more base."""
    path: list[Candidate] = []
    columns: tuple[int, ...] = ()
    for _ in range(min(buckets, len(questions.table.bases))):
        options = [
            fitted(questions.table, (*columns, column), rule)
            for column in range(len(questions.table.bases))
            if column not in columns
        ]
        found = options[best([option.losses(questions.table) for option in options], questions.depths)]
        columns = found.columns
        path.append(found)
    return path


def fitted(table: Table, columns: tuple[int, ...], rule: MergeRule) -> Candidate:
    """The candidate of these bases and this rule; the weights of the rule `pool` are fitted to the table's answers."""
    if rule != "pool" or len(columns) == 1:
        return Candidate(columns, rule)
    importance = 1 / np.bincount(table.question, minlength=table.questions)[table.question]
    weights = PoolProblem(table, columns).fit(importance, POOL_PENALTY * table.questions)
    return Candidate(columns, rule, tuple(float(weight) for weight in weights))


def folds(groups: Indices, count: int = FOLDS) -> list[tuple[Indices, Indices]]:
    """(training, test) questions of each fold; questions on one context stay together."""
    names = np.unique(groups)
    fold = np.searchsorted(names, groups) % min(count, len(names))
    return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in np.unique(fold)]


def select(
    questions: Questions,
    rules: Sequence[MergeRule],
    buckets: int,
    on_progress: Callable[[int, int], None] = lambda _done, _all: None,
    *,
    given: Sequence[tuple[int, ...]] = (),
) -> Selection:
    """Choose a rule and its bases: those of a forward selection of at most `buckets`, or one of the sets `given`.

    What to take is decided by cross-validation: in every fold the whole choice of bases (and weights) is made
    without the fold's questions, on which it is then judged; what was decided for is then made with all questions.
    `on_progress` gets (steps done, steps in all).
    """
    parts = folds(questions.groups)
    outcomes: list[Outcome] = []
    chosen: list[Candidate] = []
    steps = len(rules) * (len(parts) + 1)
    for number, rule in enumerate(rules):
        done = number * (len(parts) + 1)
        on_progress(done, steps)
        finals = _candidates(questions, rule, buckets, given)
        held_out = np.full((len(finals), questions.table.questions), np.nan)
        for at, (training, test) in enumerate(parts, start=1):
            on_progress(done + at, steps)
            table = questions.table.take(test)
            for place, candidate in enumerate(_candidates(questions.take(training), rule, buckets, given)):
                held_out[place, test] = candidate.losses(table)
        for place, (candidate, values) in enumerate(zip(finals, held_out, strict=True)):
            if len(candidate.columns) == 1 and number > 0:
                continue  # with one bucket all rules are one
            outcomes.append(
                Outcome(
                    rule,
                    len(candidate.columns),
                    place >= len(finals) - len(given),
                    values,
                    float(values.mean()),
                    worst_depth(values, questions.depths),
                )
            )
            chosen.append(candidate)
    on_progress(steps, steps)
    order = _ranking(outcomes)
    return Selection(chosen[order[0]], tuple(outcomes[index] for index in order))


def _candidates(
    questions: Questions, rule: MergeRule, buckets: int, given: Sequence[tuple[int, ...]]
) -> list[Candidate]:
    """The forward selection's candidates of 1, 2, ... buckets, then those of the bases `given`."""
    return [
        *forward(questions, rule, buckets),
        *(fitted(questions.table, columns, rule) for columns in given),
    ]


def _ranking(outcomes: Sequence[Outcome]) -> list[int]:
    """The indices of the outcomes: the best first, the others by their worst depth.

    The best has the lowest worst depth, and of those that come within 1 % of it the lowest mean.
    """
    order = sorted(range(len(outcomes)), key=lambda index: outcomes[index].worst)
    limit = outcomes[order[0]].worst * (1 + _EQUAL_SHARE)
    first = min((index for index in order if outcomes[index].worst <= limit), key=lambda index: outcomes[index].mean)
    return [first, *(index for index in order if index != first)]
