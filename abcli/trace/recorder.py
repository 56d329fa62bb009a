"""Keeps of each choice of a token what a trace shows of it."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from abcli.merge import likeliest
from abcli.sampling import Choice
from abcli.trace.trace import Candidate, Step, View

# The likeliest tokens that are kept of each distribution.
CANDIDATES = 5

Text = Callable[[int], str]


class Recorder:
    """An observer (`GenerationConfig.observer`) that makes a `Step` of every choice."""

    def __init__(self, native: int, text: Text) -> None:
        """`native` is the bucket that may decide alone; `text` tells what a token stands for."""
        self._native = native
        self._text = text
        self.steps: list[Step] = []

    def __call__(self, choice: Choice) -> None:
        """Keep what `choice` tells."""
        alone = len(choice.logits) == 1
        views = []
        for row, (logits, weight) in enumerate(zip(choice.logits, choice.weights, strict=True)):
            probabilities = softmax(logits)
            views.append(
                View(
                    self._native if alone else row,
                    float(weight),
                    float(probabilities[choice.token]),
                    self._candidates(probabilities),
                )
            )
        if alone:
            probability, candidates = views[0].probability, views[0].candidates
        else:
            merged = softmax(choice.merged)
            probability, candidates = float(merged[choice.token]), self._candidates(merged)
        self.steps.append(
            Step(choice.token, self._text(choice.token), choice.agreement, probability, candidates, tuple(views))
        )

    def _candidates(self, probabilities: NDArray[np.float32]) -> tuple[Candidate, ...]:
        best = likeliest(probabilities, CANDIDATES)
        return tuple(Candidate(int(token), self._text(int(token)), float(probabilities[token])) for token in best)


def texts(pieces: Iterable[bytes]) -> list[str]:
    """The text that each token's bytes end; a character of several tokens comes with its last one."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    return [decode(piece) for piece in pieces]


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The probabilities (float32 [vocabulary]) that logits stand for."""
    exponentials = np.exp(logits - logits.max())
    return np.asarray(exponentials / exponentials.sum(dtype=np.float64), np.float32)
