"""Figures for files; matplotlib is an optional dependency and imported only when one is drawn."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from abcli.bench.rounds import Spread
from abcli.errors import UsageError
from abcli.ui.terminal_plot import column_minima

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
ImageFormat = Literal["png", "svg"]

_NATIVE_COLOUR = "#222222"
_ENVELOPE_COLOUR = "#e66100"
_SPEED_STYLES = {"raw": (_NATIVE_COLOUR, "s--"), "contexts": ("#31688e", "o-"), "fused": (_ENVELOPE_COLOUR, "^-")}
_BINS = 160
_ZOOM_RADIUS = 100


@dataclass(frozen=True)
class WavePlot:
    """What a figure of waves shows, as shares of the bound at distance 0.

    `waves` [others, n] with a label each are the buckets other than the native base, whose wave is `native` [n].
    """

    title: str
    labels: tuple[str, ...]
    waves: Floats
    native: Floats
    envelope: Floats


@dataclass(frozen=True)
class AttentionPlot:
    """What a figure of measured attention shows, from distance 1 on: of each base, named in `labels`, the wave and the
    median and quartiles of the attention, [bases, distances] each.
    """

    title: str
    labels: tuple[str, ...]
    waves: Floats
    median: Floats
    lower: Floats
    upper: Floats


@dataclass(frozen=True)
class DepthCurve:
    """A measure of one configuration at each depth with the limits of its interval, [depths] each."""

    label: str
    values: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class DepthPanel:
    """One length: its depths, and the curves of all configurations, the baseline's first."""

    title: str
    depths: tuple[float, ...]
    likelihoods: tuple[DepthCurve, ...]
    """Negative, in nats per token."""
    accuracies: tuple[DepthCurve, ...]
    """Shares."""


@dataclass(frozen=True)
class DepthPlot:
    """What a figure of an evaluation shows; the panels, one or more, have the same configurations."""

    title: str
    panels: tuple[DepthPanel, ...]


@dataclass(frozen=True)
class SpeedCurve:
    """One way of decoding: its name in the palette, and a point with the middle half of its rounds for each number.

    `speeds` are tokens per second, `ratios` the time of a token relative to one bucket.
    """

    kind: str
    label: str
    buckets: tuple[int, ...]
    speeds: tuple[Spread, ...]
    ratios: tuple[Spread, ...]


@dataclass(frozen=True)
class SpeedPanel:
    """What is timed, and the curves of all that took part, one or more."""

    title: str
    curves: tuple[SpeedCurve, ...]


@dataclass(frozen=True)
class SpeedPlot:
    """What a figure of a benchmark shows; there is at least one panel."""

    title: str
    panels: tuple[SpeedPanel, ...]


def require_matplotlib(flag: str) -> None:
    """Raise UsageError, which says how to install it, if matplotlib is missing; `flag` is what needs it."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError(f"{flag} needs matplotlib, which is not installed", "pip install 'abcli[plot]'") from error


def wave_image(plot: WavePlot, image_format: ImageFormat) -> bytes:
    """The figure as a file's content: how low the waves get over the context, and the deepest native trough."""
    # Not pyplot: it would choose a window system and keep every figure alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(plot.title, fontsize="large")
    overview, zoom = figure.subplots(2, 1)
    _draw_floors(overview, plot)
    _draw_trough(zoom, plot)
    _draw_legend(figure, overview)
    return _content(figure, image_format)


def attention_image(plot: AttentionPlot, image_format: ImageFormat) -> bytes:
    """The figure as a file's content: the waves, and below them what was measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 7), layout="constrained")
    figure.suptitle(_plain(plot.title), fontsize="large")
    above, below = figure.subplots(2, 1, sharex=True)
    distances = np.arange(1, 1 + plot.median.shape[1])
    for index, (label, colour) in enumerate(zip(plot.labels, _colours(len(plot.labels)), strict=True)):
        above.plot(distances, plot.waves[index], color=colour, linewidth=0.9, label=label)
        below.plot(distances, plot.median[index], color=colour, linewidth=0.9)
        below.fill_between(distances, plot.lower[index], plot.upper[index], color=colour, alpha=0.15, linewidth=0)
    above.set_ylabel("A(D) / A(0)")
    above.legend(title="base")
    below.set_ylabel("attention: median and quartiles")
    below.set_yscale("log", nonpositive="clip")
    below.set_xlabel("distance D (tokens)")
    for axes in (above, below):
        axes.grid(alpha=0.25)
    return _content(figure, image_format)


def depth_image(plot: DepthPlot, image_format: ImageFormat) -> bytes:
    """The figure as a file's content: likelihood above accuracy by depth, a column for each length."""
    from matplotlib.figure import Figure

    columns = len(plot.panels)
    figure = Figure(figsize=(4 + 3 * columns, 7), layout="constrained")
    figure.suptitle(_plain(plot.title), fontsize="large")
    axes = figure.subplots(2, columns, sharex="col", sharey="row", squeeze=False)
    for column, panel in enumerate(plot.panels):
        _draw_curves(axes[0, column], panel.depths, panel.likelihoods)
        _draw_curves(axes[1, column], panel.depths, panel.accuracies)
        axes[0, column].set_title(panel.title, fontsize="medium")
        axes[1, column].set_xlabel("depth in the context")
        axes[1, column].yaxis.set_major_formatter("{x:.0%}")
    # Shared by a row, so set when all of it is drawn: an axis with a limit no longer grows.
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylim(bottom=0)
    axes[0, 0].set_ylabel("NLL of the answer (nats per token)")
    axes[1, 0].set_ylabel("accuracy")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, title="configuration\n(bars: 95 % intervals)", loc="outside right upper")
    return _content(figure, image_format)


def speed_image(plot: SpeedPlot, image_format: ImageFormat) -> bytes:
    """The figure as a file's content: speed above time relative to one bucket, by buckets, a column for each panel."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    columns = len(plot.panels)
    figure = Figure(figsize=(3 + 3 * columns, 7), layout="constrained")
    figure.suptitle(_plain(plot.title), fontsize="large")
    axes = figure.subplots(2, columns, sharex="col", squeeze=False)
    for column, panel in enumerate(plot.panels):
        speeds, ratios = axes[:, column]
        most = max(max(curve.buckets) for curve in panel.curves)
        ratios.plot([1, most], [1, most], ":", color="#777777", linewidth=1.2, label="N times one bucket")
        for curve in panel.curves:
            _draw_speeds(speeds, curve, curve.speeds)
            _draw_speeds(ratios, curve, curve.ratios)
        speeds.set_title(_plain(panel.title), fontsize="medium")
        ratios.set_xlabel("buckets")
        ratios.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in (speeds, ratios):
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.25)
    axes[0, 0].set_ylabel("tokens per second")
    axes[1, 0].set_ylabel("time of a token / that of one bucket")
    # A panel may lack a curve that another has.
    named = {
        label: handle
        for axis in (*axes[0], *axes[1])
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        list(named.values()), list(named), title="bars: middle half\nof the rounds", loc="outside right upper"
    )
    return _content(figure, image_format)


def _draw_speeds(axes: Axes, curve: SpeedCurve, points: tuple[Spread, ...]) -> None:
    colour, style = _SPEED_STYLES[curve.kind]
    values = [point.median for point in points]
    axes.plot(curve.buckets, values, style, color=colour, markersize=5, linewidth=1.6, label=curve.label)
    low, high = [point.low for point in points], [point.high for point in points]
    axes.vlines(curve.buckets, low, high, color=colour, alpha=0.4, linewidth=2.5)


def _draw_curves(axes: Axes, depths: tuple[float, ...], curves: tuple[DepthCurve, ...]) -> None:
    """All curves, side by side by so little that their bars can be told apart."""
    step = 0.12 / max(1, len(depths) - 1) / max(1, len(curves) - 1)
    colours = [_NATIVE_COLOUR, *_colours(len(curves) - 1)]
    for number, (curve, colour) in enumerate(zip(curves, colours, strict=True)):
        at = np.array(depths) + (number - (len(curves) - 1) / 2) * step
        axes.plot(at, curve.values, "o-", color=colour, markersize=4, linewidth=1.4, label=_plain(curve.label))
        axes.vlines(at, curve.low, curve.high, color=colour, alpha=0.4, linewidth=1.2)
    axes.grid(alpha=0.25)


def _plain(text: str) -> str:
    """`text` as matplotlib shows it unchanged: no formula between dollars, no leading "_" that hides it."""
    shown = text.replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown


def _content(figure: Figure, image_format: ImageFormat) -> bytes:
    buffer = io.BytesIO()
    # Without a date, the same data gives the same file.
    metadata = {"Date": None} if image_format == "svg" else None
    figure.savefig(buffer, format=image_format, dpi=100, metadata=metadata)
    return _indexed(buffer) if image_format == "png" else buffer.getvalue()


def _indexed(buffer: io.BytesIO) -> bytes:
    """A PNG with a palette of 128 colours: a third of the size, and no difference to the eye."""
    # matplotlib itself depends on Pillow.
    from PIL import Image

    smaller = io.BytesIO()
    with Image.open(buffer) as image:
        image.convert("RGB").quantize(128).save(smaller, format="png", optimize=True)
    return smaller.getvalue()


def _draw_floors(axes: Axes, plot: WavePlot) -> None:
    """The lowest value of each wave in each of some 160 parts of the context: the waves themselves are too dense."""
    length = len(plot.native)
    bins = min(_BINS, length)
    middles = (np.arange(bins) + 0.5) * length / bins
    native, envelope = column_minima(plot.native, bins), column_minima(plot.envelope, bins)
    axes.fill_between(middles, native, envelope, color=_ENVELOPE_COLOUR, alpha=0.15, linewidth=0)
    for label, wave, colour in zip(plot.labels, plot.waves, _colours(len(plot.labels)), strict=True):
        axes.plot(middles, column_minima(wave, bins), color=colour, linewidth=0.8, label=label)
    axes.plot(middles, native, color=_NATIVE_COLOUR, linewidth=1.3, label="1 (native base)")
    axes.plot(middles, envelope, color=_ENVELOPE_COLOUR, linewidth=2.2, label="envelope of all")
    _mark_lowest(axes, plot.native, _NATIVE_COLOUR)
    _mark_lowest(axes, plot.envelope, _ENVELOPE_COLOUR)
    # The first tokens tower above the rest, where the troughs are.
    axes.set_ylim(0, 1.1 * float(np.quantile(envelope, 0.98)))
    axes.set_xlim(0, length - 1)
    axes.set_title(f"Lowest value in every {max(1, round(length / bins))} tokens", fontsize="medium")
    _label(axes)


def _mark_lowest(axes: Axes, wave: Floats, colour: str) -> None:
    at = int(wave.argmin())
    axes.plot(at, wave[at], "o", color=colour, zorder=4)
    text = f"{wave[at]:.1%} at {at:,}"
    box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
    axes.annotate(
        text, (at, wave[at]), (-8, -16), textcoords="offset points", ha="right", color=colour, bbox=box, zorder=5
    )


def _draw_trough(axes: Axes, plot: WavePlot) -> None:
    """The waves themselves around the deepest trough of the native base."""
    at = int(plot.native.argmin())
    first, last = max(0, at - _ZOOM_RADIUS), min(len(plot.native), at + _ZOOM_RADIUS + 1)
    distances = np.arange(first, last)
    axes.plot(distances, plot.envelope[first:last], color=_ENVELOPE_COLOUR, linewidth=4, alpha=0.5)
    for wave, colour in zip(plot.waves, _colours(len(plot.labels)), strict=True):
        axes.plot(distances, wave[first:last], color=colour, linewidth=0.9)
    axes.plot(distances, plot.native[first:last], color=_NATIVE_COLOUR, linewidth=1.6)
    axes.plot(at, plot.native[at], "o", color=_NATIVE_COLOUR)
    axes.set_ylim(bottom=0)
    axes.set_xlim(first, max(first + 1, last - 1))
    axes.set_title("Around the deepest trough of the native base", fontsize="medium")
    _label(axes)


def _label(axes: Axes) -> None:
    axes.set_xlabel("distance D (tokens)")
    axes.set_ylabel("A(D) / A(0)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:.0%}")
    axes.grid(alpha=0.25)


def _draw_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    # Drawn last, to be on top, the two that matter are named first.
    handles, labels = handles[:-3:-1] + handles[:-2], labels[:-3:-1] + labels[:-2]
    figure.legend(handles, labels, title="base, as multiple\nof the native one", loc="outside right center")


def _colours(count: int) -> list[tuple[float, float, float, float]]:
    """One colour for each of the buckets, from blue to green."""
    from matplotlib import colormaps

    return [tuple(colour) for colour in colormaps["viridis"](np.linspace(0.1, 0.85, count))]
