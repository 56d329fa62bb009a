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
from pathlib import Path

PACKAGE = "llama-cpp-python"
INSIDE = "/vendor/llama.cpp/models/templates/"


def directory() -> Path:
    """Where the templates of the installed version are kept."""
    return Path.home() / ".cache" / "abcli" / "templates" / importlib.metadata.version(PACKAGE)


def fetch(target: Path) -> None:
    """Put the templates into the directory `target`, which appears only when all are there."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", PACKAGE, "--dest", scratch, f"{PACKAGE}=={target.name}"]
        subprocess.run(command, check=True)
        found = Path(scratch, "templates")
        found.mkdir()
        with tarfile.open(next(Path(scratch).glob("*.tar.gz"))) as archive:
            for member in archive:
                data = archive.extractfile(member) if INSIDE in member.name and member.isfile() else None
                if data is not None and member.name.endswith(".jinja"):
                    (found / Path(member.name).name).write_bytes(data.read())
        found.rename(target)


if __name__ == "__main__":
    if not directory().is_dir():
        try:
            fetch(directory())
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            sys.exit(f"error: the public chat templates could not be fetched: {error}")
