"""How a batch comes along, and what came of it, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter

from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from abcli.batch.progress import RunProgress, Summary
from abcli.batch.scheduler import StopSwitch, Totals
from abcli.text import counted
from abcli.ui.progress import TimeLeft, time_text
from abcli.ui.terminal import Terminal

# Seconds between two lines where nobody watches a bar.
_INTERVAL = 60.0

Clock = Callable[[], float]


@contextmanager
def batch_progress(
    terminal: Terminal,
    progress: RunProgress,
    totals: Totals,
    switch: StopSwitch,
    *,
    bar: bool,
    clock: Clock = perf_counter,
) -> Iterator[Callable[[], None]]:
    """Shows how far a run is; the callback is to be called after every step.

    With `bar` a bar that goes when the block ends, if there is a terminal; else a line once a minute. Once a line
    says that the run is to stop.
    """
    told = False
    begin = last = clock()
    left = TimeLeft(clock)
    # What an earlier run has done says nothing about this one's speed.
    seconds_left, written = None, 0

    def text() -> str:
        nonlocal seconds_left, written, told
        if switch.stopping and not told:
            told = True
            terminal.note("finishing what is begun; once more stops at once")
        if progress.total is not None and progress.written != written:
            written = progress.written
            seconds_left = left.update(progress.done, progress.total)
        return progress_text(progress, totals.completion_tokens, clock() - begin, seconds_left)

    if not (bar and terminal.console.is_interactive):

        def line() -> None:
            nonlocal last
            shown = text()
            if clock() - last >= _INTERVAL:
                last = clock()
                terminal.note(f"batch: {shown}")

        yield line
        return
    shown_bar = Bar(
        BarColumn(), TextColumn("{task.description}", markup=False), console=terminal.console, transient=True
    )
    task = shown_bar.add_task("", total=progress.total)

    def update() -> None:
        shown_bar.update(task, completed=progress.done, description=text())

    with shown_bar:
        update()
        yield update


def progress_text(progress: RunProgress, tokens: int, seconds: float, seconds_left: float | None) -> str:
    """E.g. "120 of 1,000 lines, 85.3 tokens/s, 2 errors, about 12 min left"."""
    total = f" of {progress.total:,}" if progress.total is not None else ""
    of_one = (progress.done if progress.total is None else progress.total) == 1
    parts = [f"{progress.done:,}{total} line{'' if of_one else 's'}"]
    if tokens and seconds > 0:
        parts.append(f"{tokens / seconds:.1f} tokens/s")
    parts.append(counted(progress.errors, "error"))
    if seconds_left is not None and progress.total is not None and progress.done < progress.total:
        parts.append(f"about {time_text(seconds_left)} left")
    return ", ".join(parts)


def summary_text(summary: Summary) -> str:
    """The one line at the end of a run."""
    parts = [f"{counted(summary.written - summary.errors, 'answer')}, {counted(summary.errors, 'error')}"]
    if summary.skipped:
        parts.append(f"{summary.skipped:,} done before")
    if summary.duplicates:
        parts.append(f"{summary.duplicates:,} of the answers for prompts that came again")
    prompt = counted(summary.prompt_tokens, "prompt token")
    if summary.cached_tokens:
        prompt += f" ({summary.cached_tokens:,} shared)"
    speed = f"{counted(summary.completion_tokens, 'new token')} in {summary.seconds:.1f} s"
    if summary.completion_tokens:
        speed += f", {summary.tokens_per_second:.1f} tokens/s"
    return " | ".join([", ".join(parts), prompt, speed])
