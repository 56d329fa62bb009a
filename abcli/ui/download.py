"""How the download of a model is shown: what and how much first, then a bar on a terminal or a line now and then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import TransferSpeedColumn as SpeedColumn

from abcli.hub.fetch import Download, fetch
from abcli.hub.locate import BundledName
from abcli.hub.names import HubName
from abcli.hub.packaged import fetch_bundled
from abcli.ui.terminal import Terminal

# Seconds between two lines where nobody watches a bar.
_INTERVAL = 60.0

Clock = Callable[[], float]


class DownloadScreen:
    """Shows one download; see `abcli.hub.fetch.Watcher`. With `quiet` it only shows what must be known."""

    def __init__(self, terminal: Terminal, *, quiet: bool = False, clock: Clock = perf_counter) -> None:
        self._terminal = terminal
        self._quiet = quiet
        self._clock = clock
        self._last_line = clock()
        self._bar: Progress | None = None
        self._task = TaskID(0)

    def begin(self, download: Download) -> None:
        """Say what is fetched before it costs anything."""
        if self._quiet:
            return
        files = download.files
        what = files[0].path if len(files) == 1 else f"{files[0].path} and {len(files) - 1} more parts"
        here = download.size - download.missing
        rest = f", {decimal(here)} of it are already here" if here else ""
        repository = download.name.repository
        self._terminal.note(
            f"fetching {what} from {repository}@{download.commit[:12]} ({decimal(download.size)}{rest})"
        )
        if self._terminal.console.is_interactive:
            columns = (BarColumn(), DownloadColumn(), SpeedColumn(), TimeRemainingColumn())
            self._bar = Progress(
                TextColumn("{task.description}", markup=False), *columns, console=self._terminal.console, transient=True
            )
            self._task = self._bar.add_task("fetching", total=download.size, completed=here)
            self._bar.start()
        self._last_line = self._clock()

    def progress(self, done: int, total: int) -> None:
        """Move the bar, or write a line once a minute."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)
        elif not self._quiet and done < total and self._clock() - self._last_line >= _INTERVAL:
            self._last_line = self._clock()
            self._terminal.note(f"fetched {decimal(done)} of {decimal(total)}")

    def note(self, text: str) -> None:
        """A remark on standard error."""
        self._terminal.note(text)

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()


def fetch_shown(terminal: Terminal, name: HubName | BundledName, *, quiet: bool = False) -> Path:
    """Fetch a model and show how it goes. Raises what `abcli.hub.fetch.fetch` and `fetch_bundled` raise."""
    if isinstance(name, BundledName):
        return fetch_bundled(name, (lambda _text: None) if quiet else terminal.note)
    screen = DownloadScreen(terminal, quiet=quiet)
    try:
        return fetch(name, screen)
    finally:
        screen.close()
