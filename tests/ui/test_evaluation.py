"""What an evaluation looks like: tables, sentences, bars, figures and progress."""

from __future__ import annotations

import io
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from abcli.evals.scores import Score
from abcli.evals.statistics import summarise
from abcli.ui.evaluation import MAX_BAR, MIN_BAR, depth_bars, depth_figure, sentences, show_evaluation
from abcli.ui.plots import depth_image
from abcli.ui.progress import TimeLeft, step_progress, time_text
from abcli.ui.terminal import Terminal


@dataclass(frozen=True)
class Place:
    group: str
    depth: float
    length: int = 1024


def found(offsets=None, questions=60, candidates=False, lengths=(1024,), depths=5):
    """Summaries of configurations whose likelihoods lie `offsets` above those of the first."""
    offsets = offsets or {"native": 0.0, "spread6": -0.2, "paper6": 0.3}
    generator = np.random.default_rng(0)
    places, scores = [], {name: [] for name in offsets}
    for length in lengths:
        for index in range(questions):
            places.append(Place(f"{index // 2}", index % depths / max(1, depths - 1), length))
            noise, rank = float(generator.exponential()), index % 3 if candidates else None
            for name, offset in offsets.items():
                scores[name].append(Score(noise + 0.3 + offset, index % 2 == 0 and offset <= 0, rank))
    return summarise(places, scores, depths)


def shown(lengths, width=80, bars=False, unicode=True, task="needle"):
    """What is printed, line by line."""
    stream = io.StringIO()
    console = Console(file=stream, width=width, highlight=False, emoji=False)
    show_evaluation(console, task, lengths, bars=bars, unicode=unicode)
    return stream.getvalue().splitlines()


def row_of(lines, name, number=0):
    """The cells of the row with this name in the table with this number."""
    rows = [line for line in lines if line.split() and line.split()[0] == name and "against" not in line]
    return rows[number].split()[1:]


def test_the_tables_have_the_numbers_of_the_summaries():
    (summary,) = found()
    lines = shown([summary], width=120)
    assert lines[0] == "needle, 1,024 tokens: 60 questions on 30 contexts, 5 depths"
    for item in summary.summaries:
        measures = item.measures
        accuracy, accuracy_error, nll, nll_error, worst, _, at, depth, gap, _ = row_of(lines, item.configuration)
        assert (accuracy, accuracy_error) == (
            f"{100 * measures.accuracy.value:.1f}",
            f"±{100 * measures.accuracy.error:.1f}",
        )
        assert (nll, nll_error) == (f"{measures.nll.value:.3f}", f"±{measures.nll.error:.3f}")
        assert (worst, at, depth) == (f"{measures.worst_nll.value:.3f}", "at", f"{item.worst_nll_depth:.2f}")
        assert gap == f"{measures.nll_gap.value:.3f}"
    nll = summary.summaries[2].difference.nll
    assert row_of(lines, "paper6", 1)[2:4] == ["+0.300", f"({nll.low:+.3f}..{nll.high:+.3f})"]
    assert "spread6 against native: NLL lower by 0.200, NLL at the worst depth lower by 0.200" in lines
    assert any(line.startswith("paper6 against native: accuracy lower by 50.0 points, NLL higher by") for line in lines)


def test_a_narrow_terminal_gets_intervals_alone_and_no_line_too_long():
    lengths = found()
    lines = shown(lengths, width=80, bars=True)
    difference = lengths[0].summaries[2].difference
    assert row_of(lines, "paper6", 1) == [
        f"{100 * difference.accuracy.low:+.1f}..{100 * difference.accuracy.high:+.1f}",
        *("+0.300..+0.300", "+0.300..+0.300", "+0.000..+0.000"),
    ]
    assert max(len(line) for line in lines if "against" not in line) <= 80


def test_ranks_are_shown_where_there_are_candidates():
    assert not any("ranked" in line for line in shown(found()))
    lines = shown(found(candidates=True), width=140)
    assert row_of(lines, "native")[2] == "33.3"
    assert row_of(lines, "spread6", 1)[2:4] == ["+0.0", "(+0.0..+0.0)"]
    assert sum("ranked 1st" in line for line in lines) == 2


def test_a_single_configuration_has_nothing_to_be_compared_with():
    lines = shown(found({"native": 0.0}))
    assert not any("difference" in line or "against" in line for line in lines)


def test_lengths_follow_each_other():
    lines = shown(found(lengths=(512, 2048)))
    assert [line.split(":")[0] for line in lines if line.startswith("needle")] == [
        "needle, 512 tokens",
        "needle, 2,048 tokens",
    ]


def test_long_names_are_folded_and_names_are_no_markup():
    name = "bases=" + ",".join(["10000"] * 16) + ";merge=mean"
    lines = shown(found({"native": 0.0, name: 0.1, "[bold]:bug:": 0.2, "\x1b[2J": 0.3}), width=80, bars=True)
    text = "\n".join(lines)
    assert "[bold]:bug:" in text
    assert "\x1b" not in text
    assert f"{name} against native" in text
    assert max(len(line) for line in lines if "against" not in line) <= 80


def test_sentences_say_what_is_clear_and_what_is_not():
    (summary,) = found({"native": 0.0, "same": 0.0, "worse": 0.1})
    same, worse = sentences(summary)
    assert same == "same against native: no clear difference"
    assert worse.startswith("worse against native: accuracy lower by 50.0 points, NLL higher by 0.100")


def test_few_contexts_allow_no_conclusion():
    (summary,) = found(questions=18)
    assert summary.groups == 9
    assert sentences(summary) == [
        "9 contexts: too few for intervals to mean much; ask more questions to tell differences"
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.booleans(), st.lists(st.floats(-0.3, 5), min_size=1, max_size=4), st.integers(1, 9))
def test_bars_fit_their_width_and_are_as_long_as_their_values(width, unicode, offsets, depths):
    (summary,) = found(dict(zip("abcd", offsets, strict=False)), questions=20, depths=depths)
    lines = depth_bars(summary, width, unicode=unicode)
    assert len(lines) == len(summary.depths) * len(offsets)
    assert max(map(len, lines)) <= max(width, 18 + MIN_BAR)
    assert all(line.isascii() for line in lines) or unicode
    values = [
        item.measures.nll_by_depth[index].value for index in range(len(summary.depths)) for item in summary.summaries
    ]
    bars = [sum(character in "█#" for character in line) for line in lines]
    order = np.argsort(values, kind="stable")
    assert all(bars[first] <= bars[second] for first, second in pairwise(order))
    assert bars[int(np.argmax(values))] == min(max(MIN_BAR, width - 18), MAX_BAR)


def test_the_bar_of_nothing_is_empty():
    (summary,) = summarise([Place("a", 0.0)], {"native": [Score(0.0, exact=True)]}, 1)
    assert depth_bars(summary, 40) == ["0.00  native  0.000"]


def test_a_figure_names_its_configurations_and_lengths(monkeypatch):
    import matplotlib as mpl

    # Text as text, so that it can be read back.
    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    plot = depth_figure("needle: model_$x^$.gguf", found({"spread6": 0.0, "native": 0.1, "_hidden": 0.2, "a$b$": 0.3}))
    assert [curve.label for curve in plot.panels[0].likelihoods] == ["native", "spread6", "_hidden", "a$b$"]
    data = depth_image(plot, "svg")
    texts = [
        "".join(element.itertext()).strip() for element in ET.fromstring(data).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert {"native", "spread6", "_hidden", "a$b$", "needle: model_$x^$.gguf", "1,024 tokens, 60 questions"} <= set(
        texts
    )
    assert b"<dc:date>" not in data


@pytest.mark.parametrize(
    ("configurations", "depths", "lengths"), [(1, 1, (64,)), (2, 2, (64, 128, 256)), (16, 9, (64,))]
)
def test_few_and_many_curves_can_be_drawn(configurations, depths, lengths):
    offsets = {f"number {number}": number / 10 for number in range(configurations)}
    plot = depth_figure("kv", found(offsets, depths=depths, lengths=lengths))
    assert depth_image(plot, "png").startswith(b"\x89PNG\r\n")


class Clock:
    """A time that is set by hand."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_the_time_left_follows_the_last_steps():
    clock = Clock()
    left = TimeLeft(clock)
    assert left.update(0, 200) is None
    for done in range(1, 101):
        clock.now += 0.001  # what is stored already
        estimate = left.update(done, 200)
    assert estimate == pytest.approx(0.1)
    for done in range(101, 151):
        clock.now += 3
        estimate = left.update(done, 200)
    assert estimate == pytest.approx(150)
    assert left.update(0, 50) is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (125, "2 min"),
        (3599, "59 min"),
        (3600, "1 h"),
        (12_000, "3 h 20 min"),
        (190_000, "2 d 4 h"),
    ],
)
def test_time_text(seconds, text):
    assert time_text(seconds) == text


class Screen(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self):
        return True


def run_progress(terminal, clock, seconds, quiet=False):
    """Twenty steps of `seconds` each."""
    with step_progress(terminal, "[needle]", quiet=quiet, clock=clock) as progress:
        for done in range(21):
            progress(done, 20)
            clock.now += seconds


def test_without_a_terminal_progress_is_a_line_now_and_then(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    stream = io.StringIO()
    run_progress(Terminal(io.StringIO(), stream), Clock(), 20)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "[needle]: 3 of 20, about 5 min left"
    assert lines[-1] == "[needle]: 18 of 20, about 40 s left"
    assert len(lines) == 6
    for seconds, quiet in ((0.1, False), (20, True)):
        stream = io.StringIO()
        run_progress(Terminal(io.StringIO(), stream), Clock(), seconds, quiet)
        assert stream.getvalue() == ""


def test_on_a_terminal_progress_is_a_bar_that_goes(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream, output = Screen(), Screen()
    run_progress(Terminal(output, stream), Clock(), 20)
    assert "[needle]" in stream.getvalue()
    assert "20/20" in stream.getvalue()
    assert output.getvalue() == ""
    quiet = Screen()
    run_progress(Terminal(Screen(), quiet), Clock(), 20, quiet=True)
    assert quiet.getvalue() == ""


def test_an_error_passes_through_the_progress():
    with pytest.raises(ValueError, match="broken"), step_progress(Terminal(io.StringIO(), Screen()), "kv"):
        raise ValueError("broken")
