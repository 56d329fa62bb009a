"""Progress of work with a known number of steps, with the time left."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import perf_counter

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from abcli.ui.terminal import Terminal, typed_unseen

# Recent enough to follow a change, such as the end of the steps whose results are already stored.
_STEPS = 32
# Seconds between two lines where nobody watches a bar.
_INTERVAL = 60.0
_UNITS = ((86_400, "d"), (3_600, "h"), (60, "min"))

Clock = Callable[[], float]


class TimeLeft:
    """Estimates the seconds left from the speed of the last steps."""

    def __init__(self, clock: Clock = perf_counter) -> None:
        self._clock = clock
        self._marks: deque[tuple[float, int]] = deque(maxlen=_STEPS + 1)

    def update(self, done: int, total: int) -> float | None:
        """The seconds left after `done` of `total` steps, None while that cannot be told; call it at every step."""
        now = self._clock()
        # Less done than before is the beginning of other work.
        if self._marks and done < self._marks[-1][1]:
            self._marks.clear()
        self._marks.append((now, done))
        begin, first = self._marks[0]
        if done <= first or now <= begin:
            return None
        return max(0, total - done) * (now - begin) / (done - first)


def time_text(seconds: float) -> str:
    """A span of time in its two largest units at most: "45 s", "12 min", "3 h 20 min", "2 d 5 h"."""
    whole = round(seconds)
    for (size, unit), (smaller, smaller_unit) in zip(_UNITS, (*_UNITS[1:], (1, "s")), strict=True):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {smaller_unit}" if rest and smaller > 1 else "")
    return f"{whole} s"


@contextmanager
def step_progress(
    terminal: Terminal, what: str, *, quiet: bool = False, clock: Clock = perf_counter
) -> Iterator[Callable[[int, int], None]]:
    """Shows how far `what` is; the callback takes (done, total) and is to be called after every step.

    A bar on a terminal, which goes when the block ends; elsewhere a line on standard error once a minute; with
    `quiet` nothing.
    """
    left = TimeLeft(clock)
    if quiet:
        yield lambda _done, _total: None
        return
    if not terminal.console.is_interactive:
        last = clock()

        def line(done: int, total: int) -> None:
            nonlocal last
            text = _left_text(left.update(done, total))
            if clock() - last >= _INTERVAL and done < total:
                last = clock()
                terminal.note(f"{what}: {done:,} of {total:,}{text}")

        yield line
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[left]}", markup=False),
        console=terminal.console,
        transient=True,
    )
    task = bar.add_task(what, total=None, left="")

    def update(done: int, total: int) -> None:
        bar.update(task, completed=done, total=total, left=_left_text(left.update(done, total)))

    with typed_unseen(), bar:
        yield update


@contextmanager
def stage_progress(terminal: Terminal) -> Iterator[Callable[[str, int, int], None]]:
    """The same for work in stages; the callback takes (name of the stage, done, total)."""
    with ExitStack() as stack:
        current, update = "", None

        def progress(what: str, done: int, total: int) -> None:
            nonlocal current, update
            if update is None or what != current:
                stack.close()
                current, update = what, stack.enter_context(step_progress(terminal, what))
            update(done, total)

        yield progress


def _left_text(seconds: float | None) -> str:
    return "" if seconds is None else f", about {time_text(seconds)} left"
