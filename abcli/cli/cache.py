"""`abcli cache`: what the prompt cache holds, and how to empty it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from abcli.config import prompt_cache_directory
from abcli.errors import UsageError
from abcli.machine import EntrySummary, clear, entries
from abcli.ui.terminal import Terminal, one_line

_DAY = 86_400.0
_UNITS = ("B", "kB", "MB", "GB", "TB")
_TITLES = ("TOKENS", "SIZE", "MODEL", "BASE", "LAST USE")

Directory = Annotated[
    Path | None, typer.Option("--dir", metavar="DIR", help="The cache's directory, if it is not the default one.")
]

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.command("list", help="Show what is stored, the last used first.")
def show(
    directory: Directory = None,
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array instead of a table.")] = False,
) -> None:
    """A line per stored prefix on standard output; never the text, for prompts are private."""
    found = entries(_chosen(directory))
    terminal = Terminal()
    if as_json:
        terminal.write(json.dumps([_report(entry) for entry in found], ensure_ascii=False) + "\n")
        return
    if found:
        terminal.write(_table([_TITLES, *(_row(entry) for entry in found)]))
    terminal.note(f"{_files(len(found))}, {size_text(sum(entry.size for entry in found))} in {_chosen(directory)}")


@app.command("clear", help="Remove what is stored.")
def remove(
    directory: Directory = None,
    *,
    older_than: Annotated[
        float | None, typer.Option("--older-than", metavar="DAYS", help="Only what was not used for so many days.")
    ] = None,
) -> None:
    """Remove stored prefixes and say what was freed."""
    if older_than is not None and not 0 < older_than < float("inf"):
        raise UsageError(f"--older-than {older_than:g} is no number of days", "give more than 0, or leave it out")
    count, size = clear(_chosen(directory), (older_than or 0.0) * _DAY)
    Terminal().write(f"removed {_files(count)}, {size_text(size)}\n")


@app.command("path", help="Print the directory of the cache.")
def path() -> None:
    """The default directory on standard output, whether it exists or not."""
    Terminal().write(f"{prompt_cache_directory()}\n")


def size_text(size: int) -> str:
    """A number of bytes for people, e.g. "71.2 MB"."""
    number, unit = float(size), 0
    # 999.95 would be rounded to 1000.0.
    while number >= 999.95 and unit < len(_UNITS) - 1:
        number, unit = number / 1000, unit + 1
    return f"{number:.1f} {_UNITS[unit]}" if unit else f"{size} B"


def _chosen(directory: Path | None) -> Path:
    return directory if directory is not None else prompt_cache_directory()


def _files(count: int) -> str:
    return f"{count} file" if count == 1 else f"{count} files"


def _row(entry: EntrySummary) -> tuple[str, ...]:
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.last_use))
    if entry.problem:
        return "-", size_text(entry.size), f"({one_line(entry.problem)})", "-", used
    model = one_line(entry.model) or "-"
    return str(entry.tokens), size_text(entry.size), model, entry.key.get("base", "-"), used


def _table(rows: list[tuple[str, ...]]) -> str:
    """`rows` in columns two spaces apart, numbers (the first two columns and the base) to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.ljust(width) if _TITLES[column] in ("MODEL", "LAST USE") else text.rjust(width)
            for column, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def _report(entry: EntrySummary) -> dict[str, Any]:
    """The object of one stored prefix that --json prints."""
    return {
        "path": str(entry.path),
        "tokens": entry.tokens,
        "size": entry.size,
        "model": entry.model,
        "key": entry.key,
        "last_use": round(entry.last_use, 3),
        "problem": entry.problem or None,
    }
