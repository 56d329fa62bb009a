"""What a benchmark looks like: tables, remarks and figures."""

from __future__ import annotations

import io
from dataclasses import replace
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from abcli.bench.measure import Findings, benchmark
from abcli.bench.plan import BenchSettings, Contender
from abcli.bench.report import BenchReport, Row, Timing
from abcli.bench.resident import Memory
from abcli.bench.workshop import AutoChoice
from abcli.ui.bench import memory_text, plan_text, remarks, show_bench, speed_figure
from abcli.ui.plots import speed_image
from tests.bench.standins import SETTINGS, FakeWorkshop, report_of

Image = pytest.importorskip("PIL.Image")


def report(settings: BenchSettings = SETTINGS, workshop: FakeWorkshop | None = None) -> BenchReport:
    """What contenders that take a known time give."""
    findings = Findings()
    workshop = workshop or FakeWorkshop(settings)
    benchmark(settings, workshop, findings, lambda *_: None, workshop.time)
    return report_of(findings, settings)


def shown(found: BenchReport, width: int = 80) -> list[str]:
    """What is printed, line by line."""
    stream = io.StringIO()
    show_bench(Console(file=stream, width=width, highlight=False, emoji=False), found)
    return stream.getvalue().splitlines()


def rows(lines: list[str], title: str) -> list[list[str]]:
    """The cells of the table under the line that begins with `title`, without its head."""
    begin = next(number for number, line in enumerate(lines) if line.startswith(title))
    assert lines[begin + 1].startswith("buckets  engine")
    found = []
    for line in lines[begin + 2 :]:
        if not line.strip():
            break
        found.append(line.split())
    return found


def test_the_tables_have_the_numbers() -> None:
    lines = shown(report())
    assert max(map(len, lines[2:])) <= 200
    assert lines[0] == "model.gguf: llama 1M, 2 threads, CPU (a processor)"
    table = rows(lines, "decoding 4 tokens, after 10; 4 rounds")
    assert len(table) == 9
    assert table[1] == ["1", "contexts", "0.67", "±0%", "1500.00", "1", "1.50", "1000", "B"][:7] + table[1][7:]
    assert table[-1][:7] == ["3", "fused", "0.40", "±0%", "2500.00", "1.67", "1.25"]
    prompts = rows(lines, "reading 10 tokens of prompt; shared: 2 rounds, exact: 1 round")
    # A single round has no spread.
    assert prompts[0] == ["1", "raw", "10.0", "1.00"]
    assert prompts[1] == ["1", "contexts", "10.0", "1"]
    assert prompts[-1] == ["3", "fused", "10.0", "±0%", "1.00", "3.33", "3.00"]
    assert "3 buckets: --engine auto takes fused (it is faster)" in lines
    assert not any("not complete" in line or "differ" in line for line in lines)


def test_one_bucket_alone_and_decoding_alone() -> None:
    lines = shown(report(replace(SETTINGS, buckets=(1,), memory=False)))
    assert len(rows(lines, "reading 10 tokens of prompt; exact: 1 round")) == 3
    lines = shown(report(replace(SETTINGS, prompt_tokens=0)))
    assert not any(line.startswith("reading") for line in lines)
    lines = shown(report(replace(SETTINGS, new_tokens=0)))
    assert not any(line.startswith("decoding") for line in lines)


def test_a_reason_is_told_once() -> None:
    workshop = FakeWorkshop()
    workshop.refusals = {Contender(count, "fused"): "M-RoPE\n\x1b[2J" for count in (1, 2, 3)}
    workshop.broken = {Contender(3, "contexts")}
    text = "\n".join(shown(report(workshop=workshop)))
    assert "left out: fused with 1, 2 and 3: M-RoPE [2J\n" in text
    assert "left out: contexts with 3: it broke" in text
    assert "\x1b" not in text


def timing(*seconds: float) -> Timing:
    """A contender with these times, compared with one that takes 1 second."""
    return Timing(seconds, seconds, seconds)


def with_rows(*found: Row, choice: AutoChoice | None = None) -> BenchReport:
    """A report of these rows."""
    empty = report_of(Findings(complete=True))
    return replace(empty, rows=found, choices=() if choice is None else ((2, choice),))


def row(kind: str, *seconds: float, note: str = "") -> Row:
    """A row of two buckets that decoded in these times."""
    return Row(Contender(2, kind), (), timing(*seconds), None, None, None, "", note)  # type: ignore[arg-type]


def test_rounds_that_differ_are_remarked_on() -> None:
    assert list(remarks(with_rows(row("fused", 1.0, 1.01, 1.02, 1.03)))) == []
    (line,) = remarks(with_rows(row("contexts", 1.0, 1.2, 1.1, 1.15), row("fused", 1.0, 2.0, 1.5, 1.0)))
    assert line.startswith("the rounds differ much, by up to ")
    assert "(fused, 2 buckets, decoding)" in line


def test_how_rows_are_turned_is_said_once() -> None:
    rows = (row("fused", 1.0, note="rows are turned by callback: a reason"), row("contexts", 1.0))
    assert list(remarks(with_rows(*rows, rows[0]))) == ["fused: rows are turned by callback: a reason"]


def test_other_programs_that_ran_meanwhile_are_remarked_on() -> None:
    found = with_rows(row("fused", 1.0))
    assert list(remarks(replace(found, other_cores=0.2))) == []
    (line,) = remarks(replace(found, other_cores=0.94))
    assert line.startswith("others kept 0.9 cores busy meanwhile")


def test_a_remembered_choice_that_is_wrong_now_is_called_into_question() -> None:
    found = (row("contexts", 2.0), row("fused", 1.0))
    remembered = AutoChoice("contexts", "measured: 1 steps/s fused, 2 in contexts", remembered=True)
    first, second = remarks(with_rows(*found, choice=remembered))
    assert first == (
        "2 buckets: --engine auto takes contexts "
        "(measured: 1 steps/s fused, 2 in contexts, remembered; --remeasure decides anew)"
    )
    assert second == "2 buckets: but now fused is 2.00 times as fast"
    assert len(list(remarks(with_rows(*found, choice=replace(remembered, remembered=False))))) == 1
    assert len(list(remarks(with_rows(*found, choice=replace(remembered, engine="fused"))))) == 1


def test_memory_says_what_was_only_predicted() -> None:
    assert memory_text(None) == ""
    assert memory_text(Memory(300 << 20, 200 << 20, 0)) == "200 MiB"
    assert memory_text(Memory(300 << 20, 200 << 20, 64 << 20)) == "200 MiB + 64 MiB"
    assert memory_text(Memory(300 << 20)) == "~300 MiB"
    predicted = replace(row("fused", 1.0), memory=Memory(300 << 20))
    assert list(remarks(with_rows(predicted))) == [
        "memory: with a context of 4,096 tokens; ~: predicted, since it could not be measured"
    ]


def test_what_is_measured_is_said_beforehand() -> None:
    assert plan_text(SETTINGS, 2) == (
        "measuring 1, 2 and 3 buckets, contexts and fused beside raw llama.cpp, prompts of 10 tokens, "
        "4 tokens decoded, 4 rounds, 2 threads"
    )
    alone = replace(SETTINGS, buckets=(1,), engines=("fused",), prompt_tokens=0)
    assert plan_text(alone, 1) == "measuring 1 bucket, fused beside raw llama.cpp, 4 tokens decoded, 4 rounds, 1 thread"


def test_a_figure_has_a_panel_for_each_phase_and_a_curve_for_each_contender() -> None:
    plot = speed_figure(report())
    assert [panel.title for panel in plot.panels] == [
        *("decoding", "prompt of 10 tokens, shared", "prompt of 10 tokens, exact")
    ]
    assert [curve.kind for curve in plot.panels[0].curves] == ["raw", "contexts", "fused"]
    assert [curve.kind for curve in plot.panels[1].curves] == ["contexts", "fused"]
    fused = plot.panels[0].curves[2]
    assert fused.buckets == (1, 2, 3)
    assert [ratio.median for ratio in fused.ratios] == pytest.approx([1.25 / 1.5, 1.25, 2.5 / 1.5])
    # Without others to share with, one bucket reads as it does.
    assert [ratio.median for ratio in plot.panels[1].curves[0].ratios] == pytest.approx([1, 1, 1])
    data = speed_image(plot, "png")
    assert len(data) < 150_000
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (1200, 700)


def test_an_svg_names_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    import matplotlib as mpl

    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    data = speed_image(speed_figure(report()), "svg")
    texts = {"".join(element.itertext()) for element in ET.fromstring(data).iter("{http://www.w3.org/2000/svg}text")}
    assert {"decoding", "tokens per second", "buckets", "contexts", "fused", "N times one bucket"} <= texts


@pytest.mark.parametrize("image_format", ["png", "svg"])
@pytest.mark.parametrize(
    "changes",
    [{"buckets": (1,)}, {"prompt_tokens": 0}, {"new_tokens": 0}, {"prompts": ("shared",), "engines": ("fused",)}],
    ids=str,
)
def test_little_can_be_drawn_too(changes, image_format) -> None:  # type: ignore[no-untyped-def]
    assert speed_image(speed_figure(report(replace(SETTINGS, memory=False, **changes))), image_format)
