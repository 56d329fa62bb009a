"""Compare merge rules, also ones that abcli does not have, on the same questions: which recover what single bases see?

Every rule merges the default spread of six buckets; `pool` has its weights from the first questions (--limit), and all
rules are judged on those after (--held-out). Printed are paired differences to the native base with standard errors
over contexts, and then one line of JSON. Needs the questions' stored results or computes and stores them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from abcli.calibrate.calibration import GRID
from abcli.calibrate.selection import fitted
from abcli.calibrate.table import Table, make_table
from abcli.config import BucketConfig, ContextConfig, MergeRule, ModelConfig, evaluations_directory
from abcli.evals.model_under_test import Subject
from abcli.evals.runner import TASKS, EvaluationSettings, make_questions
from abcli.gguf.checked import check_model
from abcli.merge import merge_kept, pool_plausible
from abcli.rope.bases import choose_bases

Floats = NDArray[np.float64]


class Answer:
    """What has been decoded of one answer: each bucket's log-probabilities of its tokens so far, and confidences."""

    def __init__(self, buckets: int) -> None:
        self.so_far = np.zeros(buckets)
        self.confidence = np.zeros(buckets)


# (log-probabilities [buckets, kept], entropies [buckets], of the far bases [far, kept], answer so far) -> [kept]
Rule = Callable[[Floats, Floats, Floats, Answer], Floats]


def log_sum(values: Floats, axis: int = 0) -> Floats:
    peaks = values.max(axis=axis, keepdims=True)
    return np.asarray((peaks + np.log(np.exp(values - peaks).sum(axis=axis, keepdims=True))).squeeze(axis))


def mixed(rows: Floats, weights: Floats) -> Floats:
    return log_sum(rows + np.log(weights / weights.sum())[:, None])


def equal(rows: Floats) -> Floats:
    return mixed(rows, np.ones(len(rows)))


def others(rows: Floats) -> Floats:
    """What each bucket leaves to the tokens that were not kept."""
    return np.maximum(1 - np.exp(rows).sum(axis=1), 1e-12)


def normalised(values: Floats, rest: float) -> Floats:
    """Log-probabilities beside which the tokens that were not kept have `rest` together (a logarithm, estimated)."""
    return values - np.logaddexp(log_sum(values), rest)


def built_in(name: MergeRule, weights: Sequence[float] = ()) -> Rule:
    """A rule that abcli has."""
    return lambda rows, entropies, far, answer: merge_kept(rows, entropies, name, weights)


def confidences(rows: Floats) -> Floats:
    return np.exp(rows.max(axis=1))


def sharpened(rule: Rule, power: float) -> Rule:
    def merge(rows: Floats, entropies: Floats, far: Floats, answer: Answer) -> Floats:
        powered = power * rule(rows, entropies, far, answer)
        return powered - log_sum(powered)

    return merge


def contrasted(strength: float, amateurs: slice) -> Rule:
    """The mean of the buckets, pushed away from what far bases say, among the plausible tokens."""

    def merge(rows: Floats, entropies: Floats, far: Floats, answer: Answer) -> Floats:
        means = equal(rows)
        plausible = np.flatnonzero(means >= means.max() + np.log(0.1))
        pair = np.stack([means[plausible], equal(far[amateurs])[plausible]])
        result = means.copy()
        result[plausible] = pool_plausible(pair, means[plausible], np.array([1 + strength, -strength]))
        return result

    return merge


def surprised(rows: Floats, entropies: Floats, far: Floats, answer: Answer) -> Floats:
    """Weights that grow with how far a bucket is from the mean of all (Kullback-Leibler)."""
    distances = (np.exp(rows) * (rows - equal(rows))).sum(axis=1)
    return mixed(rows, np.exp(4 * distances))


RULES: dict[str, Rule] = {
    "mean": built_in("mean"),
    "confidence": built_in("confidence"),
    "exp(4 confidence)": lambda rows, h, far, a: mixed(rows, np.exp(4 * confidences(rows))),
    "exp(12 confidence)": lambda rows, h, far, a: mixed(rows, np.exp(12 * confidences(rows))),
    "entropy": built_in("entropy"),
    "entropy, cubed": lambda rows, h, far, a: mixed(rows, np.exp(3 * (h.min() - h))),
    "max": built_in("max"),
    "product": built_in("product"),
    "likeliest in any bucket": lambda rows, h, far, a: normalised(rows.max(axis=0), np.log(others(rows)).max()),
    "surprise": surprised,
    "confidence over the answer": lambda rows, h, far, a: mixed(rows, np.exp(a.confidence + rows.max(axis=1))),
    "the same, cubed": lambda rows, h, far, a: mixed(rows, np.exp(3 * (a.confidence + rows.max(axis=1)))),
    "probability of the answer so far": lambda rows, h, far, a: mixed(
        rows, confidences(rows) * np.exp(a.so_far - a.so_far.max())
    ),
    "contrast with x0.25, 0.5": contrasted(0.5, slice(0, 1)),
    "contrast with x4, 0.5": contrasted(0.5, slice(1, 2)),
    "contrast with both, 0.5": contrasted(0.5, slice(0, 2)),
    "contrast with both, 1": contrasted(1.0, slice(0, 2)),
    "mean, sharpened by 1.5": sharpened(lambda rows, h, far, a: equal(rows), 1.5),
    "mean, sharpened by 2": sharpened(lambda rows, h, far, a: equal(rows), 2.0),
}


def judge(table: Table, columns: Sequence[int], far: Sequence[int], rule: Rule) -> tuple[Floats, NDArray[np.bool_]]:
    """The loss and whether greedy decoding is right, for each question."""
    token_losses = np.empty(len(table.gold))
    right = np.ones(table.questions, bool)
    answer, current = Answer(len(columns)), -1
    for index, (question, gold) in enumerate(zip(table.question, table.gold, strict=True)):
        if question != current:
            answer, current = Answer(len(columns)), int(question)
        rows = table.log_probabilities[index, columns]
        entropies = table.entropies[index, columns]
        merged = rule(rows, entropies, table.log_probabilities[index, far], answer)
        token_losses[index] = -merged[gold]
        right[question] &= int(merged.argmax()) == gold
        answer.so_far = answer.so_far + rows[:, gold]
        answer.confidence = answer.confidence + rows.max(axis=1)
    return table.per_question(token_losses), right


def with_error(values: Floats, groups: NDArray[np.intp]) -> str:
    """The mean and its standard error, contexts being what is independent."""
    sums = np.bincount(groups, values - values.mean())
    return f"{values.mean():+.3f} +- {np.sqrt((sums**2).sum()) / len(values):.3f}"


@dataclass(frozen=True)
class Material:
    """What the rules are compared on: `fit` for the weights of `pool`, `test` for all, with the tests' contexts."""

    fit: Table
    test: Table
    groups: NDArray[np.intp]
    spread: list[int]
    grid: list[int]
    native: int


def collect(chosen: argparse.Namespace) -> Material:
    """Ask the model, or read what it has answered before."""
    settings = EvaluationSettings(
        chosen.task, (chosen.length,), chosen.limit + chosen.held_out, chosen.seed, 5, chosen.data, chosen.answers
    )
    with Subject(check_model(ModelConfig(chosen.model)), ContextConfig(), scores=chosen.scores) as subject:
        questions = make_questions(settings, subject)
        spread = choose_bases(BucketConfig(), subject.native_base)
        paper = choose_bases(BucketConfig(spread="paper"), subject.native_base)
        grid = choose_bases(BucketConfig(multipliers=GRID), subject.native_base)
        bases = sorted({*spread, *paper, *grid})
        traces = subject.trace(
            [subject.prompts.tokenize(question) for question in questions],
            bases,
            subject.prefill("auto", None),
            lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr) if done % 20 == 0 else None,
        )
        native = bases.index(subject.native_base)
    table = make_table(traces, bases)
    names = [question.group for question in questions]
    cut = next((i for i in range(chosen.limit, len(names)) if names[i] != names[i - 1]), chosen.limit)
    return Material(
        table.take(np.arange(cut)),
        table.take(np.arange(cut, len(names))),
        np.unique(names[cut:], return_inverse=True)[1],
        [bases.index(base) for base in spread],
        [bases.index(base) for base in grid],
        native,
    )


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", choices=sorted(TASKS), default="needle")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=160, help="questions that the weights of `pool` are fitted to")
    parser.add_argument("--held-out", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--scores", type=Path, default=evaluations_directory(), help="where results are stored")
    chosen = parser.parse_args()
    found = collect(chosen)
    far = [found.grid[0], found.grid[-1]]
    wide = [found.grid[0], *found.spread[1:-1], found.grid[-1]]
    alone = RULES["mean"]
    base_losses, base_right = judge(found.test, [found.native], far, alone)
    rows = [("native (1 bucket)", base_losses, base_right)]
    for power in (1.5, 2.0):
        rule = sharpened(alone, power)
        rows.append((f"native, sharpened by {power:g}", *judge(found.test, [found.native], far, rule)))
    rows += [(name, *judge(found.test, found.spread, far, rule)) for name, rule in RULES.items()]
    for name, columns in (("spread", found.spread), ("spread, ends far out", wide), ("whole grid", found.grid)):
        weights = fitted(found.fit, tuple(columns), "pool").weights
        rows.append((f"pool, {name}", *judge(found.test, columns, far, built_in("pool", weights))))
    singles = [judge(found.test, [column], far, alone)[1] for column in range(len(found.test.bases))]
    print(f"\n{chosen.task} {chosen.length}: {len(found.groups)} questions on {found.groups.max() + 1} contexts")
    report = []
    for name, losses, right in rows:
        difference = with_error(losses - base_losses, found.groups)
        accuracy = with_error(1.0 * right - base_right, found.groups)
        print(f"{name:34} NLL {losses.mean():.3f} ({difference})  exact {right.mean():.3f} ({accuracy})")
        report.append({"rule": name, "nll": losses.mean(), "difference": difference, "exact": float(right.mean())})
    print(f"{'any single base':34} exact {np.any(singles, axis=0).mean():.3f}")
    print(json.dumps({"task": chosen.task, "length": chosen.length, "rules": report}))


if __name__ == "__main__":
    main()
