"""What a gate costs in quality: where is the native bucket sure enough to decide alone, and how is that best told?

The questions of an evaluation task are answered with the default spread, token by token along the right answer. For
each measure and threshold are printed: how often all buckets are asked, and the paired differences of loss (nats per
token) and exact answers to asking always, with standard errors over contexts; then one line of JSON. The others' cells
are those of having computed the answer so far, where a gate would let them take over the native bucket's.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from abcli.config import BucketConfig, ContextConfig, ModelConfig, evaluations_directory
from abcli.evals.model_under_test import Subject
from abcli.evals.runner import TASKS, EvaluationSettings, make_questions
from abcli.evals.scoring import merged_node
from abcli.evals.traces import Node, Trace
from abcli.gguf.checked import check_model
from abcli.rope.bases import choose_bases

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)

# How sure (0 to 1) a distribution is: from its log-probabilities [kept] and its entropy in nats.
Measure = Callable[[NDArray[np.float32], float], float]


def margin(row: NDArray[np.float32], _entropy: float) -> float:
    """By how much the likeliest token is more likely than the next."""
    second, first = np.exp(np.partition(row, -2)[-2:])
    return float(first - second)


MEASURES: dict[str, Measure] = {
    "probability": lambda row, _entropy: float(np.exp(row.max())),
    "margin": margin,
    "exp(-entropy)": lambda _row, entropy: float(np.exp(-entropy)),
}


@dataclass(frozen=True)
class Step:
    """One token of a right answer: how sure the native bucket is, and the loss and whether it comes first, in the
    native bucket and merged."""

    question: int
    sure: dict[str, float]
    losses: tuple[float, float]
    right: tuple[bool, bool]


def steps(traces: Sequence[Trace], bases: Sequence[float], native: float) -> Iterator[Step]:
    """The steps of all right answers."""
    for number, item in enumerate(traces):
        rows, alone = item.select(bases), item.select([native])[0]
        for place, token in item.paths[0]:
            node: Node = item.nodes[place]
            gold = int(np.searchsorted(node.tokens, token))
            own = node.log_probabilities[alone]
            both = (own, merged_node(node, rows, "confidence"))
            yield Step(
                number,
                {name: measure(own, float(node.entropies[alone])) for name, measure in MEASURES.items()},
                (-float(both[0][gold]), -float(both[1][gold])),
                (int(both[0].argmax()) == gold, int(both[1].argmax()) == gold),
            )


def with_error(values: NDArray[np.float64], groups: NDArray[np.intp]) -> tuple[float, float]:
    """The mean and its standard error, contexts being what is independent."""
    sums = np.bincount(groups, values - values.mean())
    return float(values.mean()), float(np.sqrt((sums**2).sum()) / len(values))


def judge(found: Sequence[Step], groups: NDArray[np.intp], asked: NDArray[np.bool_]) -> dict[str, object]:
    """What comes of asking all buckets at the steps `asked`, less what comes of asking always."""
    question = np.array([step.question for step in found])
    losses, right = np.array([step.losses for step in found]), np.array([step.right for step in found])
    length = np.bincount(question)
    chosen = asked.astype(int)
    row = np.arange(len(found))
    difference = np.bincount(question, losses[row, chosen] - losses[:, 1]) / length
    exact = [np.bincount(question, ~right[row, one]) == 0 for one in (chosen, np.ones_like(chosen))]
    loss, loss_error = with_error(difference, groups)
    gain, gain_error = with_error(exact[0].astype(float) - exact[1], groups)
    return {
        "asked": float(asked.mean()),
        "nll": [loss, loss_error],
        "exact": float(exact[0].mean()),
        "exact_difference": [gain, gain_error],
    }


def main() -> None:
    """Ask the model, or read what it has answered before, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", choices=sorted(TASKS), default="needle")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--scores", type=Path, default=evaluations_directory(), help="where results are stored")
    chosen = parser.parse_args()
    settings = EvaluationSettings(
        chosen.task, (chosen.length,), chosen.limit, chosen.seed, 5, chosen.data, chosen.answers
    )
    config = ContextConfig(threads=chosen.threads)
    with Subject(check_model(ModelConfig(chosen.model)), config, scores=chosen.scores) as subject:
        questions = make_questions(settings, subject)
        bases = choose_bases(BucketConfig(), subject.native_base)
        tokenized = [subject.prompts.tokenize(question) for question in questions]
        traces = subject.trace(
            [replace(question, continuations=question.continuations[:1]) for question in tokenized],
            bases,
            subject.prefill("auto", None),
            lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr) if done % 10 == 0 else None,
        )
        found = list(steps(traces, bases, subject.native_base))
    groups = np.unique([question.group for question in questions], return_inverse=True)[1]
    print(
        f"\n{chosen.task} {chosen.length}: {len(questions)} questions on {groups.max() + 1} contexts, "
        f"{len(found)} tokens"
    )
    report = [("never asked", 0.0, judge(found, groups, np.zeros(len(found), bool)))]
    for name in MEASURES:
        sure = np.array([step.sure[name] for step in found])
        report += [(name, threshold, judge(found, groups, sure <= threshold)) for threshold in THRESHOLDS]
    for name, threshold, one in report:
        loss, gain = (f"{mean:+.4f} +- {error:.4f}" for mean, error in (one["nll"], one["exact_difference"]))  # type: ignore[misc]
        print(f"{name:14} {threshold:4}  asked {one['asked']:5.1%}  NLL {loss}  exact {one['exact']:.3f} ({gain})")
    print(json.dumps({"task": chosen.task, "length": chosen.length, "gates": report}))


if __name__ == "__main__":
    main()
