"""The entry point: builds the commands and turns every error into two lines and an exit code."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from abcli.cli._commands import CommandGroup, add_commands
from abcli.cli._errors import detach_output, report
from abcli.errors import CancelledError, UsageError
from abcli.version import __version__

# A flag whose value may be left out, and the one that takes the value.
_VALUE_FLAGS = {"--prompt-cache": "--prompt-cache-dir", "--ray": "--ray-address"}

app = typer.Typer(
    name="abcli",
    cls=CommandGroup,
    help="Local language models whose attention overlooks nothing: Attention Buckets on llama.cpp.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
add_commands(app)


def _show_version(wanted: bool) -> None:
    if wanted:
        # llama.cpp takes a while to load, and nothing else here needs it.
        from abcli.machine import devices, version

        lines = [f"abcli {__version__}", version()]
        lines += [f"device {device.name}: {device.description}" for device in devices()]
        sys.stdout.write("\n".join(lines) + "\n")
        raise typer.Exit


@app.callback()
def _abcli(
    show_version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the versions and devices, and exit.",
            callback=_show_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Options that stand before the command."""


def call(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (default: the process's own) and return the exit code."""
    try:
        _replace_closed_streams()
        # An exotic encoding must not turn an answer into a traceback.
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="replace")
        outcome = app(
            args=_with_values(sys.argv[1:] if arguments is None else arguments),
            prog_name="abcli",
            standalone_mode=False,
        )
        sys.stdout.flush()
    except BrokenPipeError:
        detach_output()
        return 1
    except Exception as error:
        return report(error)
    except KeyboardInterrupt:
        return report(CancelledError())
    return outcome if isinstance(outcome, int) else 0


def _with_values(arguments: list[str]) -> list[str]:
    """`--prompt-cache=DIR` and the like as the flags the parser knows: it has none whose value may be left out."""
    words = []
    for word in arguments:
        flag, equals, value = word.partition("=")
        words.append(f"{_VALUE_FLAGS[flag]}={value}" if equals and flag in _VALUE_FLAGS else word)
    return words


def _replace_closed_streams() -> None:
    """Put the null device where a standard stream is closed; raises UsageError for standard output.

    Otherwise the next file that is opened would take the stream's number, and what llama.cpp writes to it.
    """
    if sys.stdin is None:
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115
    output_closed = sys.stdout is None
    if output_closed:
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    if output_closed:
        raise UsageError("standard output is closed", "send it to /dev/null to drop the answer")
