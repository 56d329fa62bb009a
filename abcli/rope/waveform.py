"""The attention waveform of a RoPE base: how much attention a key can get at each distance.

A(D) = (1 / (d/2)) * sum over j = 1 .. d/2 of |S_j(D)|, S_j(D) = sum over i < j of exp(1j * D * theta_i), bounds the
attention score at distance D up to a factor of the query and key alone (RoFormer, arXiv 2104.09864, section 3.4.3;
Attention Buckets, arXiv 2312.04455, on its peaks and troughs). A(0) = (d/2 + 1) / 2 whatever the base, so waves of
one model compare as they are, and divided by A(0) they are shares of the largest possible bound.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Positions = NDArray[np.intp]

# The paper's released search keeps extrema at least this many positions apart.
EXTREMA_RADIUS = 50
# One tile of distances, as coarse steps x fine steps: small enough that all its arrays stay in a core's cache.
_COARSE, _FINE = 64, 256
_DIRECT_BLOCK = 4096


@dataclass(frozen=True)
class WaveSummary:
    """What there is to say about one wave: where it peaks and dips, its lowest value and where, and its mean."""

    peaks: tuple[int, ...]
    troughs: tuple[int, ...]
    lowest: float
    lowest_at: int
    mean: float


def value_at_zero(pairs: int) -> float:
    """A(0), the highest value of every wave: (pairs + 1) / 2."""
    return (pairs + 1) / 2


def waveform(frequencies: Floats, distances: NDArray[np.float64] | NDArray[np.int64]) -> Floats:
    """A(D), float64 [n], for frequencies in radians per position [pairs] and any distances in positions [n]."""
    result = np.empty(len(distances))
    for start in range(0, len(distances), _DIRECT_BLOCK):
        block = slice(start, start + _DIRECT_BLOCK)
        terms = np.exp(1j * np.multiply.outer(np.asarray(distances[block], np.float64), frequencies))
        result[block] = np.abs(np.cumsum(terms, axis=1)).mean(axis=1)
    return result


def waveforms(frequencies: Floats, length: int, threads: int = 0) -> Floats:
    """A(D) at D = 0 .. length - 1 of many bases, float64 [bases, length], from their frequencies [bases, pairs].

    Agrees with `waveform` to 1e-9, many times faster: exp(1j * (a + b) * theta) is the product of two small tables.
    `threads`: 0 is one per core; numpy computes without the interpreter's lock.
    """
    result = np.empty((len(frequencies), length))
    tiles = list(product(range(len(frequencies)), range(0, length, _COARSE * _FINE)))

    def fill(tile: tuple[int, int]) -> None:
        base, start = tile
        part = result[base, start : start + _COARSE * _FINE]
        part[:] = _tile(frequencies[base], start)[: len(part)]

    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        for _ in pool.map(fill, tiles):
            pass
    return result


def envelope(waves: Floats) -> Floats:
    """The highest wave at each distance, float64 [n], of `waves` [bases, n]: the best bound any bucket gives."""
    return np.asarray(waves.max(axis=0), np.float64)


def peaks(wave: Floats, radius: int = EXTREMA_RADIUS) -> Positions:
    """Distances, ascending, at which the wave [n] is higher than anywhere within `radius`; never the first or last.

    Of equal values next to each other the first counts.
    """
    if len(wave) < 3:
        return np.empty(0, np.intp)
    before, after = _sliding_maximum(wave, radius)
    found = np.flatnonzero((wave[1:-1] > before) & (wave[1:-1] >= after)) + 1
    return np.asarray(found, np.intp)


def troughs(wave: Floats, radius: int = EXTREMA_RADIUS) -> Positions:
    """Distances, ascending, at which the wave [n] is lower than anywhere within `radius`; as `peaks`."""
    return peaks(-wave, radius)


def summarise(wave: Floats, radius: int = EXTREMA_RADIUS) -> WaveSummary:
    """Peaks, troughs, the deepest trough and the mean of a wave [n]; its deepest trough is its lowest value."""
    at = int(wave.argmin())
    return WaveSummary(
        _ints(peaks(wave, radius)), _ints(troughs(wave, radius)), float(wave[at]), at, float(wave.mean())
    )


def _tile(frequencies: Floats, start: int) -> Floats:
    """A(D) at the _COARSE * _FINE distances from `start` on, in float64."""
    coarse = np.multiply.outer(frequencies, start + _FINE * np.arange(_COARSE, dtype=np.float64))[:, :, None]
    fine = np.multiply.outer(frequencies, np.arange(_FINE, dtype=np.float64))[:, None, :]
    coarse_cos, coarse_sin, fine_cos, fine_sin = np.cos(coarse), np.sin(coarse), np.cos(fine), np.sin(fine)
    total, real, imaginary = np.zeros((3, _COARSE, _FINE))
    first, second = np.empty((2, _COARSE, _FINE))
    for pair in range(len(frequencies)):
        real += np.multiply(coarse_cos[pair], fine_cos[pair], out=first)
        real -= np.multiply(coarse_sin[pair], fine_sin[pair], out=first)
        imaginary += np.multiply(coarse_sin[pair], fine_cos[pair], out=first)
        imaginary += np.multiply(coarse_cos[pair], fine_sin[pair], out=first)
        np.multiply(real, real, out=first)
        first += np.multiply(imaginary, imaginary, out=second)
        total += np.sqrt(first, out=first)
    return np.asarray(total.reshape(-1) / len(frequencies), np.float64)


def _sliding_maximum(wave: Floats, radius: int) -> tuple[Floats, Floats]:
    """For every inner position, the highest of the `radius` values before it and of those after it, float64 [n - 2]."""
    padded = np.pad(wave, radius, constant_values=-np.inf)
    width, highest = 1, padded
    # Windows of doubled width: log2(radius) passes instead of radius.
    while width < radius:
        step = min(width, radius - width)
        highest = np.maximum(highest[:-step], highest[step:])
        width += step
    inner = len(wave) - 2
    return highest[1 : 1 + inner], highest[radius + 2 : radius + 2 + inner]


def _ints(positions: Positions) -> tuple[int, ...]:
    return tuple(int(position) for position in positions)
