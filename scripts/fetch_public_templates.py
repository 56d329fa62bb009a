"""Fetch the public chat templates that come with the pinned llama.cpp, for the tests to read.

They belong to their models' makers, so they are kept per user and not in the repository. Runs with the Python of the
environment; needs the standard library only.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PACKAGE = "llama-cpp-python"
TEMPLATES = "models/templates"
_SOURCE = "/vendor/llama.cpp/"


def directory(kind: str = "templates") -> Path:
    """Where the templates, or what else comes from the source, are kept for the installed version."""
    return Path.home() / ".cache" / "abcli" / kind / importlib.metadata.version(PACKAGE)


def source_files(version: str, *folders: str) -> Iterator[tuple[PurePosixPath, bytes]]:
    """The files (path within llama.cpp, content) below these folders of llama.cpp in the package's source archive.

    Raises OSError, CalledProcessError and StopIteration where it cannot be had.
    """
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", PACKAGE, "--dest", scratch, f"{PACKAGE}=={version}"]
        subprocess.run(command, check=True)
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            for member in archive:
                path = PurePosixPath(member.name.partition(_SOURCE)[2])
                if member.isfile() and any(path.is_relative_to(folder) for folder in folders):
                    data = archive.extractfile(member)
                    assert data is not None
                    yield path, data.read()


def fetch(target: Path) -> None:
    """Put the templates into the directory `target`, which appears only when all are there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        found = Path(scratch, "templates")
        found.mkdir()
        for path, data in source_files(target.name, TEMPLATES):
            if path.suffix == ".jinja":
                (found / path.name).write_bytes(data)
        found.rename(target)


if __name__ == "__main__":
    if not directory().is_dir():
        try:
            fetch(directory())
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            sys.exit(f"error: the public chat templates could not be fetched: {error}")
