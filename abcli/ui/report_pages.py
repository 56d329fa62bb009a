"""Evaluations, calibrations and benchmarks as pages: their tables, and charts of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from abcli.bench.report import BenchReport
from abcli.evals.report import EvaluationReport
from abcli.evals.statistics import LengthSummary
from abcli.pages.charts import Chart, Series, chart
from abcli.pages.rendering import render
from abcli.text import counted, gibibytes
from abcli.ui.bench import decode_table, prompt_table, remarks, speed_figure
from abcli.ui.evaluation import depth_figure, difference_table, heading, sentences, value_table
from abcli.ui.plots import DepthCurve


def evaluation_page(report: EvaluationReport, lengths: Sequence[LengthSummary]) -> str:
    """What an evaluation, or a calibration's, found: tables, quality by depth, and quality against cost."""
    panels = depth_figure(report.task, lengths).panels
    sections = []
    for found, panel in zip(lengths, panels, strict=True):
        title, explanation = heading(report.task, found).split("\n")
        charts = [
            _by_depth("NLL of the answer by depth", panel.depths, panel.likelihoods, "nats per token"),
            _by_depth("Accuracy by depth", panel.depths, panel.accuracies, "exact answers", share=True),
        ]
        sections.append(_section(title, [explanation], value_table(found), charts))
        sections.append(_cost_section(report, found))
        if len(found.summaries) > 1:
            words = [f"Paired differences to {found.baseline}, with 95 % intervals.", *sentences(found)]
            sections.append(
                _section(f"Differences, {found.length:,} tokens", words, difference_table(found, wide=True))
            )
    facts = [("model", report.model.name), ("task", report.task), ("seed", str(report.seed))]
    return render(
        "report.html", title=f"Evaluation: {report.task}, {report.model.name}", facts=facts, sections=sections
    )


def bench_page(report: BenchReport) -> str:
    """What a benchmark found: tables, speeds and memory by the number of buckets."""
    where = report.circumstances
    sections = []
    for panel in speed_figure(report).panels:
        series = [
            Series(
                curve.label,
                curve.buckets,
                [speed.median for speed in curve.speeds],
                [speed.low for speed in curve.speeds],
                [speed.high for speed in curve.speeds],
            )
            for curve in panel.curves
        ]
        counts = sorted({float(count) for curve in panel.curves for count in curve.buckets})
        drawn = chart(f"Tokens per second, {panel.title}", series, "buckets", "tokens/s", x_at=counts)
        sections.append(_section(panel.title.capitalize(), [], None, [drawn]))
    for title, table in (("Decoding, as a table", decode_table), ("Prompts, as a table", prompt_table)):
        found = table(report.rows)
        if found.row_count:
            sections.append(_section(title, [], found))
    memory = _memory_chart(report)
    if memory is not None:
        sections.append(_section("Speed against memory", [], None, [memory]))
    said = list(remarks(report))
    if said:
        sections.append(_section("Remarks", said, None))
    facts = [
        ("model", where.model),
        ("", where.description),
        ("threads", str(where.threads)),
        ("devices", ", ".join(name for name, _text in where.devices)),
    ]
    facts = [(name or "is", value) for name, value in facts]
    return render("report.html", title=f"Benchmark: {where.model}", facts=facts, sections=sections)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (cost, loss), those of which no other is at most as dear and better, or cheaper and as good; by cost."""
    front: list[tuple[float, float]] = []
    for cost, loss in sorted(points):
        if not front or loss < front[-1][1]:
            front.append((cost, loss))
    return front


def _section(title: str, lines: Sequence[str], table: Table | None, charts: Sequence[Chart] = ()) -> dict[str, Any]:
    columns, rows = _cells(table) if table is not None else ([], [])
    return {"title": title, "lines": lines, "columns": columns, "rows": rows, "charts": charts}


def _cells(table: Table) -> tuple[list[str], list[tuple[str, ...]]]:
    """The texts of a table for a terminal."""
    columns = [str(column.header) for column in table.columns]
    rows = zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)
    return columns, list(rows)


def _by_depth(
    title: str, depths: Sequence[float], curves: Sequence[DepthCurve], label: str, *, share: bool = False
) -> Chart:
    series = [Series(curve.label, depths, curve.values, curve.low, curve.high) for curve in curves]
    text = "{:.0%}".format if share else "{:.3g}".format
    return chart(title, series, "depth in the context", label, y_text=text)


def _cost_section(report: EvaluationReport, found: LengthSummary) -> dict[str, Any]:
    """Quality against what it costs: tokens/s and memory where they were measured, else buckets to decode."""
    title, costs = f"Quality against cost, {found.length:,} tokens", report.costs
    buckets = {one.name: len(one.bases) for one in report.configurations}
    if not costs:
        label = "buckets to decode for each token"
        return _section(title, [], None, [_pareto("Quality against buckets", found, buckets, label, whole=True)])
    sizes, unit = _in_bytes({name: cost.memory for name, cost in costs.items()})
    charts = [
        _pareto(
            "Quality against speed",
            found,
            {name: cost.tokens_per_second for name, cost in costs.items()},
            "tokens/s",
            more_is_better=True,
        ),
        _pareto("Quality against memory", found, sizes, f"memory, {unit}"),
    ]
    table = Table()
    for column in ("configuration", "buckets", "tokens/s", "middle half of the rounds", "memory"):
        table.add_column(column)
    for name, cost in costs.items():
        between = f"{cost.low:.3g} to {cost.high:.3g}"
        table.add_row(name, str(buckets[name]), f"{cost.tokens_per_second:.3g}", between, gibibytes(cost.memory))
    said = "Tokens/s of an answer after such a prompt, measured in turns; memory of model and buckets, as predicted."
    return _section(title, [said], table, charts)


def _pareto(
    title: str,
    found: LengthSummary,
    costs: Mapping[str, float],
    label: str,
    *,
    more_is_better: bool = False,
    whole: bool = False,
) -> Chart:
    """A point for each configuration, and a line through those that no other beats in both; costs may be `whole`."""
    # In the order of the curves by depth, so that each has the colour that it has there.
    summaries = sorted(found.summaries, key=lambda one: one.configuration != found.baseline)
    points = [(float(costs[one.configuration]), one.measures.nll) for one in summaries]
    sign = -1 if more_is_better else 1
    front = pareto_front([(sign * cost, nll.value) for cost, nll in points])
    series = [
        Series(one.configuration, [cost], [nll.value], [nll.low], [nll.high], joined=False)
        for one, (cost, nll) in zip(summaries, points, strict=True)
    ]
    if len(front) > 1:
        costs_of, losses = [sign * cost for cost, _ in front], [loss for _, loss in front]
        series.append(Series("not beaten in both", costs_of, losses, marked=False))
    ticks = sorted({cost for cost, _ in points}) if whole else ()
    return chart(
        title, series, label, "NLL, nats per token", x_text="{:.3g}".format, y_text="{:.3g}".format, x_at=ticks
    )


def _memory_chart(report: BenchReport) -> Chart | None:
    measured = {
        f"{row.contender.kind}, {counted(row.contender.buckets, 'bucket')}": (row.decode.speed, row.memory)
        for row in report.rows
        if row.decode is not None and row.memory is not None
    }
    if len(measured) < 2:
        return None
    sizes, unit = _in_bytes(
        {
            name: memory.predicted if memory.resident is None else memory.resident + (memory.device or 0)
            for name, (_speed, memory) in measured.items()
        }
    )
    series = [
        Series(name, [sizes[name]], [speed.median], [speed.low], [speed.high], joined=False)
        for name, (speed, _memory) in measured.items()
    ]
    return chart("Tokens per second against memory", series, f"memory, {unit}", "tokens/s", x_text="{:,.3g}".format)


def _in_bytes(sizes: Mapping[str, int]) -> tuple[dict[str, float], str]:
    """Sizes in the unit that suits the largest, and that unit."""
    power, unit = (30, "GiB") if max(sizes.values()) >= 2**30 else (20, "MiB")
    return {name: size / 2**power for name, size in sizes.items()}, unit
