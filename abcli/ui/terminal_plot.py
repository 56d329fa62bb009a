"""A plot of two curves for a terminal, in block characters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_LABEL_WIDTH = 5
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_GAIN = "░"
_ASCII = str.maketrans(_EIGHTHS + _GAIN + "│└─", " " + "#" * 8 + ".|+-")
MIN_WIDTH = 30
# Percent between two labels of the vertical axis, which has four.
_STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25)


def floor_plot(lower: Floats, upper: Floats, width: int, height: int = 12, *, unicode: bool = True) -> list[str]:
    """Lines of at most `width` characters: how low two curves [n] of shares (1 = 100 %) get along the horizontal axis.

    Each column covers an equal part of 0 .. n - 1 and shows the lowest value of both in it: solid up to `lower`,
    shaded from there to `upper`, which is nowhere below it. `height`, a multiple of 4, is that of the area in lines.
    `unicode` False keeps to ASCII.
    """
    columns = max(1, min(max(width, MIN_WIDTH) - _LABEL_WIDTH - 2, len(lower)))
    solid, shaded = column_minima(lower, columns), column_minima(upper, columns)
    # The first columns tower above the rest, where the troughs are: they may be cut off.
    most = float(np.quantile(shaded, 0.98))
    top = next((4 * step / 100 for step in _STEPS if 4 * step / 100 >= most), 1.0)
    eighths = [np.rint(curve / top * height * 8).astype(int) for curve in (solid, shaded)]
    lines = []
    for row in reversed(range(height)):
        cells = [_cell(low - 8 * row, high - 8 * row) for low, high in zip(*eighths, strict=True)]
        label = f"{top * (row + 1) / height:.0%}" if 4 * (row + 1) % height == 0 else ""
        lines.append(f"{label:>{_LABEL_WIDTH}} │{''.join(cells)}".rstrip())
    lines.append(f"{'0%':>{_LABEL_WIDTH}} └{'─' * columns}")
    lines.append(" " * (_LABEL_WIDTH + 2) + _axis(len(lower), columns))
    if not unicode:
        lines = [line.translate(_ASCII) for line in lines]
    return lines


def column_minima(curve: Floats, columns: int) -> Floats:
    """The lowest value of `curve` [n] in each of `columns` equal parts, float64 [columns]; columns <= n."""
    starts = np.arange(columns) * len(curve) // columns
    return np.asarray(np.minimum.reduceat(curve, starts), np.float64)


def _cell(solid: int, shaded: int) -> str:
    """One character, given by how many eighths of it the two curves stand above its lower edge."""
    if solid > 0:
        return _EIGHTHS[min(8, solid)]
    return _GAIN if shaded >= 4 else " "


def _axis(length: int, columns: int) -> str:
    """The distances at the left, in the middle and at the right of the horizontal axis."""
    left, middle, right = "0", f"{length // 2:,}", f"{length - 1:,}"
    if columns < len(left) + len(middle) + len(right) + 4:
        return left + right.rjust(columns - 1)
    return left + middle.center(columns - 1 - len(right)) + right
