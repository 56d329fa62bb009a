"""Where two answers to one prompt part, and how likely each token was to the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abcli.trace.trace import Candidate, Step


@dataclass(frozen=True)
class Parting:
    """The first token (`place`) in which two answers differ; `first` and `second` are those steps, of which an answer
    that has ended before has none.
    """

    place: int
    first: Step | None
    second: Step | None


def parting(first: Sequence[Step], second: Sequence[Step]) -> Parting | None:
    """Where two answers part; None for the same answer."""
    for place in range(max(len(first), len(second))):
        one = first[place] if place < len(first) else None
        other = second[place] if place < len(second) else None
        if one is None or other is None or one.token != other.token:
            return Parting(place, one, other)
    return None


def likelihood(step: Step, token: int) -> tuple[float, bool]:
    """How likely `token` was in a step, and whether that is known; if not, it was at most that likely."""
    if token == step.token:
        return step.probability, True
    known = {candidate.token: candidate.probability for candidate in step.candidates}
    return (known[token], True) if token in known else (_least(step.candidates), False)


def _least(candidates: Sequence[Candidate]) -> float:
    return min((candidate.probability for candidate in candidates), default=1.0)
