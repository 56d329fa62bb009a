"""How one configuration did on one question."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Score:
    """How well a configuration gives the right answer to a question."""

    nll: float
    """Mean negative log-likelihood of the answer's tokens, in nats per token; finite."""
    exact: bool
    """Whether greedy decoding gives exactly the answer's tokens."""
    rank: int | None = None
    """The answer's place among the candidates by log-probability, 0 the likeliest; None without candidates."""
