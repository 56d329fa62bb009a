"""What reaches standard output and standard error."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator

import pytest

from abcli.errors import AbcliError, UsageError
from abcli.generate import Statistics
from abcli.ui.terminal import Terminal, on_interrupt, one_line, printable, statistics_line


class Screen(io.StringIO):
    """A stream that passes for a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def pipes() -> tuple[Terminal, io.StringIO, io.StringIO]:
    """A terminal object on two pipes."""
    output, error = io.StringIO(), io.StringIO()
    return Terminal(output, error), output, error


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain \u00e4\u20ac\U0001f642\n\ttext", "plain \u00e4\u20ac\U0001f642\n\ttext"),
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("\x1b]0;title\x07", "]0;title"),
        ("\x9b2J\x90q\x9c", "2Jq"),
        ("a\rb\x08c\x00d\x7fe", "abcde"),
        # A family is several characters held together by joiners.
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
        ("", ""),
    ],
)
def test_printable_has_no_control_characters(text: str, expected: str) -> None:
    assert printable(text) == expected


def test_a_terminal_gets_no_escape_sequences_of_a_model() -> None:
    output = Screen()
    terminal = Terminal(output, io.StringIO())
    terminal.write("\x1b[2Jhello")
    assert output.getvalue() == "[2Jhello"


def test_a_pipe_gets_every_character(pipes: tuple[Terminal, io.StringIO, io.StringIO]) -> None:
    terminal, output, error = pipes
    terminal.write("\x1b[2Jhello\r\n")
    assert output.getvalue() == "\x1b[2Jhello\r\n"
    assert error.getvalue() == ""


def test_lines_are_ended_once(pipes: tuple[Terminal, io.StringIO, io.StringIO]) -> None:
    terminal, output, _ = pipes
    terminal.end_line()
    for piece in ("a", "", "b"):
        terminal.write(piece)
    terminal.end_line()
    terminal.end_line()
    terminal.write("c\n")
    terminal.end_line()
    assert output.getvalue() == "ab\nc\n"


def test_each_answer_begins_at_the_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Terminal, "_columns", lambda _terminal: 10)
    output = Screen()
    terminal = Terminal(output, io.StringIO())
    for _ in range(2):
        for piece in ("one two", " thr", "ee"):
            terminal.write_answer(piece)
        terminal.end_line()
    # What is no answer is not broken.
    terminal.write('{"json": "of one line"}\n')
    assert output.getvalue() == "one two\nthree\n" * 2 + '{"json": "of one line"}\n'


def test_every_piece_is_written_at_once() -> None:
    raw = io.BytesIO()
    output = io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8")  # type: ignore[arg-type]
    terminal = Terminal(output, io.StringIO())
    terminal.write("a")
    assert raw.getvalue() == b"a"


def test_errors_are_one_line_each(pipes: tuple[Terminal, io.StringIO, io.StringIO]) -> None:
    terminal, output, error = pipes
    terminal.write("half an answer")
    terminal.error(UsageError("a\nb\r\n\x1b[31m  c [red]:bug:[/red] " + "x" * 300, "do\nthis"))
    shown = "a b [31m c [red]:bug:[/red] " + "x" * 300
    assert error.getvalue() == f"error: {shown}\nhint: do this\n"
    assert output.getvalue() == "half an answer\n"


def test_an_error_without_a_hint(pipes: tuple[Terminal, io.StringIO, io.StringIO]) -> None:
    terminal, _, error = pipes
    terminal.error(AbcliError("no"))
    assert error.getvalue() == "error: no\n"


def test_remarks_are_taken_literally(pipes: tuple[Terminal, io.StringIO, io.StringIO]) -> None:
    terminal, output, error = pipes
    terminal.note("[bold]:smile:\x07 {x}")
    terminal.warn("[/] careful\x1b")
    assert error.getvalue() == "[bold]:smile: {x}\nwarning: [/] careful\n"
    assert output.getvalue() == ""


def test_one_line() -> None:
    assert one_line(" a\n\n b\tc ") == "a b c"


@pytest.mark.parametrize(
    ("output", "error", "interactive"),
    [
        (Screen, Screen, True),
        (Screen, io.StringIO, False),
        (io.StringIO, Screen, False),
        (io.StringIO, io.StringIO, False),
    ],
)
def test_interactive_means_both_streams(
    output: type[io.StringIO], error: type[io.StringIO], interactive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert Terminal(output(), error()).interactive is interactive


def test_no_spinner_and_no_bar_in_a_pipe(
    pipes: tuple[Terminal, io.StringIO, io.StringIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abcli.ui.terminal._PATIENCE_SECONDS", 0.0)
    terminal, output, error = pipes
    with terminal.working("loading"), terminal.prefill_progress() as progress:
        progress(1, 10)
        progress(10, 10)
    assert (output.getvalue(), error.getvalue()) == ("", "")


@pytest.mark.parametrize(("patience", "shown"), [(0.0, True), (1e9, False)])
def test_a_bar_for_prompts_that_take_a_while(patience: float, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abcli.ui.terminal._PATIENCE_SECONDS", patience)
    monkeypatch.setenv("TERM", "xterm")
    error = Screen()
    with Terminal(Screen(), error).prefill_progress() as progress:
        progress(1, 10)
        progress(10, 10)
    assert ("reading the prompt" in error.getvalue()) is shown


def test_the_statistics_line() -> None:
    statistics = Statistics(
        prompt_tokens=31,
        cached_tokens=11,
        completion_tokens=41,
        prefill_seconds=0.1,
        decode_seconds=2.0,
        agreement_sum=30.0,
        steps=40,
        asked_steps=40,
    )
    expected = "prompt 31 tokens (11 cached), 200.0 tok/s | answer 41 tokens, 20.0 tok/s | context 71/4096"
    assert statistics_line(statistics, 71, 4096, 1) == expected
    assert statistics_line(statistics, 71, 4096, 6) == f"{expected} | 6 buckets agree on 75%"
    statistics.steps = 50
    line = statistics_line(statistics, 71, 4096, 6)
    assert line == f"{expected} | 6 buckets, asked for 80% of the tokens, agree on 75%"


def test_one_is_one() -> None:
    line = statistics_line(Statistics(prompt_tokens=1, completion_tokens=1), 2, 64, 1)
    assert line == "prompt 1 token | answer 1 token | context 2/64"


def test_the_statistics_of_nothing() -> None:
    statistics = Statistics(prompt_tokens=3)
    assert statistics_line(statistics, 3, 64, 2) == (
        "prompt 3 tokens | answer 0 tokens | context 3/64 | 2 buckets agree on 100%"
    )


@pytest.fixture
def interrupts() -> Iterator[list[str]]:
    """Collects what an interrupt does; afterwards the handler must be the one from before."""
    before = signal.getsignal(signal.SIGINT)
    yield []
    assert signal.getsignal(signal.SIGINT) is before


def test_the_third_interrupt_raises(interrupts: list[str]) -> None:
    with on_interrupt(lambda: interrupts.append("stop")):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert len(interrupts) == 2
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert len(interrupts) == 3


def test_interrupts_count_anew_each_time(interrupts: list[str]) -> None:
    for _ in range(3):
        with on_interrupt(lambda: interrupts.append("stop")):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
    assert len(interrupts) == 6
