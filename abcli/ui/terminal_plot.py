"""Plots of two curves for a terminal, in block characters."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_LABEL_WIDTH = 5
_EIGHTHS = " ▁▂▃▄▅▆▇█"
_GAIN = "░"
_ASCII = str.maketrans(_EIGHTHS + _GAIN + "│└─", " " + "#" * 8 + ".|+-")
MIN_WIDTH = 30
# What is less counts as this much in a logarithmic plot.
_LEAST = 1e-12
# Percent between two labels of the vertical axis, which has four.
_STEPS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 15, 20, 25)


def floor_plot(
    lower: Floats,
    upper: Floats,
    width: int,
    height: int = 12,
    *,
    first: int = 0,
    logarithmic: bool = False,
    unicode: bool = True,
) -> list[str]:
    """Lines of at most `width` characters: how low two curves [n] get along the horizontal axis.

    Each column covers an equal part of `first` .. first + n - 1 and shows the lowest value of both in it: solid up to
    `lower`, shaded from there to `upper`, which is nowhere below it. They are shares (1 = 100 %), in a `logarithmic`
    plot, which begins near their lowest one, any numbers. `height`, a multiple of 4, is that of the area in lines.
    `unicode` False keeps to ASCII.
    """
    columns = max(1, min(max(width, MIN_WIDTH) - _LABEL_WIDTH - 2, len(lower)))
    scale = _powers if logarithmic else _shares
    solid, shaded, labels = scale(column_minima(lower, columns), column_minima(upper, columns))
    eighths = [np.rint(curve * height * 8).astype(int) for curve in (solid, shaded)]
    lines = []
    for row in reversed(range(height)):
        cells = [_cell(low - 8 * row, high - 8 * row) for low, high in zip(*eighths, strict=True)]
        quarter, rest = divmod(4 * (row + 1), height)
        lines.append(f"{labels[quarter] if not rest else '':>{_LABEL_WIDTH}} │{''.join(cells)}".rstrip())
    lines.append(f"{labels[0]:>{_LABEL_WIDTH}} └{'─' * columns}")
    lines.append(" " * (_LABEL_WIDTH + 2) + _axis(first, len(lower), columns))
    if not unicode:
        lines = [line.translate(_ASCII) for line in lines]
    return lines


def _shares(solid: Floats, shaded: Floats) -> tuple[Floats, Floats, list[str]]:
    """Two curves as parts of the height of a plot that begins at 0 %, and the labels of its quarters from below."""
    # The first columns tower above the rest, where the troughs are: they may be cut off.
    most = float(np.quantile(shaded, 0.98))
    top = next((4 * step / 100 for step in _STEPS if 4 * step / 100 >= most), 1.0)
    return solid / top, shaded / top, [f"{top * quarter / 4:.0%}" for quarter in range(5)]


def _powers(solid: Floats, shaded: Floats) -> tuple[Floats, Floats, list[str]]:
    """The same for the logarithms of two curves, between half powers of ten."""
    solid, shaded = (np.log10(np.maximum(curve, _LEAST)) for curve in (solid, shaded))
    bottom = np.floor(2 * solid.min()) / 2
    top = max(np.ceil(2 * np.quantile(shaded, 0.98)) / 2, bottom + 0.5)
    labels = [f"{10 ** (bottom + (top - bottom) * quarter / 4):.0e}" for quarter in range(5)]
    return (solid - bottom) / (top - bottom), (shaded - bottom) / (top - bottom), labels


def column_minima(curve: Floats, columns: int) -> Floats:
    """The lowest value of `curve` [n] in each of `columns` equal parts, float64 [columns]; columns <= n."""
    starts = np.arange(columns) * len(curve) // columns
    return np.asarray(np.minimum.reduceat(curve, starts), np.float64)


def _cell(solid: int, shaded: int) -> str:
    """One character, given by how many eighths of it the two curves stand above its lower edge."""
    if solid > 0:
        return _EIGHTHS[min(8, solid)]
    return _GAIN if shaded >= 4 else " "


def _axis(first: int, length: int, columns: int) -> str:
    """The distances at the left, in the middle and at the right of the horizontal axis."""
    left, middle, right = f"{first:,}", f"{first + length // 2:,}", f"{first + length - 1:,}"
    if columns < len(left) + len(middle) + len(right) + 4:
        return left + right.rjust(columns - 1)
    return left + middle.center(columns - 1 - len(right)) + right
