"""The answers' tokens of many questions as arrays, on which any set of bases is merged and scored at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from abcli.config import MergeRule
from abcli.evals.traces import Trace
from abcli.merge import LARGEST_DEFICIT, PLAUSIBLE_SHARE

Floats = NDArray[np.float64]
# Stands for the log-probability of a token that was not kept.
_NEVER = -1e4


@dataclass(frozen=True)
class Table:
    """The right answers of `questions` questions, token by token: `tokens` rows in all, in the questions' order."""

    bases: tuple[float, ...]
    log_probabilities: Floats
    """[tokens, bases, kept]; where fewer tokens were kept, the rest is next to impossible."""
    entropies: Floats
    """[tokens, bases], nats."""
    gold: NDArray[np.intp]
    """[tokens]: the right token's index among those kept."""
    question: NDArray[np.intp]
    """[tokens]: the index of the question."""

    @property
    def questions(self) -> int:
        """The number of questions."""
        return int(self.question[-1]) + 1

    def take(self, questions: NDArray[np.intp]) -> Table:
        """The table of some of the questions, given by index in ascending order."""
        place = np.full(self.questions, -1)
        place[questions] = np.arange(len(questions))
        rows = np.flatnonzero(place[self.question] >= 0)
        return Table(
            self.bases,
            self.log_probabilities[rows],
            self.entropies[rows],
            self.gold[rows],
            place[self.question[rows]].astype(np.intp),
        )

    def per_question(self, token_losses: Floats) -> Floats:
        """The mean [questions] over each answer's tokens of losses [tokens]."""
        counts = np.bincount(self.question, minlength=self.questions)
        return np.bincount(self.question, token_losses, self.questions) / counts


def make_table(traces: Sequence[Trace], bases: Sequence[float]) -> Table:
    """The table of the right answers in `traces`, under `bases`. Raises KeyError for a base that was not traced."""
    blocks: list[Floats] = []
    entropies: list[Floats] = []
    gold: list[int] = []
    question: list[int] = []
    for index, trace in enumerate(traces):
        rows = trace.select(bases)
        for number, token in trace.paths[0]:
            node = trace.nodes[number]
            blocks.append(node.log_probabilities[rows].astype(np.float64))
            entropies.append(node.entropies[rows].astype(np.float64))
            gold.append(node.place(token))
            question.append(index)
    width = max(block.shape[1] for block in blocks)
    padded = np.full((len(blocks), len(bases), width), _NEVER)
    for index, block in enumerate(blocks):
        # Forbidden tokens have -inf, which averages could turn into no number.
        padded[index, :, : block.shape[1]] = np.maximum(block, _NEVER)
    return Table(tuple(bases), padded, np.stack(entropies), np.array(gold, np.intp), np.array(question, np.intp))


def losses(table: Table, columns: Sequence[int], rule: MergeRule, weights: Sequence[float] = ()) -> Floats:
    """The negative log-likelihood [questions] of the answers, in nats per token, by the merged buckets `columns`."""
    rows = table.log_probabilities[:, columns]
    at_gold = np.take_along_axis(rows, table.gold[:, None, None], axis=2)[:, :, 0]
    if rule == "pool" and len(columns) > 1:
        shares = np.array(weights) if len(weights) else np.full(len(columns), 1 / len(columns))
        return table.per_question(PoolProblem(table, columns).losses(shares))
    if rule == "max":
        best = rows.max(axis=2).argmax(axis=1)
        return table.per_question(-np.take_along_axis(at_gold, best[:, None], axis=1)[:, 0])
    if rule == "product":
        means = rows.mean(axis=1)
        others = np.maximum(1 - np.exp(rows).sum(axis=2), 1e-12)
        total = np.exp(means).sum(axis=1) + np.exp(np.log(others).mean(axis=1))
        return table.per_question(np.log(total) - at_gold.mean(axis=1))
    shares = np.ones(at_gold.shape)
    if rule == "confidence":
        shares = np.exp(rows.max(axis=2))
    elif rule == "entropy":
        shares = np.exp(-table.entropies[:, columns])
    terms = at_gold + np.log(shares / shares.sum(axis=1, keepdims=True))
    return table.per_question(-_log_sum(terms))


class PoolProblem:
    """What the weights of the merge rule `pool` do to the losses of some buckets; see merge.pool_plausible."""

    def __init__(self, table: Table, columns: Sequence[int]) -> None:
        rows = table.log_probabilities[:, columns]
        means = _log_sum(np.swapaxes(rows, 1, 2)) - np.log(len(columns))
        plausible = means >= means.max(axis=1, keepdims=True) + np.log(PLAUSIBLE_SHARE)
        # Only the plausible tokens count, and they are few: move them to the front.
        width = int(plausible.sum(axis=1).max())
        order = np.argsort(~plausible, axis=1, kind="stable")[:, :width]
        self._inside = np.take_along_axis(plausible, order, axis=1)
        means_inside = np.take_along_axis(means, order, axis=1)
        rows = np.take_along_axis(rows, order[:, None, :], axis=2)
        self._rows = np.where(
            self._inside[:, None, :], np.maximum(rows, means_inside[:, None, :] - LARGEST_DEFICIT), 0.0
        )
        self._mass = _log_sum(np.where(self._inside, means_inside, _NEVER))
        self._place = (order == table.gold[:, None]).argmax(axis=1)
        self._reached = np.take_along_axis(plausible, table.gold[:, None], axis=1)[:, 0]
        self._unreached_losses = -np.take_along_axis(means, table.gold[:, None], axis=1)[:, 0]

    def losses(self, weights: Floats) -> Floats:
        """[tokens]: the negative log-likelihoods with `weights` [buckets]."""
        pooled = self._pooled(weights)
        at_gold = np.take_along_axis(pooled, self._place[:, None], axis=1)[:, 0]
        return np.where(self._reached, -(at_gold + self._mass), self._unreached_losses)

    def fit(self, importance: Floats, penalty: float) -> Floats:
        """The weights [buckets] with the sum 1 and the least sum of importance [tokens] x loss + penalty.

        The penalty is penalty / 2 x their squared distance to equal weights. The problem is convex (a log-linear
        model); it is solved by Newton's method, the sum kept by a Lagrange multiplier, steps halved where needed.
        """
        count = self._rows.shape[1]
        equal = np.full(count, 1 / count)
        weights = equal.copy()
        scale = np.where(self._reached, importance, 0.0)
        gold = np.take_along_axis(self._rows, self._place[:, None, None], axis=2)[:, :, 0]

        def cost(at: Floats) -> float:
            return float(scale @ self.losses(at) + penalty / 2 * ((at - equal) ** 2).sum())

        value = cost(weights)
        for _ in range(_NEWTON_STEPS):
            probabilities = np.exp(self._pooled(weights))
            expected = np.einsum("nbk,nk->nb", self._rows, probabilities)
            gradient = scale @ (expected - gold) + penalty * (weights - equal)
            weighted = self._rows * (scale[:, None] * probabilities)[:, None, :]
            hessian = np.einsum("nbk,nck->bc", weighted, self._rows) - (expected * scale[:, None]).T @ expected
            hessian += penalty * np.eye(count)
            down, along = np.linalg.solve(hessian, np.stack([gradient, np.ones(count)], axis=1)).T
            step = down - along * (down.sum() / along.sum())
            shorter = 1.0
            while shorter > _SHORTEST_STEP and cost(weights - shorter * step) > value:
                shorter /= 2
            weights = weights - shorter * step
            before, value = value, cost(weights)
            if before - value < _CONVERGED:
                break
        return np.asarray(weights - (weights.sum() - 1) / count, np.float64)

    def _pooled(self, weights: Floats) -> Floats:
        """[tokens, plausible]: logarithms of the shares, which sum to 1."""
        pooled = np.where(self._inside, np.einsum("b,nbk->nk", weights, self._rows), -np.inf)
        return np.asarray(pooled - _log_sum(pooled)[:, None], np.float64)


_NEWTON_STEPS = 30
_SHORTEST_STEP = 1e-3
_CONVERGED = 1e-7


def _log_sum(values: Floats) -> Floats:
    """log sum exp over the last axis."""
    peaks = values.max(axis=-1, keepdims=True)
    return np.asarray(peaks[..., 0] + np.log(np.exp(values - peaks).sum(axis=-1)), np.float64)
