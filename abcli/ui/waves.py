"""Waves of bases, and the attention measured beside them, for a terminal."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from abcli.rope.waves import Waves
from abcli.text import counted
from abcli.trace.measuring import TOGETHER, MeasuredBase, Measurement, Ripple
from abcli.ui.terminal import printable
from abcli.ui.terminal_plot import floor_plot

_DISTANCES = (1, 10, 30, 100, 300, 1000, 3000, 10000)


def wave_names(result: Waves) -> list[str]:
    """Each base as a multiple of the native one, as in "0.5" or "1 (native)"."""
    multiples = [f"{base / result.native_base:.4g}" for base in result.bases]
    return [
        f"{multiple} (native)" if base == result.native_base else multiple
        for base, multiple in zip(result.bases, multiples, strict=True)
    ]


def wave_plot(result: Waves, width: int, *, unicode: bool) -> list[str]:
    """Lines of at most `width` characters: how low the native wave and the envelope of all get."""
    solid, shaded = ("█", "░") if unicode else ("#", ".")
    legend = f"lowest value in each column: {solid} native base alone, {shaded} added by the buckets"
    lower = np.minimum(result.native, result.envelope)
    return [legend, *floor_plot(lower, result.envelope, width, unicode=unicode)]


def show_measurement(console: Console, result: Waves, found: Measurement, *, plot: bool, unicode: bool) -> None:
    """Print what a token gets at a few distances under each base, and how that goes with the waves; a plot if asked."""
    heads = counted(len(found.heads), "head")
    head = (
        f"{printable(result.header.path.name)}: attention that a token gets at each distance, under the {heads} that "
        f"look back furthest;\n{counted(found.rows, 'row')} of each of {counted(found.texts, 'text')} of "
        f"{result.context:,} tokens"
    )
    console.print(Text(head), soft_wrap=True)
    console.print(_attention_table(result, found))
    about = (
        "\nhow ripples of attention (rows) correlate with those of each wave, ± standard error over the texts, and by "
        f"chance;\ntroughs of a base's own wave with one of its attention at most {TOGETHER} tokens away, and by chance"
    )
    console.print(Text(about), soft_wrap=True)
    console.print(_ripple_table(result, found))
    if plot:
        lines = ["", *_plot(result, found, console.width, unicode=unicode)]
        console.print(Text("\n".join(lines)), soft_wrap=True)


def _attention_table(result: Waves, found: Measurement) -> Table:
    length = len(found.bases[0].mean)
    distances = [distance for distance in _DISTANCES if distance <= length]
    table = _table("multiple", "", right=[f"{distance:,}" for distance in distances])
    for name, base in zip(wave_names(result), found.bases, strict=True):
        quartiles = (("lower quartile", base.lower), ("median", base.median), ("upper quartile", base.upper))
        for index, (what, values) in enumerate((("mean", base.mean), *quartiles)):
            table.add_row("" if index else name, what, *(f"{values[distance - 1]:.2g}" for distance in distances))
    return table


def _ripple_table(result: Waves, found: Measurement) -> Table:
    names = wave_names(result)
    table = _table("attention under", right=[*(f"wave of {name.split()[0]}" for name in names), "troughs together"])
    for name, base in zip(names, found.bases, strict=True):
        table.add_row(name, *map(_ripple, base.ripples), _troughs(base))
    return table


def _ripple(ripple: Ripple) -> str:
    error = "" if ripple.error is None else f" ±{ripple.error:.2f}"
    return f"{ripple.correlation:+.2f}{error} ({ripple.chance:.2f})"


def _troughs(base: MeasuredBase) -> str:
    found = base.troughs
    return f"{found.together} of {found.count} ({found.by_chance:.0%})"


def _plot(result: Waves, found: Measurement, width: int, *, unicode: bool) -> list[str]:
    """Theory above measurement: the waves, and the median attention at the same distances."""
    medians = np.stack([base.median for base in found.bases])
    length = medians.shape[1]
    # The native base, or the nearest to it.
    native = int(np.argmin(np.abs(np.log(np.array(result.bases) / result.native_base))))
    solid, shaded = ("█", "░") if unicode else ("#", ".")
    waves = result.waves[:, 1 : 1 + length]
    lines = [
        f"waves, lowest value in each column: {solid} {wave_names(result)[native]}, {shaded} the highest of all bases"
    ]
    lines += floor_plot(waves[native], waves.max(axis=0), width, first=1, unicode=unicode)
    lines += ["", "attention (median), in the same way"]
    return lines + floor_plot(medians[native], medians.max(axis=0), width, first=1, logarithmic=True, unicode=unicode)


def _table(*left: str, right: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in left:
        table.add_column(column)
    for column in right:
        table.add_column(column, justify="right")
    return table
