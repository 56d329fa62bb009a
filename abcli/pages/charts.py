"""Charts as plain numbers, which a template writes as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 312
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 12, 56
_TICKS = 5
# Marks that are told apart without colours: a disc, a square, a triangle, a diamond, a triangle on its tip.
_OUTLINES = (
    "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0z",
    "m-3.2 -3.2h6.4v6.4h-6.4z",
    "m0 -4.4l4.4 7.6h-8.8z",
    "m0 -4.8l4.8 4.8l-4.8 4.8l-4.8 -4.8z",
    "m0 4.4l4.4 -7.6h-8.8z",
)


@dataclass(frozen=True)
class Series:
    """One curve, or points that are not joined; `low` and `high`, if given, are its interval.

    Its points are marked if it is `marked` and they are few.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    joined: bool = True
    marked: bool = True


@dataclass(frozen=True)
class Tick:
    """A line of the grid: where it lies in the drawing, and what it stands for."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A point of a curve: where it lies, with its interval, its outline (SVG), and what it says."""

    x: float
    y: float
    low: float
    high: float
    outline: str
    text: str


@dataclass(frozen=True)
class Curve:
    """A series as it is drawn: a path (SVG), the area of its interval, and its points if there are few.

    `sample` is the outline that stands for these in a legend of 24 x 10.
    """

    name: str
    path: str
    area: str
    marks: tuple[Mark, ...]
    sample: str


@dataclass(frozen=True)
class Chart:
    """A drawing of WIDTH x HEIGHT; `summary` says in words what it shows."""

    title: str
    summary: str
    x_label: str
    y_label: str
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    curves: tuple[Curve, ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    top: int = _TOP
    bottom: int = HEIGHT - _BOTTOM


def chart(
    title: str,
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    summary: str = "",
    x_text: Callable[[float], str] = lambda value: f"{value:,.6g}",
    y_text: Callable[[float], str] = lambda value: f"{value:,.6g}",
    log_y: bool = False,
    marks: int = 32,
    x_at: Sequence[float] = (),
) -> Chart:
    """A chart of `series`, which have one point or more; points are marked in curves of at most `marks`.

    `log_y` leaves out what is not above 0. The horizontal axis has ticks at `x_at`, else at round numbers.
    """
    kept = [_positive(one) for one in series] if log_y else list(series)
    left, right = _ends(value for one in kept for value in one.x)
    low, high = _ends(value for one in kept for value in (*one.y, *one.low, *one.high))
    if log_y:
        low, high = math.log10(low), math.log10(high)
    y_ticks = _powers(low, high) if log_y else _steps(low, high)
    x_ticks = x_at or _steps(left, right)
    low, high = min(low, *y_ticks), max(high, *y_ticks)

    def across(value: float) -> float:
        return round(_LEFT + (value - left) / ((right - left) or 1) * (WIDTH - _RIGHT - _LEFT), 1)

    def down(value: float) -> float:
        scaled = math.log10(value) if log_y else value
        return round(HEIGHT - _BOTTOM - (scaled - low) / ((high - low) or 1) * (HEIGHT - _BOTTOM - _TOP), 1)

    def text(value: float) -> str:
        return y_text(10**value if log_y else value)

    return Chart(
        title=title,
        summary=summary or f"{title}: {', '.join(one.name for one in series)}",
        x_label=x_label,
        y_label=y_label,
        x_ticks=tuple(Tick(across(value), x_text(value)) for value in x_ticks if left <= value <= right),
        y_ticks=tuple(Tick(down(10**value if log_y else value), text(value)) for value in y_ticks),
        curves=tuple(
            _curve(one, across, down, x_text, y_text, marks, _OUTLINES[number % len(_OUTLINES)])
            for number, one in enumerate(kept)
        ),
    )


def _curve(
    one: Series,
    across: Callable[[float], float],
    down: Callable[[float], float],
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
    marks: int,
    outline: str,
) -> Curve:
    places = [(across(x), down(y)) for x, y in zip(one.x, one.y, strict=True)]
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in places) if one.joined and places else ""
    area = ""
    if one.low and one.joined:
        upper = [(across(x), down(y)) for x, y in zip(one.x, one.high, strict=True)]
        lower = [(across(x), down(y)) for x, y in zip(one.x, one.low, strict=True)]
        area = "M" + "L".join(f"{x:g} {y:g}" for x, y in [*upper, *reversed(lower)]) + "Z"
    found = []
    if one.marked and (len(places) <= marks or not one.joined):
        for index, (x, y) in enumerate(places):
            low, high = (down(one.low[index]), down(one.high[index])) if one.low else (y, y)
            said = f"{x_text(one.x[index])}: {y_text(one.y[index])}"
            if one.low:
                said += f" ({y_text(one.low[index])} to {y_text(one.high[index])})"
            found.append(Mark(x, y, low, high, f"M{x:g} {y:g}{outline}", f"{one.name}, {said}"))
    return Curve(one.name, path, area, tuple(found), f"M12 5{outline}" if found else "")


def _positive(one: Series) -> Series:
    kept = [(x, y) for x, y in zip(one.x, one.y, strict=True) if y > 0]
    return Series(one.name, [x for x, _ in kept], [y for _, y in kept], joined=one.joined)


def _ends(values: Iterable[float]) -> tuple[float, float]:
    found = [value for value in values if math.isfinite(value)]
    return (min(found), max(found)) if found else (1.0, 1.0)


def _steps(low: float, high: float) -> list[float]:
    """Round numbers around `low` to `high`, about as many as `_TICKS`."""
    span = (high - low) or abs(high) or 1.0
    rough = span / _TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def _powers(low: float, high: float) -> list[float]:
    """The whole powers of ten (as exponents) around `low` to `high`."""
    return [float(power) for power in range(math.floor(low), max(math.ceil(high), math.floor(low) + 1) + 1)]
