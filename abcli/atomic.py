"""Writing a file so that a crash, a full disk or a lost permission leaves the old one intact."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

# Windows alone has, and needs, O_BINARY.
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path`, or what it is a link to, by `data`, readable by the user only; pipes and devices just get it.

    Raises OSError, with the old file untouched.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    # In the same directory: a rename is atomic only inside one file system.
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:40]}-", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync_directory(path.parent)


def create_exclusively(path: Path, data: bytes) -> None:
    """Write `data` to `path`, which must be new. Raises FileExistsError, or OSError with nothing left behind."""
    descriptor = os.open(path, _NEW_FILE, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise
    _sync_directory(path.parent)


def _sync_directory(directory: Path) -> None:
    """Make a new name in `directory` survive a power cut, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
