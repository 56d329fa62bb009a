"""A file of lines that only grows, of which a crash costs at most the line that was being written."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from abcli.errors import BatchError

_SYNC_SECONDS = 1.0
_OPEN_FLAGS = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)


class AppendedFile:
    """Appends lines to a file, each by one system call; what has been appended survives the process.

    A power cut costs at most the last second. Raises OSError where it says so; a failed line leaves no trace.
    """

    def __init__(self, path: Path) -> None:
        """Open `path`, or make it. Raises OSError."""
        self.path = path
        self._descriptor = os.open(path, _OPEN_FLAGS, 0o666)
        self.size = os.fstat(self._descriptor).st_size
        """Where the last whole line ends, in bytes."""
        self._synced = 0.0
        self._dirty = False

    def append(self, line: bytes) -> None:
        """Add `line`, which ends with a newline. Raises OSError, FileNotFoundError if the file has been deleted."""
        status = os.fstat(self._descriptor)
        if status.st_nlink == 0 and not self.path.exists():
            raise FileNotFoundError(0, "it has been deleted meanwhile", str(self.path))
        if status.st_size != self.size:
            # An interrupt may have come between a write and its account.
            os.ftruncate(self._descriptor, self.size)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.size)
            raise
        self.size += len(line)
        self._dirty = True
        if time.monotonic() - self._synced >= _SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Have everything on the disk itself. Raises OSError."""
        if self._dirty:
            os.fsync(self._descriptor)
            self._dirty = False
        self._synced = time.monotonic()

    def cut(self, size: int) -> None:
        """Drop everything after `size` bytes. Raises OSError."""
        os.ftruncate(self._descriptor, size)
        self.size = size

    def close(self) -> None:
        """Close the file, synced if that is possible; a second call does nothing. Raises OSError."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        try:
            if self._dirty:
                os.fsync(descriptor)
        finally:
            os.close(descriptor)


def scan(path: Path, line_of: Callable[[bytes], int]) -> tuple[dict[int, tuple[int, int]], int]:
    """Where the results in a file are: {line of the input: (offset, bytes)}, and where the last whole one ends.

    A last line that is torn does not count. `line_of` raises ValueError for what is no result; BatchError is raised
    for one that is followed by others. Raises OSError.
    """
    found: dict[int, tuple[int, int]] = {}
    offset, problem = 0, 0
    with path.open("rb") as file:
        for number, data in enumerate(file, 1):
            if problem:
                raise BatchError(
                    f"line {problem} of {path} is not a result: the file is damaged or was edited",
                    "remove that line, or use `restart` to compute everything anew",
                )
            try:
                if not data.endswith(b"\n"):
                    raise ValueError("torn")  # noqa: TRY301
                line = line_of(data)
            except (ValueError, RecursionError):
                problem = number
                continue
            found[line] = (offset, len(data))
            offset += len(data)
    return found, offset
