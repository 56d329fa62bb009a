"""What tokens were chosen from: log-probabilities of the merged distribution, and what each bucket would have said."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from abcli.merge import likeliest
from abcli.sampling import Choice


@dataclass(frozen=True)
class Likely:
    """A token and its log-probability."""

    token: int
    logprob: float


@dataclass(frozen=True)
class BucketView:
    """What one bucket found likeliest, and its weight (0..1) in the merged distribution."""

    weight: float
    top: tuple[Likely, ...]


@dataclass(frozen=True)
class Chosen:
    """A token with its log-probability before penalties, grammar and temperature; the likeliest come first in `top`.

    `agreement` is the probability mass (0..1) on which the buckets agree, None where one decided alone.
    """

    token: int
    logprob: float
    top: tuple[Likely, ...]
    agreement: float | None
    buckets: tuple[BucketView, ...] = ()


class Watcher:
    """Looks at every choice of one answer; called by the thread that computes."""

    def __init__(self, top: int, *, each_bucket: bool = False) -> None:
        """`top`: how many of the likeliest tokens are kept of every choice."""
        self._top = top
        self._each_bucket = each_bucket
        self._seen: list[Chosen] = []
        self._taken = 0

    def __call__(self, choice: Choice) -> None:
        """Keep what is wanted of a choice."""
        logprobs = log_softmax(choice.merged)
        buckets: tuple[BucketView, ...] = ()
        if self._each_bucket:
            pairs = zip(choice.weights, choice.logits, strict=True)
            buckets = tuple(BucketView(float(weight), likely(log_softmax(row), self._top)) for weight, row in pairs)
        self._seen.append(
            Chosen(choice.token, float(logprobs[choice.token]), likely(logprobs, self._top), choice.agreement, buckets)
        )

    def take(self, count: int) -> tuple[Chosen, ...]:
        """Those of the answer's first `count` tokens that were not taken before."""
        taken, self._taken = self._taken, max(count, self._taken)
        return tuple(self._seen[taken:count])


def scored(token: int, logprobs: NDArray[np.float32], top: int) -> Chosen:
    """A token that was not chosen but given, of which `logprobs` [vocabulary] say how likely it was."""
    return Chosen(token, float(logprobs[token]), likely(logprobs, top), None)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The log-probabilities (float32 [vocabulary]) of logits [vocabulary]."""
    moved = logits - logits.max()
    total = np.exp(moved).sum(dtype=np.float64)
    return np.asarray(moved - np.log(total), np.float32)


def likely(logprobs: NDArray[np.float32], count: int) -> tuple[Likely, ...]:
    """The `count` likeliest tokens, the first of equal ones first."""
    return tuple(Likely(int(token), float(logprobs[token])) for token in likeliest(logprobs, count))
