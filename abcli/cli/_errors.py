"""How the command line tells errors: two lines, and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback

import typer

from abcli.config import ENV_DEBUG, debug
from abcli.errors import AbcliError, CancelledError, UsageError
from abcli.ui.terminal import Terminal


def report(error: BaseException) -> int:
    """Print `error` in two lines and return its exit code."""
    if debug():
        traceback.print_exception(error)
    shown = _as_ours(error)
    if not shown.message:
        return shown.exit_code  # "abcli" alone: the parser has already printed the help
    with contextlib.suppress(OSError):
        Terminal().error(shown)
    return shown.exit_code


def _as_ours(error: BaseException) -> AbcliError:
    if isinstance(error, AbcliError):
        return error
    if isinstance(error, typer.Abort):
        return CancelledError()
    # What the command-line parser raises; its class lives in another module from version to version.
    message = getattr(error, "format_message", None)
    if message is not None:
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "abcli"
        return UsageError(message(), f"see {command} --help")
    if isinstance(error, OSError):
        detach_output()
        return AbcliError(f"the operating system refused: {error}", "check the disk, the path and its permissions")
    if isinstance(error, MemoryError):
        return AbcliError("out of memory", "take fewer buckets or a shorter context (--ctx-size)")
    return AbcliError(
        f"internal error: {type(error).__name__}: {error}",
        f"set {ENV_DEBUG}=1 for details, and please report it",
    )


def detach_output() -> None:
    """Point standard output at nothing, so that the interpreter's last flush cannot fail."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
