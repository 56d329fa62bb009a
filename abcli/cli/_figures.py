"""The flags for figures as files, and checks of where results are to go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from abcli.cli._flags import flag
from abcli.errors import UsageError
from abcli.trace.page import check_name
from abcli.ui.plots import ImageFormat, require_matplotlib


@dataclass(frozen=True)
class FigureOptions:
    """Whether to write a figure, and as what."""

    panel: ClassVar[str] = "Result"

    png: Annotated[Path | None, flag("Write a figure; needs the extra 'plot'.", "--png")] = None
    svg: Annotated[Path | None, flag("Write a figure; needs the extra 'plot'.", "--svg")] = None
    html: Annotated[Path | None, flag("Write tables and figures as one page.", "--html")] = None

    def check(self) -> None:
        """Raise UsageError for what would only be noticed after the work is done."""
        for path, image_format in self._wanted():
            check_destination(f"--{image_format}", path)
            require_matplotlib(f"--{image_format}")
        if self.html is not None:
            check_destination("--html", self.html)

    def write(self, draw: Callable[[ImageFormat], bytes], page: Callable[[], str]) -> None:
        """Write each figure that is asked for, of which `draw` gives the content, and the page."""
        for path, image_format in self._wanted():
            path.write_bytes(draw(image_format))
        if self.html is not None:
            self.html.write_bytes(page().encode("utf-8", "replace"))

    def _wanted(self) -> Iterator[tuple[Path, ImageFormat]]:
        if self.png is not None:
            yield self.png, "png"
        if self.svg is not None:
            yield self.svg, "svg"


def check_destination(name: str, path: Path) -> None:
    """Raise UsageError if the file that flag `name` asks for cannot be written."""
    if not path.parent.is_dir() or path.is_dir():
        raise UsageError(f"{name} {path} cannot be written", "name a file in a directory that exists")


def check_trace_file(name: str, path: Path) -> None:
    """Raise UsageError if the trace that flag `name` asks for cannot be written to `path`."""
    check_name(path)
    check_destination(name, path)
