"""What a gate changes in the answers of a bucket set, and the lowest that costs nothing that can be measured."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from abcli.calibrate.selection import Indices
from abcli.calibrate.table import Floats
from abcli.evals.configurations import Configuration
from abcli.evals.scoring import merged_node
from abcli.evals.statistics import paired_difference
from abcli.evals.traces import Trace
from abcli.rope.bases import nearest_base

GATES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
# By how many nats per token a gate may make the right answers less likely and still cost nothing.
TOLERANCE = 0.005
_INTERVAL = 1.96

# How sure (0 to 1) a distribution is: from its log-probabilities [kept] and its entropy in nats.
Measure = Callable[[NDArray[np.float32], float], float]


@dataclass(frozen=True)
class GateTrial:
    """What a gate changes on questions with right answers, against asking all buckets for every token.

    `asked` is the share of the tokens for which all are asked; `difference` that of the mean loss (nats per token;
    below 0 is better), `exact` that of the share of exact answers, each with its standard error.
    """

    gate: float
    asked: float
    difference: float
    error: float
    exact: float
    exact_error: float

    @property
    def harmless(self) -> bool:
        """Whether the 95 % interval of the loss stays below what counts as a loss."""
        return self.difference + _INTERVAL * self.error < TOLERANCE


@dataclass(frozen=True)
class Steps:
    """The tokens of all right answers: of which question each is, how sure the bucket is that goes first, and, of
    this bucket alone and of all merged, the token's loss [tokens, 2] and whether it is the likeliest [tokens, 2]."""

    question: Indices
    sure: Floats
    losses: Floats
    right: NDArray[np.bool_]


def probability(row: NDArray[np.float32], _entropy: float) -> float:
    """How likely the likeliest token is: what a gate is compared with."""
    return float(np.exp(row.max()))


def first_base(configuration: Configuration, native_base: float) -> float:
    """The base that computes a token alone: of the buckets and a shared prefill, the one nearest to the model's own."""
    bases = [*configuration.bases, *([] if configuration.prefill == "exact" else [native_base])]
    return bases[nearest_base(bases, native_base)]


def steps_of(
    traces: Sequence[Trace], configuration: Configuration, first: float, measure: Measure = probability
) -> Steps:
    """The steps of the right answers in `traces`, which have the bases of `configuration` and `first`.

    Here the others have computed the answer so far, where a gate lets them take over what they skipped.
    """
    question, sure, losses, right = [], [], [], []
    for number, trace in enumerate(traces):
        rows, alone = trace.select(configuration.bases), trace.select([first])[0]
        for place, token in trace.paths[0]:
            node = trace.nodes[place]
            gold = node.place(token)
            own = node.log_probabilities[alone]
            both = (own, merged_node(node, rows, configuration.merge, configuration.weights))
            question.append(number)
            sure.append(measure(own, float(node.entropies[alone])))
            losses.append([-float(one[gold]) for one in both])
            right.append([int(one.argmax()) == gold for one in both])
    return Steps(np.array(question, np.intp), np.array(sure), np.array(losses), np.array(right, np.bool_))


def try_gate(steps: Steps, groups: Indices, gate: float) -> GateTrial:
    """What comes of asking all where the first is not surer than `gate`; `groups` are the questions' contexts."""
    asked = steps.sure <= gate
    row, chosen = np.arange(len(asked)), asked.astype(int)
    length = np.bincount(steps.question)

    def loss(column: NDArray[np.int_] | int) -> Floats:
        return np.asarray(np.bincount(steps.question, steps.losses[row, column]) / length)

    def exact(column: NDArray[np.int_] | int) -> Floats:
        return np.asarray(np.bincount(steps.question, ~steps.right[row, column]) == 0, np.float64)

    return GateTrial(
        gate,
        float(asked.mean()),
        *paired_difference(loss(chosen), loss(1), groups),
        *paired_difference(exact(chosen), exact(1), groups),
    )


def lowest_gate(trials: Sequence[GateTrial]) -> float:
    """The lowest gate that is harmless, as all above it are; 1, which asks always, if the highest is not."""
    lowest = 1.0
    for trial in sorted(trials, key=lambda trial: -trial.gate):
        if not trial.harmless:
            break
        lowest = trial.gate
    return lowest
