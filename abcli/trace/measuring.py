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
from abcli.trace.attention import Heads, read_attention

# The rows that attend are the last quarter of a text, but no more than this.
MAX_ROWS = 256
# A running mean over so many distances is taken off before wave and attention are compared: what is left is the ripple.
RIPPLE = 101
_SHIFTS = 199

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class MeasuredBase:
    """The attention that a token gets at each distance 1 .. n under one base, float64 [n] each, over rows and texts.

    `ripple` is the correlation of its ripples (of the logarithm) with those of the base's wave; `chance` the share of
    shifts of the wave along the distance that correlate as much or more.
    """

    base: float
    mean: Floats
    lower: Floats
    median: Floats
    upper: Floats
    ripple: float
    chance: float


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
        together = np.concatenate(found, axis=1)
        return Measurement(
            heads,
            texts,
            rows,
            tuple(_measured(base, values, wave) for base, values, wave in zip(bases, together, waves, strict=True)),
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


def ripple_correlation(wave: Floats, attention: Floats, seed: int = 0) -> tuple[float, float]:
    """How the ripples of a wave [n] and of the logarithm of attention [n] correlate (-1..1), and by chance.

    The second number is the share of random shifts of the wave's ripples along the distance (around the end) whose
    correlation is as large or larger in size, itself included. (0, 1) where there is no ripple.
    """
    first, second = _ripples(wave), _ripples(np.log(np.maximum(attention, 1e-12)))
    if len(first) < 2 or not first.std() or not second.std():
        return 0.0, 1.0
    first, second = (values / np.linalg.norm(values) for values in (first - first.mean(), second - second.mean()))
    found = float(first @ second)
    shifts = np.random.default_rng(seed).integers(1, len(first), _SHIFTS)
    others = np.array([np.roll(first, shift) @ second for shift in shifts])
    return found, float((1 + (np.abs(others) >= abs(found)).sum()) / (1 + _SHIFTS))


def _part(progress: Callable[[int, int], None], number: int, parts: int, done: int, total: int) -> None:
    progress(number * total + done, parts * total)


def _by_distance(weights: NDArray[np.float32], first: int) -> NDArray[np.float32]:
    """The weights at distances 1 .. first - 1, float32 [bases, rows, first - 1]; the first token is left out."""
    rows = [weights[:, row, first + row - np.arange(1, first)] for row in range(weights.shape[1])]
    return np.stack(rows, axis=1)


def _measured(base: float, values: NDArray[np.float32], wave: Floats) -> MeasuredBase:
    mean = values.mean(axis=0, dtype=np.float64)
    lower, median, upper = np.quantile(values, (0.25, 0.5, 0.75), axis=0)
    ripple, chance = ripple_correlation(wave[1 : 1 + len(mean)], median)
    return MeasuredBase(base, mean, lower, median, upper, ripple, chance)


def _ripples(values: Floats) -> Floats:
    """What is left of `values` [n] without their running mean, [n - RIPPLE + 1]; nothing of short ones."""
    if len(values) < RIPPLE:
        return np.empty(0)
    smooth = np.convolve(values, np.full(RIPPLE, 1 / RIPPLE), mode="valid")
    half = RIPPLE // 2
    return np.asarray(values[half : len(values) - half] - smooth, np.float64)
