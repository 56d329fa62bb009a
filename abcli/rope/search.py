"""Greedy searches for a set of RoPE bases whose attention waveforms complement each other.

Both work on the waves of all candidates, float64 [candidates, n] at distances 0 .. n - 1 (`waveform.waveforms`), start
from the native base, and return positions among the candidates in the order of choice. Neither draws random numbers:
of equally good candidates the first wins. What a wave can promise is limited: see docs/waves.md.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from abcli.errors import UsageError
from abcli.rope.waveform import EXTREMA_RADIUS, Floats, Positions, peaks, troughs

# The paper's released search counts a peak this near a trough as covering it.
COVER_TOLERANCE = 3
_MAX_ROUNDS = 20


def candidate_multipliers(low: float, high: float, count: int) -> tuple[float, ...]:
    """`count` evenly spaced multiples of the native base from `low` to `high`, and 1 where it is not among them.

    Raises UsageError unless 0 < low < high and count is at least 2.
    """
    if not 0 < low < high < np.inf:
        raise UsageError(
            f"a range from {low:g} to {high:g} is impossible", "give two ascending multiples, like 0.5,2.5"
        )
    if count < 2:
        raise UsageError(f"{count} candidates leave nothing to choose", "choose 2 or more")
    # Rounded, so that steps which mean 1 give 1 and not its neighbour in floating point.
    grid = {round(float(multiplier), 9) for multiplier in np.linspace(low, high, count)}
    return tuple(sorted(grid | {1.0}))


def search_paper(
    waves: Floats,
    native: int,
    count: int,
    *,
    radius: int = EXTREMA_RADIUS,
    tolerance: int = COVER_TOLERANCE,
) -> tuple[int, ...]:
    """The search of Attention Buckets (arXiv 2312.04455): peaks of the next wave on the troughs of those chosen.

    P and T are the peaks and troughs of the native wave, extrema within `radius`. Each step takes the candidate with
    the most pairs, at most `tolerance` apart, of one of its peaks and one of T or of one of its troughs and one of P;
    among equals the one whose pairs have the least mean squared distance. Its peaks and troughs join P and T, and
    what then stands within `tolerance` of its counterpart has met it and leaves P and T.
    Raises UsageError if there are fewer candidates than `count`.
    """
    _check(waves, native, count)
    all_peaks = [peaks(wave, radius) for wave in waves]
    all_troughs = [troughs(wave, radius) for wave in waves]
    chosen = [native]
    open_peaks, open_troughs = all_peaks[native], all_troughs[native]
    while len(chosen) < count:
        scores: dict[int, tuple[int, float]] = {}
        for candidate in range(len(waves)):
            if candidate not in chosen:
                ups = _pair_distances(all_peaks[candidate], open_troughs, tolerance)
                downs = _pair_distances(all_troughs[candidate], open_peaks, tolerance)
                apart = np.concatenate((ups, downs)).astype(np.float64)
                scores[candidate] = (len(apart), -float(np.mean(apart**2)) if len(apart) else 0.0)
        # max() keeps the first of equals.
        best = max(scores, key=scores.__getitem__)
        chosen.append(best)
        joined_peaks = np.union1d(open_peaks, all_peaks[best])
        joined_troughs = np.union1d(open_troughs, all_troughs[best])
        open_peaks = joined_peaks[~_near(joined_peaks, joined_troughs, tolerance)]
        open_troughs = joined_troughs[~_near(joined_troughs, joined_peaks, tolerance)]
    return tuple(chosen)


def search_envelope(waves: Floats, native: int, count: int) -> tuple[int, ...]:
    """The set that raises the lowest point of its envelope most: greedy, then refined by exchanging one at a time.

    Each step adds the candidate that gives the highest minimum over all distances. Then each base but the native is
    exchanged for whichever candidate raises that minimum, until no exchange does.
    Raises UsageError if there are fewer candidates than `count`.
    """
    _check(waves, native, count)
    chosen = [native]
    for _ in range(count - 1):
        best, _ = _best_addition(waves, chosen)
        chosen.append(best)
    lowest = float(waves[chosen].max(axis=0).min())
    for _ in range(_MAX_ROUNDS):
        before = lowest
        for place in range(1, count):
            others = chosen[:place] + chosen[place + 1 :]
            best, reached = _best_addition(waves, others)
            if reached > lowest:
                chosen[place], lowest = best, reached
        if lowest == before:
            break
    return tuple(chosen)


def _best_addition(waves: Floats, chosen: list[int]) -> tuple[int, float]:
    """The candidate that, with `chosen`, gives the highest lowest point, and that point."""
    covered = waves[chosen].max(axis=0)
    # One row at a time: a second table of all candidates would double the memory.
    lowest = np.array([np.maximum(wave, covered).min() for wave in waves])
    lowest[chosen] = -np.inf
    best = int(lowest.argmax())
    return best, float(lowest[best])


def _check(waves: Floats, native: int, count: int) -> None:
    if not 1 <= count <= len(waves):
        raise UsageError(f"{count} bases cannot be chosen from {len(waves)} candidates", "ask for more `candidates`")
    if not 0 <= native < len(waves):
        raise ValueError(f"the native base is number {native} of {len(waves)} candidates")


def _pair_distances(ones: Positions, others: Positions, tolerance: int) -> NDArray[np.intp]:
    """The distances of all pairs at most `tolerance` apart."""
    # Both lists are ascending, so the partners of each are a slice: from the first that is not too small on.
    first = np.searchsorted(others, ones - tolerance, side="left")
    last = np.searchsorted(others, ones + tolerance, side="right")
    found = [others[low:high] - one for one, low, high in zip(ones, first, last, strict=True) if low < high]
    return np.abs(np.concatenate(found)) if found else np.empty(0, np.intp)


def _near(positions: Positions, others: Positions, tolerance: int) -> NDArray[np.bool_]:
    """Which of `positions` have one of `others` within `tolerance`."""
    first = np.searchsorted(others, positions - tolerance, side="left")
    last = np.searchsorted(others, positions + tolerance, side="right")
    return np.asarray(first < last, np.bool_)
