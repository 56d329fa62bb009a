"""What the buckets saw while an answer was written, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Of each token of an answer, the tokens of the text that it attends to most.
STRONGEST = 24
# A text is told apart into at most so many passages.
MAX_PASSAGES = 160
# Digits after the point of what is written as text.
_DIGITS = 6


@dataclass(frozen=True)
class Candidate:
    """A token that could have come, and how likely it was (0..1)."""

    token: int
    text: str
    probability: float


@dataclass(frozen=True)
class View:
    """What one bucket said of the next token.

    `weight` is its part in the merge; `probability` that of the token that was chosen. The first of the `candidates`,
    the likeliest tokens, is what the bucket alone would have said.
    """

    bucket: int
    weight: float
    probability: float
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Step:
    """One token of an answer, and what it was chosen from.

    `views` has one for each bucket, or only the native one's where it decided alone; `agreement` is None then.
    `probability` and `candidates` are those of the merged distribution, before penalties, grammar and sampling.
    """

    token: int
    text: str
    agreement: float | None
    probability: float
    candidates: tuple[Candidate, ...]
    views: tuple[View, ...]

    def differs(self, native: int) -> bool:
        """Whether the likeliest token of the merge is another than that of bucket `native`."""
        views = [view for view in self.views if view.bucket == native]
        return bool(views) and views[0].candidates[0].token != self.candidates[0].token


@dataclass(frozen=True)
class Attention:
    """How much the answer attends to the text before it, as shares (0..1) of the weights of a few heads.

    Rows: one for each bucket, then the merged one, in which each bucket counts by its weight in the merge. `heads` are
    (layer, head) of those that look back furthest (see `abcli.trace.attention`). `steps` is the number of tokens of the
    answer that are looked at. All float32.
    """

    heads: tuple[tuple[int, int], ...]
    steps: int
    whole: NDArray[np.float32]
    """[rows, prompt]: the mean over the answer's tokens."""
    passages: NDArray[np.float32]
    """[steps, rows, passages]: the sum over each passage of the prompt."""
    strongest: NDArray[np.int32]
    """[steps, rows, STRONGEST or fewer]: the places in the prompt that get most, most first."""
    strongest_weights: NDArray[np.float32]
    """The shares of these."""
    by_distance: NDArray[np.float32]
    """[buckets, distances]: the mean weight of a token at each distance, the first token of the text left out."""


@dataclass(frozen=True)
class Trace:
    """An answer with what each bucket saw; `native` is the bucket whose base is nearest to the model's own.

    `prompt` are the texts of the prompt's tokens; `passages` are (first, end) in it, one after another. `waves` are
    float32 [buckets, distances], shares of the value at distance 0; empty for a model without RoPE. Where there is no
    `attention`, `without_attention` says why.
    """

    model: str
    native_base: float
    bases: tuple[float, ...]
    native: int
    merge: str
    prompt_tokens: tuple[int, ...]
    prompt: tuple[str, ...]
    passages: tuple[tuple[int, int], ...]
    steps: tuple[Step, ...]
    waves: NDArray[np.float32]
    attention: Attention | None = None
    without_attention: str = ""

    def fields(self) -> dict[str, Any]:
        """The trace as JSON has it."""
        return {
            "model": self.model,
            "native_base": self.native_base,
            "bases": list(self.bases),
            "native": self.native,
            "merge": self.merge,
            "prompt_tokens": list(self.prompt_tokens),
            "prompt": list(self.prompt),
            "passages": [list(passage) for passage in self.passages],
            "steps": [self._step(step) for step in self.steps],
            "waves": _rounded(self.waves),
            "attention": None if self.attention is None else _attention(self.attention),
            "without_attention": self.without_attention,
        }

    def _step(self, step: Step) -> dict[str, Any]:
        return {
            "token": step.token,
            "text": step.text,
            "agreement": None if step.agreement is None else round(step.agreement, _DIGITS),
            "differs": step.differs(self.native),
            "probability": round(step.probability, _DIGITS),
            "candidates": [_candidate(candidate) for candidate in step.candidates],
            "views": [
                {
                    "bucket": view.bucket,
                    "weight": round(view.weight, _DIGITS),
                    "probability": round(view.probability, _DIGITS),
                    "candidates": [_candidate(candidate) for candidate in view.candidates],
                }
                for view in step.views
            ],
        }


def passages_of(texts: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Where the sentences and lines of a text of tokens begin and end, joined until there are few enough."""
    ends = [
        place + 1
        for place, text in enumerate(texts)
        if "\n" in text or text.rstrip().endswith((".", "!", "?", "。", "！", "？"))  # noqa: RUF001 - CJK's marks
    ]
    if not ends or ends[-1] != len(texts):
        ends.append(len(texts))
    # Short ones join the one before, the shortest first, as few tokens say little.
    starts = [0, *ends[:-1]]
    spans = list(zip(starts, ends, strict=True))
    least = 3
    while len(spans) > 1:
        joined: list[tuple[int, int]] = []
        for start, end in spans:
            if joined and joined[-1][1] - joined[-1][0] < least:
                joined[-1] = joined[-1][0], end
            else:
                joined.append((start, end))
        spans = joined
        if len(spans) <= MAX_PASSAGES:
            break
        least *= 2
    return tuple(spans)


def _candidate(candidate: Candidate) -> dict[str, Any]:
    return {
        "token": candidate.token,
        "text": candidate.text,
        "probability": round(candidate.probability, _DIGITS),
    }


def _attention(found: Attention) -> dict[str, Any]:
    return {
        "heads": [list(head) for head in found.heads],
        "steps": found.steps,
        "whole": _rounded(found.whole),
        "passages": _rounded(found.passages),
        "strongest": found.strongest.tolist(),
        "strongest_weights": _rounded(found.strongest_weights),
        "by_distance": _rounded(found.by_distance),
    }


def _rounded(values: NDArray[np.float32]) -> Any:
    return np.round(values.astype(np.float64), _DIGITS).tolist()
