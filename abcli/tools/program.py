"""Tools that are programs: the arguments of a call go to standard input, as JSON; its output is the result."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Thread
from typing import IO

from abcli.chat.messages import ToolCall
from abcli.errors import CancelledError, UsageError
from abcli.text import counted
from abcli.tools.outcome import MAX_OUTPUT_BYTES, Outcome, Stopped, bounded

_LOOK_SECONDS = 0.02
_PATIENCE_SECONDS = 2.0
_CHUNK = 1 << 14


@dataclass(frozen=True)
class Program:
    """Runs a program for each call, without a shell; `seconds` is the time it may take."""

    command: tuple[str, ...]
    seconds: float

    @property
    def description(self) -> str:
        """The command line."""
        return shlex.join(self.command)

    def run(self, call: ToolCall, stopped: Stopped) -> Outcome:
        """See `Runner`; whatever the program has started is ended with it."""
        with tempfile.TemporaryFile() as arguments:
            arguments.write(call.arguments.encode("utf-8", "replace"))
            arguments.seek(0)
            try:
                process = subprocess.Popen(
                    self.command,
                    stdin=arguments,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:
                reason = error.strerror if isinstance(error, OSError) else str(error)
                return _failed(f"{self.command[0]} cannot be run: {reason}")
        output, errors = _Reader(process.stdout), _Reader(process.stderr)
        try:
            problem = self._wait(process, (output, errors), stopped)
        finally:
            _end(process)
            output.close()
            errors.close()
        if problem or process.returncode:
            return _failed(problem or _exit_text(process.returncode), output.data, errors.data)
        return Outcome(bounded(output.data) or "(no output)")

    def _wait(self, process: subprocess.Popen[bytes], readers: Sequence[_Reader], stopped: Stopped) -> str:
        """Wait for the end of the program; why it has to be ended instead. Raises CancelledError once `stopped`."""
        end = time.monotonic() + self.seconds
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_SECONDS)
                return ""
            if stopped():
                raise CancelledError
            if time.monotonic() > end:
                return f"it took more than {counted(int(self.seconds), 'second')}"
            if any(len(reader.data) > MAX_OUTPUT_BYTES for reader in readers):
                return f"it wrote more than {MAX_OUTPUT_BYTES:,} bytes"


class _Reader:
    """Reads a pipe in a thread, so that the program can always write; it keeps no more than is of use."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        assert pipe is not None  # noqa: S101 - both are asked for
        self.data = b""
        self._pipe = pipe
        self._thread = Thread(target=self._read, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Wait for the end of the pipe, which comes soon after that of all who write."""
        self._thread.join(_PATIENCE_SECONDS)
        if not self._thread.is_alive():
            self._pipe.close()

    def _read(self) -> None:
        with suppress(OSError, ValueError):
            while chunk := os.read(self._pipe.fileno(), _CHUNK):
                if len(self.data) <= MAX_OUTPUT_BYTES:
                    self.data += chunk


def parse_programs(texts: Sequence[str], names: Sequence[str], seconds: float) -> dict[str, Program]:
    """Programs from "NAME=PROGRAM" for tools of the `names`. Raises UsageError for what is no such text."""
    found: dict[str, Program] = {}
    for text in texts:
        name, _, line = text.partition("=")
        try:
            command = tuple(shlex.split(line))
        except ValueError as error:
            raise UsageError(f"`tool_exec` {text!r:.80} cannot be read: {error}", "check its quotes") from None
        if name not in names or not command:
            raise UsageError(
                f"`tool_exec` {text!r:.80} is not NAME=PROGRAM with the name of a tool",
                f"the tools are: {', '.join(names) or 'none'}",
            )
        if shutil.which(command[0]) is None:
            raise UsageError(f"there is no program {command[0]!r:.80}", "give its path, and check its permissions")
        found[name] = Program(command, seconds)
    return found


def _failed(problem: str, output: bytes = b"", errors: bytes = b"") -> Outcome:
    told = "\n".join(text for text in (f"error: {problem}", bounded(output), bounded(errors)) if text)
    return Outcome(told, problem)


def _exit_text(code: int) -> str:
    if code < 0:
        with suppress(ValueError):
            return f"it was ended by {signal.Signals(-code).name}"
    return f"it ended with the exit code {code}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the program, and all that it has started."""
    if hasattr(os, "killpg"):
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    else:  # Windows
        process.kill()
    process.wait()
