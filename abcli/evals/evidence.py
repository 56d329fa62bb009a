"""From what an evaluation came to, to what a profile keeps of it."""

from __future__ import annotations

from abcli.evals.statistics import NATIVE, Summary
from abcli.profiles.profile import Difference, Score


def evidence(summary: Summary, name: str) -> Score:
    """What a profile keeps of a configuration, under `name`."""
    difference = None
    if summary.difference is not None and summary.configuration != NATIVE:
        nll = summary.difference.nll
        difference = Difference(nll.value, nll.low, nll.high)
    measures = summary.measures
    return Score(name, measures.nll.value, measures.accuracy.value, measures.worst_nll.value, difference)
