"""What an evaluation found, for a terminal: tables, plain sentences, and bars by depth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from abcli.evals.statistics import Estimate, LengthSummary, Measures, Summary
from abcli.text import counted
from abcli.ui.plots import DepthCurve, DepthPanel, DepthPlot
from abcli.ui.terminal import printable

# From here on the intervals of the differences fit into a line together with the differences.
_WIDE = 108
_WIDER_WITH_RANKS = 24
_PARTS = "▏▎▍▌▋▊▉█"
_DEPTH_WIDTH = 6
_VALUE_WIDTH = 7
_MAX_NAME = 24
MIN_BAR = 10
MAX_BAR = 60


def show_evaluation(
    console: Console, task: str, lengths: Sequence[LengthSummary], *, bars: bool, unicode: bool
) -> None:
    """Print tables and sentences for each length on `console`, and bars by depth if `bars`."""
    for index, found in enumerate(lengths):
        if index:
            console.print()
        console.print(Text(heading(task, found)), soft_wrap=True)
        console.print(value_table(found))
        if len(found.summaries) > 1:
            ranked = found.summaries[0].measures.ranked_first is not None
            wide = console.width >= _WIDE + (_WIDER_WITH_RANKS if ranked else 0)
            console.print(Text(f"\ndifference to {printable(found.baseline)}, paired, 95 % interval"), soft_wrap=True)
            console.print(difference_table(found, wide=wide))
            console.print(Text("\n".join(sentences(found))), soft_wrap=True)
        if bars:
            lines = ["", "NLL of the answer by depth", *depth_bars(found, console.width, unicode=unicode)]
            console.print(Text("\n".join(lines)), soft_wrap=True)


def heading(task: str, found: LengthSummary) -> str:
    """What was asked, in a line, and what the numbers below it are, in another."""
    first = (
        f"{task}, {found.length:,} tokens: {counted(found.questions, 'question')} on "
        f"{counted(found.groups, 'context')}, {counted(len(found.depths), 'depth')}"
    )
    return f"{first}\naccuracy in %, NLL of the answer in nats per token, ± standard error"


def value_table(found: LengthSummary) -> Table:
    """A row for each configuration."""
    ranked = found.summaries[0].measures.ranked_first is not None
    table = _table(("accuracy", *(("ranked 1st",) if ranked else ()), "NLL", "worst depth: NLL", "gap"))
    for summary in found.summaries:
        measures = summary.measures
        cells = [_share(measures.accuracy)]
        if measures.ranked_first is not None:
            cells.append(_share(measures.ranked_first))
        worst = f"{_nll(measures.worst_nll)} at {summary.worst_nll_depth:.2f}"
        cells += [_nll(measures.nll), worst, _nll(measures.nll_gap)]
        table.add_row(printable(summary.configuration), *cells)
    return table


def difference_table(found: LengthSummary, *, wide: bool) -> Table:
    """A row for each configuration but the baseline; the differences themselves only if `wide`, else intervals."""
    ranked = found.summaries[0].measures.ranked_first is not None
    table = _table(("accuracy", *(("ranked 1st",) if ranked else ()), "NLL", "worst depth", "gap"))
    for summary in found.summaries:
        difference = summary.difference
        if difference is None:
            continue
        shares = [difference.accuracy] + ([difference.ranked_first] if difference.ranked_first is not None else [])
        cells = [_interval(share, 100, 1, wide) for share in shares]
        nlls = (difference.nll, difference.worst_nll, difference.nll_gap)
        cells += [_interval(nll, 1, 3, wide) for nll in nlls]
        table.add_row(printable(summary.configuration), *cells)
    return table


def sentences(found: LengthSummary) -> list[str]:
    """In words, which configurations differ clearly from the baseline: whose interval excludes 0."""
    baseline = printable(found.baseline)
    if not found.reliable:
        contexts = counted(found.groups, "context")
        return [f"{contexts}: too few for intervals to mean much; ask more questions to tell differences"]
    lines = []
    for summary in found.summaries:
        parts = list(_clear_parts(summary))
        if parts:
            lines.append(f"{printable(summary.configuration)} against {baseline}: {', '.join(parts)}")
        elif summary.difference is not None:
            lines.append(f"{printable(summary.configuration)} against {baseline}: no clear difference")
    return lines


def depth_bars(found: LengthSummary, width: int, *, unicode: bool = True) -> list[str]:
    """For each depth and configuration a bar as long as its NLL, in lines of at most `width` characters.

    A `width` too small for names and values is exceeded. `unicode` False keeps the bars to ASCII.
    """
    names = [_shortened(printable(summary.configuration)) for summary in found.summaries]
    name_width = max(map(len, names))
    room = min(max(width - _DEPTH_WIDTH - name_width - _VALUE_WIDTH - 4, MIN_BAR), MAX_BAR)
    curves = [[point.value for point in summary.measures.nll_by_depth] for summary in found.summaries]
    top = max(max(curve) for curve in curves)
    lines = []
    for index, depth in enumerate(found.depths):
        for row, (name, curve) in enumerate(zip(names, curves, strict=True)):
            label = f"{depth:.2f}" if row == 0 else ""
            bar = _bar(curve[index] / top if top > 0 else 0.0, room, unicode=unicode)
            lines.append(
                f"{label:<{_DEPTH_WIDTH}}{name:<{name_width}}{curve[index]:>{_VALUE_WIDTH}.3f}  {bar}".rstrip()
            )
    return lines


def depth_figure(title: str, lengths: Sequence[LengthSummary]) -> DepthPlot:
    """What a figure file shows of all lengths; the baseline comes first in it."""
    panels = []
    for found in lengths:
        ordered = sorted(found.summaries, key=lambda summary: summary.configuration != found.baseline)
        panels.append(
            DepthPanel(
                f"{found.length:,} tokens, {counted(found.questions, 'question')}",
                found.depths,
                tuple(_curve(summary.configuration, summary.measures.nll_by_depth) for summary in ordered),
                tuple(_curve(summary.configuration, summary.measures.accuracy_by_depth) for summary in ordered),
            )
        )
    return DepthPlot(printable(title), tuple(panels))


def _curve(name: str, points: Sequence[Estimate]) -> DepthCurve:
    return DepthCurve(
        _shortened(printable(name)),
        tuple(point.value for point in points),
        tuple(point.low for point in points),
        tuple(point.high for point in points),
    )


def _bar(share: float, room: int, *, unicode: bool) -> str:
    """A bar over `share` of `room` characters."""
    if not unicode:
        return "#" * round(share * room)
    whole, part = divmod(round(share * room * len(_PARTS)), len(_PARTS))
    return _PARTS[-1] * whole + (_PARTS[part - 1] if part else "")


def _table(columns: Iterable[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("configuration", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _share(estimate: Estimate) -> str:
    return f"{100 * estimate.value:.1f} ±{100 * estimate.error:.1f}"


def _nll(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ±{estimate.error:.3f}"


def _interval(estimate: Estimate, factor: float, decimals: int, wide: bool) -> str:
    def signed(value: float) -> str:
        # Without the zero added, -0.0 would keep its sign.
        return f"{round(factor * value, decimals) + 0.0:+.{decimals}f}"

    interval = f"{signed(estimate.low)}..{signed(estimate.high)}"
    return f"{signed(estimate.value)} ({interval})" if wide else interval


def _clear_parts(summary: Summary) -> Iterable[str]:
    """What differs clearly, as in "accuracy higher by 3.0 points"."""
    difference: Measures[Estimate] | None = summary.difference
    if difference is None:
        return
    named: tuple[tuple[str, Estimate | None, Callable[[float], str]], ...] = (
        ("accuracy", difference.accuracy, _points),
        ("share ranked first", difference.ranked_first, _points),
        ("NLL", difference.nll, _three_decimals),
        ("NLL at the worst depth", difference.worst_nll, _three_decimals),
        ("gap between depths", difference.nll_gap, _three_decimals),
    )
    for name, estimate, text in named:
        if estimate is not None and estimate.clear:
            yield f"{name} {'higher' if estimate.low > 0 else 'lower'} by {text(abs(estimate.value))}"


def _points(share: float) -> str:
    return f"{100 * share:.1f} points"


def _three_decimals(value: float) -> str:
    return f"{value:.3f}"


def _shortened(name: str) -> str:
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 3]}..."
