"""Attention by distance, measured on text, beside the wave of each base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from abcli.config import ContextConfig, ModelConfig
from abcli.errors import UsageError
from abcli.gguf.checked import check_model
from abcli.native.crash_probe import ensure_loadable
from abcli.native.llama import CancelFlag
from abcli.native.model import Model
from abcli.rope.waveform import troughs
from abcli.trace.attention import Heads, read_attention

# The rows that attend are the last quarter of a text, but no more than this.
MAX_ROWS = 256
# A running mean over so many distances is taken off before wave and attention are compared: what is left is the ripple.
RIPPLE = 101
_SHIFTS = 199
# A trough is lower than all within so many distances; two are together that are at most so far apart.
_TROUGH_RADIUS = 25
TOGETHER = 3

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Ripple:
    """How the ripples of attention (of the logarithm of its median) correlate with those of a wave, -1..1.

    `error` is the jackknife's standard error over the texts, None for a single one; `chance` the share of shifts of the
    wave along the distance that correlate as much or more.
    """

    correlation: float
    error: float | None
    chance: float


@dataclass(frozen=True)
class Troughs:
    """Of `count` troughs of a wave, `together` have one of the attention near; `by_chance` of all distances have."""

    together: int
    count: int
    by_chance: float


@dataclass(frozen=True)
class MeasuredBase:
    """The attention that a token gets at each distance 1 .. n under one base, float64 [n] each, over rows and texts.

    `ripples` has one for the wave of each base that is measured, `troughs` is about its own wave.
    """

    base: float
    mean: Floats
    lower: Floats
    median: Floats
    upper: Floats
    ripples: tuple[Ripple, ...]
    troughs: Troughs


@dataclass(frozen=True)
class Measurement:
    """Attention of a model's `heads` by distance, of `rows` tokens of each of `texts` texts, for each base."""

    heads: Heads
    texts: int
    rows: int
    bases: tuple[MeasuredBase, ...]


class Measurer:
    """A loaded model whose attention is measured."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self.cancel = CancelFlag()

    def measure(
        self,
        text: str,
        context: int,
        texts: int,
        bases: Sequence[float],
        waves: Floats,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> Measurement:
        """The attention in `texts` parts of `text`, each `context` tokens long, taken at even distances.

        `waves` [bases, distances or more] are those of `bases`. `progress` gets (parts and bases done, all). Raises
        UsageError for a text that is too short, CancelledError, NativeError.
        """
        tokens = self._model.tokenize(text, add_special=False, parse_special=False)
        beginning = self._model.tokenize("", add_special=True, parse_special=False)
        length = context - len(beginning)
        if len(tokens) < texts * length:
            raise UsageError(
                f"the text has {len(tokens):,} tokens, but {texts} parts of {length:,} are needed",
                "give a longer text, a smaller `ctx_size` or fewer `texts`",
            )
        rows = min(MAX_ROWS, max(1, context // 4))
        first = context - rows
        found: list[NDArray[np.float32]] = []
        heads: Heads = ()
        for number in range(texts):
            start = number * ((len(tokens) - length) // max(1, texts - 1)) if texts > 1 else 0
            reading = read_attention(
                self._model,
                ContextConfig(context_size=context),
                bases,
                [*beginning, *tokens[start : start + length]],
                first,
                heads=heads,
                cancel=self.cancel,
                progress=partial(_part, progress, number, texts),
            )
            heads = reading.heads
            found.append(_by_distance(reading.weights, first))
        return Measurement(
            heads,
            texts,
            rows,
            tuple(
                measured(base, np.stack([weights[index] for weights in found]), waves[:, 1:first], index)
                for index, base in enumerate(bases)
            ),
        )


@contextmanager
def measurer(path: Path) -> Iterator[Measurer]:
    """Load a model to measure it; it is freed after the block. Raises as `check_model`, and ModelFileError."""
    checked = check_model(ModelConfig(path))
    ensure_loadable(checked)
    with Model(checked) as model:
        yield Measurer(model)


def common_text() -> str:
    """English prose that every Python comes with: the topics of its help, always in the same order."""
    from pydoc_data.topics import topics

    return "\n".join(text for _name, text in sorted(topics.items()))


def measured(base: float, weights: NDArray[np.float32], waves: Floats, own: int) -> MeasuredBase:
    """What is said of one base, of its `weights` [texts, rows, n] and the `waves` [bases, n] of all at distances
    1 .. n; its own is number `own`.
    """
    rows = weights.reshape(-1, weights.shape[2])
    lower, median, upper = np.quantile(rows, (0.25, 0.5, 0.75), axis=0)
    ripples = tuple(_ripple(wave, median, weights) for wave in waves)
    mean = rows.mean(axis=0, dtype=np.float64)
    return MeasuredBase(base, mean, lower, median, upper, ripples, trough_meeting(waves[own], median))


def ripple_correlation(wave: Floats, attention: Floats) -> float:
    """How the ripples of a wave [n] and of the logarithm of attention [n] correlate (-1..1); 0 where there are none."""
    first, second = _unit(_ripples(wave)), _unit(_ripples(_logarithm(attention)))
    return float(first @ second)


def ripple_chance(wave: Floats, attention: Floats, seed: int = 0) -> float:
    """The share of random shifts of a wave's ripples along the distance (around the end) that correlate with those of
    attention as much or more in size, itself included; 1 where there are no ripples.
    """
    first, second = _unit(_ripples(wave)), _unit(_ripples(_logarithm(attention)))
    found = abs(first @ second)
    if not found:
        return 1.0
    shifts = np.random.default_rng(seed).integers(1, len(first), _SHIFTS)
    others = np.array([np.roll(first, shift) @ second for shift in shifts])
    return float((1 + (np.abs(others) >= found).sum()) / (1 + _SHIFTS))


def trough_meeting(wave: Floats, attention: Floats) -> Troughs:
    """How many troughs of a wave's ripples have one of the ripples of (the logarithm of) attention near, both [n]."""
    first, second = _ripples(wave), _ripples(_logarithm(attention))
    places, others = troughs(first, _TROUGH_RADIUS), troughs(second, _TROUGH_RADIUS)
    near = np.zeros(len(first), bool)
    for other in others:
        near[max(0, other - TOGETHER) : other + TOGETHER + 1] = True
    return Troughs(int(near[places].sum()), len(places), float(near.mean()) if len(near) else 0.0)


def _ripple(wave: Floats, median: Floats, weights: NDArray[np.float32]) -> Ripple:
    texts, error = len(weights), None
    if texts > 1:
        others = (np.delete(weights, text, axis=0).reshape(-1, len(median)) for text in range(texts))
        left = [ripple_correlation(wave, np.median(rows, axis=0).astype(np.float64)) for rows in others]
        error = float(np.sqrt((texts - 1) * np.var(left)))
    return Ripple(ripple_correlation(wave, median), error, ripple_chance(wave, median))


def _part(progress: Callable[[int, int], None], number: int, parts: int, done: int, total: int) -> None:
    progress(number * total + done, parts * total)


def _by_distance(weights: NDArray[np.float32], first: int) -> NDArray[np.float32]:
    """The weights at distances 1 .. first - 1, float32 [bases, rows, first - 1]; the first token is left out."""
    rows = [weights[:, row, first + row - np.arange(1, first)] for row in range(weights.shape[1])]
    return np.stack(rows, axis=1)


def _logarithm(attention: Floats) -> Floats:
    return np.asarray(np.log(np.maximum(attention, 1e-12)), np.float64)


def _unit(ripples: Floats) -> Floats:
    """`ripples` [n] without their mean, of length 1; zeros where they are all the same."""
    centred = ripples - ripples.mean() if len(ripples) else ripples
    length = np.linalg.norm(centred)
    return np.asarray(centred / length if length else centred * 0, np.float64)


def _ripples(values: Floats) -> Floats:
    """What is left of `values` [n] without their running mean, [n - RIPPLE + 1]; nothing of short ones."""
    if len(values) < RIPPLE:
        return np.empty(0)
    smooth = np.convolve(values, np.full(RIPPLE, 1 / RIPPLE), mode="valid")
    half = RIPPLE // 2
    return np.asarray(values[half : len(values) - half] - smooth, np.float64)
