"""What a person sees: the answer goes to standard output, everything else to standard error."""

from __future__ import annotations

import os
import re
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from abcli.errors import AbcliError
from abcli.text import counted
from abcli.ui.wrapping import WordWrap

try:
    import termios
except ImportError:  # not on Windows
    termios = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from abcli.generate import Statistics

_KEPT_CONTROLS = "\n\t"
# A bar that comes and goes within this time would only flicker.
_PATIENCE_SECONDS = 0.3
# How errors name a setting: `ctx_size`, `engine=contexts`.
_SETTING = re.compile(r"`(?P<name>[a-z]\w*)(?:=(?P<value>[^`\s]*))?`")


class Terminal:
    """Standard output and error; colour, spinners and progress only where a person looks at them."""

    def __init__(self, output: TextIO | None = None, error: TextIO | None = None) -> None:
        self.output = output or sys.stdout
        self.output_is_terminal = self.output.isatty()
        stream = error or sys.stderr
        self._error_is_terminal = stream.isatty()
        # FORCE_COLOR makes rich take a pipe for a terminal: colours are fine there, spinners are not.
        force_interactive = None if self._error_is_terminal else False
        # Without emoji=False a path such as ":bug:.gguf" would be shown as another one.
        self.console = Console(
            file=stream, highlight=False, soft_wrap=True, emoji=False, force_interactive=force_interactive
        )
        self._at_line_start = True
        self._wrap = WordWrap(self._columns)

    def _columns(self) -> int:
        """The width of standard output now, 0 if it has none."""
        try:
            return os.get_terminal_size(self.output.fileno()).columns
        except (OSError, ValueError):
            return 0

    @property
    def interactive(self) -> bool:
        """Whether a person sees both the answer and the remarks."""
        return self.output_is_terminal and self._error_is_terminal

    def write(self, text: str) -> None:
        """Write a piece of output at once; a terminal gets no control characters a model made up."""
        if text:
            self._at_line_start = text.endswith("\n")
            self.output.write(printable(text) if self.output_is_terminal else text)
            self.output.flush()

    def write_answer(self, text: str) -> None:
        """Write a piece of an answer, which a terminal gets broken at words; `end_line` is the answer's end."""
        self.write(self._wrap.add(printable(text)) if self.output_is_terminal else text)

    def end_line(self) -> None:
        """Finish the line of the answer, if one is begun."""
        self.write(self._wrap.flush())
        self._wrap = WordWrap(self._columns)
        if not self._at_line_start:
            self.write("\n")

    def note(self, text: str) -> None:
        """A remark on standard error."""
        self.console.print(printable(text), style="dim", markup=False)

    def warn(self, text: str) -> None:
        """Something the user should know although the work goes on."""
        self.console.print(f"warning: {printable(in_flags(text))}", style="yellow", markup=False)

    def error(self, error: AbcliError) -> None:
        """One line that says what is wrong, one that says what to do."""
        self.end_line()
        self.console.print(f"error: {printable(one_line(in_flags(error.message)))}", style="bold red", markup=False)
        if error.hint:
            self.console.print(f"hint: {printable(one_line(in_flags(error.hint)))}", markup=False)

    def statistics(self, statistics: Statistics, used: int, available: int, buckets: int) -> None:
        """The line under an answer: counts, speeds, context and agreement."""
        self.note(statistics_line(statistics, used, available, buckets))

    @contextmanager
    def working(self, what: str) -> Iterator[Callable[[str], None]]:
        """A spinner on a terminal while something without known length runs; the callback changes what it says."""
        if not self.console.is_interactive:
            yield lambda _what: None
            return
        with typed_unseen(), self.console.status(what) as status:
            yield status.update

    @contextmanager
    def prefill_progress(self) -> Iterator[Callable[[int, int], None]]:
        """A bar on a terminal for prompts that take a while; the callback takes (done, total)."""
        if not self.console.is_interactive:
            yield lambda _done, _total: None
            return
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

        bar = Progress(
            TextColumn("reading the prompt"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        task = bar.add_task("prefill", total=None)
        begin = perf_counter()

        def update(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)
            if done >= total:
                bar.stop()
            elif perf_counter() - begin > _PATIENCE_SECONDS:
                bar.start()

        with typed_unseen():
            try:
                yield update
            finally:
                bar.stop()

    @contextmanager
    def tracing(self) -> Iterator[Callable[[int, int], None]]:
        """A remark on a terminal while attention is read, bucket by bucket; the callback takes (done, total)."""
        if not self.console.is_interactive:
            yield lambda _done, _total: None
            return
        status = self.console.status("")
        begun = False

        def update(done: int, total: int) -> None:
            nonlocal begun
            if not begun:
                self.end_line()
                status.start()
                begun = True
            status.update(f"reading what bucket {done + 1} of {total} attends to")

        try:
            yield update
        finally:
            status.stop()


def statistics_line(statistics: Statistics, used: int, available: int, buckets: int) -> str:
    """E.g. "prompt 31 (12 cached) 310 tok/s | answer 40 32.1 tok/s | context 71/4096 | agreement 81 %"."""
    prompt = f"prompt {counted(statistics.prompt_tokens, 'token')}"
    if statistics.cached_tokens:
        prompt += f" ({statistics.cached_tokens} cached)"
    prompt += _speed(statistics.prefilled_tokens, statistics.prefill_seconds)
    # The first token comes with the prefill, so the decode time covers one token less.
    answer = f"answer {counted(statistics.completion_tokens, 'token')}"
    answer += _speed(statistics.completion_tokens - 1, statistics.decode_seconds)
    parts = [prompt, answer, f"context {used}/{available}"]
    if buckets > 1:
        alone = statistics.steps - statistics.asked_steps
        asked = f", asked for {statistics.asked:.0%} of the tokens," if alone else ""
        parts.append(f"{buckets} buckets{asked} agree on {statistics.agreement:.0%}")
    if statistics.drafted_tokens:
        parts.append(f"looked up {statistics.guessed_tokens} of {statistics.drafted_tokens} right")
    return " | ".join(parts)


def _speed(tokens: int, seconds: float) -> str:
    return f", {tokens / seconds:.1f} tok/s" if tokens > 0 and seconds > 0 else ""


def printable(text: str) -> str:
    """`text` without control characters, which could move the cursor or reprogram a terminal."""
    if text.isprintable():
        return text
    return "".join(c for c in text if c in _KEPT_CONTROLS or unicodedata.category(c) != "Cc")


def in_flags(text: str) -> str:
    """`text` with the settings that it names as in `top_k=40` shown as the command line's flags, as in --top-k 40."""

    # An error is rare, and what it needs slow to import.
    from abcli.sampling import SETTINGS

    def flag(found: re.Match[str]) -> str:
        setting = SETTINGS.get(found["name"])
        name = setting.flags[0] if setting is not None else f"--{found['name'].replace('_', '-')}"
        return name if found["value"] is None else f"{name} {found['value']}"

    return _SETTING.sub(flag, text)


def one_line(text: str) -> str:
    """`text` with every run of white space turned into one space."""
    return " ".join(text.split())


@contextmanager
def typed_unseen() -> Iterator[None]:
    """Let the terminal keep for later what is typed, instead of showing it amid what is written."""
    before = _terminal_settings()
    if before is None:
        yield
        return
    _set_terminal([*before[:3], before[3] & ~termios.ECHO, *before[4:]])
    try:
        yield
    finally:
        # A shell that has sent the process to the background has its own settings in force.
        if _terminal_settings() is not None:
            _set_terminal(before)


def _terminal_settings() -> list[Any] | None:
    """Those of the terminal that this process reads from; None if it reads from none, or in the background."""
    if termios is None:
        return None
    try:
        number = sys.stdin.fileno()
        # Changing them from the background would stop the process.
        return termios.tcgetattr(number) if os.tcgetpgrp(number) == os.getpgrp() else None
    except (OSError, ValueError, AttributeError, termios.error):
        return None


def _set_terminal(settings: list[Any]) -> None:
    with suppress(termios.error):
        termios.tcsetattr(sys.stdin.fileno(), termios.TCSANOW, settings)


@contextmanager
def on_interrupt(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` on Ctrl-C instead of raising KeyboardInterrupt; a third Ctrl-C raises it after all."""
    count = 0

    def handle(_signal: int, _frame: FrameType | None) -> None:
        nonlocal count
        count += 1
        action()
        if count >= 3:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
