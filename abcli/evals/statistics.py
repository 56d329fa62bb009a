"""From scores to what they say: accuracy, likelihood, the worst depth, and differences, each with its uncertainty.

Answers on one context are not independent, so the bootstrap draws whole groups with replacement (a cluster bootstrap;
Davison & Hinkley, "Bootstrap Methods and their Application", 1997, chapter 3.8), the same ones for every
configuration: differences are paired. Likelihoods enter in whole millionths of a nat, the precision that a report
stores. Their sums are exact in float64 in whatever order they are added, so equal scores give equal numbers
everywhere, those read back from a report too, and equal configurations differ by exactly 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from abcli.errors import EvaluationDataError
from abcli.evals.scores import Score

Floats = NDArray[np.float64]
T = TypeVar("T")

RESAMPLES = 2000
CONFIDENCE = 0.95
NLL_DECIMALS = 6
DEPTH_DECIMALS = 6
# Rounding errors, all there is between some differences and 0, are far below.
ESTIMATE_DECIMALS = 9
NATIVE = "native"
# Of so many groups a 95 % interval covers about 90 % (of normal numbers: Student's t against the normal quantile),
# of five 85 %; of fewer it is worth nothing.
FEWEST_GROUPS = 10

# Weights that are held at once: 32 MiB of float64.
_MAX_WEIGHTS = 2**22
_MILLIONTHS = 10**NLL_DECIMALS


class Placed(Protocol):
    """Where a question stands; what the statistics need to know of it."""

    @property
    def group(self) -> str:
        """Names the context."""

    @property
    def depth(self) -> float:
        """0 to 1."""

    @property
    def length(self) -> int:
        """Tokens that were asked for."""


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error and the limits of its 95 % interval, all from the bootstrap."""

    value: float
    low: float
    high: float
    error: float

    @property
    def clear(self) -> bool:
        """Whether the interval excludes 0; for differences."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Measures(Generic[T]):
    """What is measured of a configuration. Accuracies are shares, likelihoods are negative, in nats per token.

    The worst depth and the gap are extremes over noisy depths and therefore biased upwards (`worst_accuracy`
    downwards), more so with few questions, and their intervals are shifted the same way. The bias is nearly the same
    for configurations on the same questions, so it mostly cancels in differences.
    """

    accuracy: T
    """Share of the questions whose answer greedy decoding gives exactly."""
    ranked_first: T | None
    """Share of the questions whose answer is the likeliest candidate; None where there are no candidates."""
    nll: T
    """Mean over the questions."""
    worst_nll: T
    """The highest mean of a depth."""
    worst_accuracy: T
    """The lowest accuracy of a depth."""
    nll_gap: T
    """The highest mean of a depth less the lowest."""
    accuracy_gap: T
    """The highest accuracy of a depth less the lowest."""
    nll_by_depth: tuple[T, ...]
    accuracy_by_depth: tuple[T, ...]


@dataclass(frozen=True)
class Summary:
    """One configuration at one length; `difference` is its measures less the baseline's, None for the baseline."""

    configuration: str
    measures: Measures[Estimate]
    worst_nll_depth: float
    worst_accuracy_depth: float
    difference: Measures[Estimate] | None


@dataclass(frozen=True)
class LengthSummary:
    """All configurations at one length. `depths` are those asked for that have questions, `counts` how many each."""

    length: int
    questions: int
    groups: int
    depths: tuple[float, ...]
    counts: tuple[int, ...]
    baseline: str
    summaries: tuple[Summary, ...]

    @property
    def reliable(self) -> bool:
        """Whether there are groups enough to believe the intervals."""
        return self.groups >= FEWEST_GROUPS


def choose_baseline(configurations: Sequence[str]) -> str:
    """What the others are compared with: "native" if it is there, else the first of at least one name."""
    return NATIVE if NATIVE in configurations else configurations[0]


def paired_difference(values: Floats, baseline: Floats, groups: NDArray[np.intp]) -> tuple[float, float]:
    """The mean of `values` less `baseline`, both [questions], and its standard error; groups are independent.

    `groups` [questions] numbers the context of each from 0 on. The error is the cluster-robust one of a mean (Cameron &
    Miller, "A Practitioner's Guide to Cluster-Robust Inference", 2015, equation 11), 0 where all differences are equal.
    """
    differences = values - baseline
    mean = float(differences.mean())
    sums = np.bincount(groups, differences - mean)
    return mean, float(np.sqrt((sums**2).sum()) / len(differences))


def nearest_depth(depth: float, depths: int) -> int:
    """The index of the nearest of `depths` depths evenly spaced from 0 to 1, of the deeper if two are equally near."""
    return math.floor(round(depth, DEPTH_DECIMALS) * (depths - 1) + 0.5)


def summarise(
    questions: Sequence[Placed],
    scores: Mapping[str, Sequence[Score]],
    depths: int,
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[LengthSummary, ...]:
    """Summaries by length, ascending, of `scores` by configuration, each aligned with `questions`.

    `seed` is that of the bootstrap, which draws `resamples` (2 or more) times. Raises EvaluationDataError without
    questions or configurations, and for a likelihood that is no finite number.
    """
    if not questions or not scores:
        raise EvaluationDataError("there is nothing to summarise", "give at least one question and one configuration")
    _check_finite(scores)
    found = []
    for length in sorted({question.length for question in questions}):
        chosen = [index for index, question in enumerate(questions) if question.length == length]
        placed = [questions[index] for index in chosen]
        picked = {name: [of[index] for index in chosen] for name, of in scores.items()}
        generator = np.random.default_rng([seed, length])
        found.append(_summarise_length(length, placed, picked, depths, generator, resamples))
    return tuple(found)


def _check_finite(scores: Mapping[str, Sequence[Score]]) -> None:
    for name, of in scores.items():
        for number, score in enumerate(of, start=1):
            if not math.isfinite(score.nll):
                raise EvaluationDataError(
                    f"{name} gives the answer of question {number} a negative log-likelihood of {score.nll}",
                    "leave this configuration out, or evaluate again with `fresh`",
                )


def _summarise_length(
    length: int,
    questions: Sequence[Placed],
    scores: Mapping[str, Sequence[Score]],
    depths: int,
    generator: np.random.Generator,
    resamples: int,
) -> LengthSummary:
    names = list(dict.fromkeys(question.group for question in questions))
    number = {name: index for index, name in enumerate(names)}
    groups = np.array([number[question.group] for question in questions])
    all_bins = np.array([nearest_depth(question.depth, depths) for question in questions])
    present, bins = np.unique(all_bins, return_inverse=True)
    # [questions, 1 + 3 * configurations]: a one to count with, then likelihood, exactness and rank of each.
    of_each = [column for of in scores.values() for column in _columns(of)]
    columns = np.stack([np.ones(len(questions)), *of_each], axis=1)
    totals = np.zeros((len(names), len(present), columns.shape[1]))
    np.add.at(totals, (groups, bins), columns)
    sums = _resampled_sums(totals, generator, resamples)
    counts = sums[:, :, 0]
    at = np.linspace(0, 1, depths)[present]
    ranked = all(score.rank is not None for of in scores.values() for score in of)
    tables = {
        name: _measures(counts, sums[:, :, first : first + 3], ranked)
        for name, first in zip(scores, range(1, columns.shape[1], 3), strict=True)
    }
    baseline = choose_baseline(list(scores))
    summaries = []
    for name, table in tables.items():
        nll = [float(curve[0]) for curve in table.nll_by_depth]
        accuracy = [float(curve[0]) for curve in table.accuracy_by_depth]
        difference = None if name == baseline else _combine(np.subtract, table, tables[baseline])
        summaries.append(
            Summary(
                name,
                _combine(_estimate, table),
                float(at[int(np.argmax(nll))]),
                float(at[int(np.argmin(accuracy))]),
                None if difference is None else _combine(_estimate, difference),
            )
        )
    per_depth = tuple(int(count) for count in counts[0])
    return LengthSummary(
        length, len(questions), len(names), tuple(map(float, at)), per_depth, baseline, tuple(summaries)
    )


def _columns(scores: Sequence[Score]) -> tuple[Floats, Floats, Floats]:
    """Likelihoods in whole millionths of a nat, exactness and first rank as 0 or 1; float64 [questions] each."""
    nll = np.rint(np.array([round(score.nll, NLL_DECIMALS) for score in scores]) * _MILLIONTHS)
    exact = np.array([score.exact for score in scores], np.float64)
    first = np.array([score.rank == 0 for score in scores], np.float64)
    return nll, exact, first


def _resampled_sums(totals: Floats, generator: np.random.Generator, resamples: int) -> Floats:
    """Sums over the groups of `totals` [groups, bins, columns], float64 [1 + resamples, bins, columns].

    Row 0 takes each group once: it is the estimate itself. The others draw as many groups, with replacement.
    """
    groups = len(totals)
    flat = totals.reshape(groups, -1)
    rows = [flat.sum(axis=0, keepdims=True)]
    step = max(1, _MAX_WEIGHTS // groups)
    for start in range(0, resamples, step):
        weights = generator.multinomial(groups, np.full(groups, 1 / groups), size=min(step, resamples - start))
        rows.append(weights.astype(np.float64) @ flat)
    return np.concatenate(rows).reshape(-1, *totals.shape[1:])


def _measures(counts: Floats, sums: Floats, ranked: bool) -> Measures[Floats]:
    """The measures in every row of `counts` [rows, bins] and `sums` [rows, bins, 3].

    A depth of which a resample has no question is NaN in it, and does not count in its extremes.
    """
    means = sums.sum(axis=1) / counts.sum(axis=1)[:, None]
    by_depth = np.full(sums.shape, np.nan)
    np.divide(sums, counts[:, :, None], out=by_depth, where=counts[:, :, None] > 0)
    nll, accuracy = by_depth[:, :, 0] / _MILLIONTHS, by_depth[:, :, 1]
    worst_nll, worst_accuracy = np.nanmax(nll, axis=1), np.nanmin(accuracy, axis=1)
    return Measures(
        accuracy=means[:, 1],
        ranked_first=means[:, 2] if ranked else None,
        nll=means[:, 0] / _MILLIONTHS,
        worst_nll=worst_nll,
        worst_accuracy=worst_accuracy,
        nll_gap=worst_nll - np.nanmin(nll, axis=1),
        accuracy_gap=np.nanmax(accuracy, axis=1) - worst_accuracy,
        nll_by_depth=tuple(nll.T),
        accuracy_by_depth=tuple(accuracy.T),
    )


def _estimate(row: Floats) -> Estimate:
    """From the value itself and its resamples, [1 + resamples], some of which may be NaN."""
    value, resampled = float(row[0]), row[1:]
    resampled = resampled[~np.isnan(resampled)]
    if len(resampled) < 2:
        return Estimate(value, value, value, 0.0)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, (tail, 1 - tail))
    # Adding 0 turns -0.0 into 0.0.
    numbers = [round(float(x), ESTIMATE_DECIMALS) + 0.0 for x in (value, low, high, resampled.std(ddof=1))]
    return Estimate(*numbers)


def _combine(function: Callable[..., Any], *measures: Measures[Any]) -> Measures[Any]:
    """`function` of the same field of all `measures`, for every field."""

    def combined(name: str) -> Any:
        values = [getattr(item, name) for item in measures]
        if values[0] is None:
            return None
        if isinstance(values[0], tuple):
            return tuple(function(*parts) for parts in zip(*values, strict=True))
        return function(*values)

    return Measures(**{name: combined(name) for name in Measures.__dataclass_fields__})
