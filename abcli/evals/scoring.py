"""From what the buckets said, and a way of merging them, to the score of an answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from abcli.config import MergeRule
from abcli.evals.configurations import Configuration
from abcli.evals.scores import Score
from abcli.evals.traces import Node, Trace
from abcli.merge import merge_kept


def score(trace: Trace, configuration: Configuration) -> Score:
    """How `configuration`, whose bases must all be in `trace`, answers: its greedy answer is right, or is not.

    Tokens that the trace does not keep count nowhere, as no bucket finds them likely; the rule `product`, which has
    to know them to sum to 1, takes what is left over to be spread evenly.
    """
    rows = trace.select(configuration.bases)
    merged: dict[int, NDArray[np.float64]] = {}

    def at(node: int) -> NDArray[np.float64]:
        if node not in merged:
            merged[node] = merged_node(trace.nodes[node], rows, configuration.merge, configuration.weights)
        return merged[node]

    def total(path: Sequence[tuple[int, int]]) -> float:
        return float(sum(at(node)[trace.nodes[node].place(token)] for node, token in path))

    answer = trace.paths[0]
    log_probability = total(answer)
    exact = all(int(np.argmax(at(node))) == trace.nodes[node].place(token) for node, token in answer)
    rank = None
    if len(trace.paths) > 1:
        rank = sum(total(path) > log_probability for path in trace.paths[1:])
    return Score(-log_probability / len(answer), exact, rank)


def merged_node(node: Node, rows: Sequence[int], rule: MergeRule, weights: Sequence[float] = ()) -> NDArray[np.float64]:
    """The merged log-probabilities [kept] of the tokens of `node`, of the buckets in `rows`."""
    return merge_kept(node.log_probabilities[rows], node.entropies[rows], rule, weights)
