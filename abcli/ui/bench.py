"""What a benchmark found, for a terminal and for a figure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from abcli.bench.plan import ONE_BUCKET, BenchSettings, Contender, Phase
from abcli.bench.report import BenchReport, Row, Timing
from abcli.bench.resident import Memory
from abcli.bench.rounds import Spread
from abcli.bench.workshop import AutoChoice
from abcli.text import counted, gibibytes
from abcli.ui.plots import SpeedCurve, SpeedPanel, SpeedPlot
from abcli.ui.terminal import one_line, printable

# The middle half of the rounds may differ by this share of the median before a remark is made.
LARGE_SPREAD = 0.15
# Less is what a desktop does at rest.
OTHER_CORES = 0.3
# Measured by so much in favour of the other engine, a remembered choice is called into question.
_CLEAR_DIFFERENCE = 1.05
_LABELS = {"raw": "raw llama.cpp, N sequences", "contexts": "contexts", "fused": "fused"}


def plan_text(settings: BenchSettings, threads: int) -> str:
    """What is about to be measured, in a line."""
    parts = [f"{_listed(map(str, settings.buckets))} {'bucket' if settings.buckets == (1,) else 'buckets'}"]
    parts.append(f"{' and '.join(settings.engines)} beside raw llama.cpp")
    if settings.prompt_tokens:
        parts.append(f"prompts of {settings.prompt_tokens:,} tokens")
    if settings.new_tokens:
        parts.append(f"{settings.new_tokens:,} tokens decoded")
    parts.append(f"{settings.rounds} rounds")
    return f"measuring {', '.join(parts)}, {threads} thread{'s' if threads > 1 else ''}"


def show_bench(console: Console, report: BenchReport) -> None:
    """Print the tables, what "auto" takes, what is left out, and how far the numbers can be trusted."""
    settings, where = report.settings, report.circumstances
    devices = _listed(f"{name} ({text})" if text else name for name, text in where.devices)
    head = (
        f"{where.model}: {where.description}, {where.threads} threads, {devices}\n"
        "medians of all rounds, in which all take turns; ±: half the width of the middle half of the rounds\n"
    )
    console.print(Text(printable(head)), soft_wrap=True)
    if any(row.decode for row in report.rows):
        after = f", after {settings.prompt_tokens:,}" if settings.prompt_tokens else ""
        rounds = counted(settings.rounds_of("decode"), "round")
        console.print(Text(f"decoding {settings.new_tokens:,} tokens{after}; {rounds}"))
        console.print(decode_table(report.rows))
    if any(row.shared or row.exact for row in report.rows):
        several = any(row.contender.buckets > 1 for row in report.rows)
        phases: tuple[Phase, ...] = ("shared", "exact") if several else ("exact",)
        rounds = ", ".join(f"{phase}: {counted(settings.rounds_of(phase), 'round')}" for phase in phases)
        console.print(Text(f"\nreading {settings.prompt_tokens:,} tokens of prompt; {rounds}"))
        console.print(prompt_table(report.rows))
    lines = list(remarks(report))
    if lines:
        console.print(Text(printable("\n".join(["", *lines]))), soft_wrap=True)


def decode_table(rows: Sequence[Row]) -> Table:
    """A row for each contender that has decoded: tokens of the answer per second, whatever the number of buckets."""
    table = _table(("tokens/s", "ms/token", "x 1 bucket", "x raw", "memory"))
    for row in rows:
        if row.decode is None:
            continue
        table.add_row(
            str(row.contender.buckets),
            row.contender.kind,
            _speed(row.decode),
            f"{1e3 * Spread.of(row.decode.seconds).median:.2f}",
            _ratio(row.decode.ratio, "1" if row.contender == ONE_BUCKET else ""),
            _ratio(row.decode.overhead),
            memory_text(row.memory),
        )
    return table


def prompt_table(rows: Sequence[Row]) -> Table:
    """A row for each contender that has read a prompt."""
    table = _table(("shared: tokens/s", "x 1 bucket", "exact: tokens/s", "x 1 bucket"))
    for row in rows:
        if row.shared is None and row.exact is None:
            continue
        table.add_row(
            str(row.contender.buckets),
            row.contender.kind,
            _speed(row.shared) if row.shared else "",
            _ratio(row.shared.ratio) if row.shared else "",
            _speed(row.exact) if row.exact else "",
            _ratio(row.exact.ratio, "1" if row.contender == ONE_BUCKET else "") if row.exact else "",
        )
    return table


def memory_text(memory: Memory | None) -> str:
    """Resident memory and that on devices; "~" marks what is only predicted."""
    if memory is None:
        return ""
    if memory.resident is None:
        return f"~{gibibytes(memory.predicted)}"
    device = f" + {gibibytes(memory.device)}" if memory.device else ""
    return f"{gibibytes(memory.resident)}{device}"


def remarks(report: BenchReport) -> Iterator[str]:
    """What the tables do not say, a line each."""
    yield from _memory_lines(report)
    for buckets, choice in report.choices:
        if buckets > 1:
            yield _choice_line(buckets, choice)
            yield from _doubt(report, buckets, choice)
    yield from _left_out_lines(report.left_out)
    for row in report.rows:
        if row.contender.buckets > 1 and row.prompt_note.startswith("exact prefill: "):
            yield f"{row.contender.name}: {one_line(row.prompt_note)}"
    for note in dict.fromkeys(row.turning_note for row in report.rows if row.turning_note):
        yield f"fused: {one_line(note)}"
    if uneven := max(_uneven(report), default=None):
        yield (
            f"the rounds differ much, by up to {uneven[0]:.0%} ({uneven[1]}): something else ran, or the machine slows "
            "down as it warms up"
        )
    if report.other_cores > OTHER_CORES:
        yield (
            f"others kept {report.other_cores:.1f} cores busy meanwhile (programs, or the host of a virtual machine), "
            "which slows threads that wait for each other most: ratios are off, too; "
            "measure again when the machine is quiet"
        )
    if not report.complete:
        yield "not complete: what is shown was measured before it ended"


def speed_figure(report: BenchReport) -> SpeedPlot:
    """What a figure file shows: speeds, and times relative to one bucket, by the number of buckets."""
    panels: list[SpeedPanel] = []
    tokens = report.settings.prompt_tokens
    phases: dict[Phase, str] = {
        "decode": "decoding",
        "shared": f"prompt of {tokens:,} tokens, shared",
        "exact": f"prompt of {tokens:,} tokens, exact",
    }
    for phase, title in phases.items():
        curves = [curve for kind in _LABELS for curve in _curve(report.rows, kind, phase)]
        if any(max(curve.buckets) > 1 for curve in curves) or (curves and not panels):
            panels.append(SpeedPanel(title, tuple(curves)))
    where = report.circumstances
    return SpeedPlot(printable(f"{where.model}, {counted(where.threads, 'thread')}"), tuple(panels))


def _curve(rows: Sequence[Row], kind: str, phase: Phase) -> Iterator[SpeedCurve]:
    """The curve of one kind, if it has any points; one bucket has nobody to share with, and reads as it does."""
    points = []
    for row in rows:
        if row.contender.kind == kind and (timing := _plotted(row, phase)):
            ratio = timing.ratio or Spread(1.0, 1.0, 1.0)
            points.append((row.contender.buckets, timing.speed, ratio))
    if points and (phase != "shared" or len(points) > 1):
        buckets, speeds, ratios = zip(*points, strict=True)
        yield SpeedCurve(kind, _LABELS[kind], buckets, speeds, ratios)


def _plotted(row: Row, phase: Phase) -> Timing | None:
    if phase == "decode":
        return row.decode
    if phase == "shared" and (row.contender.buckets > 1 or row.contender.kind == "raw"):
        return row.shared
    return row.exact


def _memory_lines(report: BenchReport) -> Iterator[str]:
    memories = [row.memory for row in report.rows if row.memory is not None]
    if not memories:
        return
    text = f"memory: with a context of {report.settings.context_size:,} tokens"
    if any(memory.resident is not None for memory in memories):
        text += ", resident, of a process of its own"
    if any(memory.device for memory in memories):
        text += " + on devices"
    if any(memory.resident is None for memory in memories):
        text += "; ~: predicted, since it could not be measured"
    yield text


def _choice_line(buckets: int, choice: AutoChoice) -> str:
    remembered = ", remembered; --remeasure decides anew" if choice.remembered else ""
    return f"{counted(buckets, 'bucket')}: --engine auto takes {choice.engine} ({one_line(choice.reason)}{remembered})"


def _doubt(report: BenchReport, buckets: int, choice: AutoChoice) -> Iterator[str]:
    """A remark if a remembered choice contradicts what was measured now."""
    times: dict[str, float] = {
        row.contender.kind: Spread.of(row.decode.seconds).median
        for row in report.rows
        if row.decode is not None and row.contender.buckets == buckets and row.contender.kind != "raw"
    }
    if not choice.remembered or len(times) < 2:
        return
    other = "fused" if choice.engine == "contexts" else "contexts"
    gain = times[choice.engine] / times[other]
    if gain > _CLEAR_DIFFERENCE:
        yield f"{counted(buckets, 'bucket')}: but now {other} is {gain:.2f} times as fast"


def _left_out_lines(left_out: Sequence[tuple[Contender, str]]) -> Iterator[str]:
    """One line for each reason."""
    for reason in dict.fromkeys(reason for _, reason in left_out):
        names: dict[str, list[str]] = {}
        for contender, other in left_out:
            if other == reason:
                names.setdefault(contender.kind, []).append(str(contender.buckets))
        who = _listed(f"{kind} with {_listed(counts)}" for kind, counts in names.items())
        yield f"left out: {who}: {one_line(reason)}"


def _uneven(report: BenchReport) -> Iterator[tuple[float, str]]:
    """The width of the middle half as a share of the median where it is large, and whose it is."""
    for row in report.rows:
        timings: dict[str, Timing | None] = {
            "decoding": row.decode,
            "shared prompts": row.shared,
            "exact prompts": row.exact,
        }
        for what, timing in timings.items():
            if timing is not None and timing.speed.relative > LARGE_SPREAD:
                yield timing.speed.relative, f"{row.contender.name}, {what}"


def _table(columns: Iterable[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("buckets", justify="right", no_wrap=True)
    table.add_column("engine", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _speed(timing: Timing) -> str:
    """E.g. "27.9 ±2%"; a single round has no spread."""
    speed = timing.speed
    digits = max(0, 3 - len(str(int(speed.median))))
    spread = f" ±{speed.relative / 2:.0%}" if len(timing.seconds) > 1 else ""
    return f"{speed.median:,.{digits}f}{spread}"


def _ratio(ratio: Spread | None, otherwise: str = "") -> str:
    return otherwise if ratio is None else f"{ratio.median:.2f}"


def _listed(items: Iterable[str]) -> str:
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last
