"""Reads the hub's standard cache without asking the hub anything, and without loading its library.

Layout (huggingface_hub's documentation, "Understand caching"): `models--user--repository/refs/<branch>` holds a
commit, `snapshots/<commit>/<file>` is a link into `blobs/`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from abcli.errors import ModelFileError, UsageError
from abcli.hub.names import HubName, choose_files, models_among

_FOLDER_START = "models--"
_SEPARATOR = "--"


@dataclass(frozen=True)
class CachedModel:
    """A whole model in the cache: `files` are its parts in order, `refs` the branches and tags of its commit."""

    repository: str
    commit: str
    refs: tuple[str, ...]
    name: str
    """Path of the first part inside the repository."""
    files: tuple[Path, ...]


def cache_directory() -> Path:
    """The hub's cache, as huggingface_hub reads it from HF_HUB_CACHE, HF_HOME and XDG_CACHE_HOME."""
    # The library resolves links, too, so that its paths and these are the same.
    return Path(hub_settings().HF_HUB_CACHE).expanduser().resolve()


def hub_settings() -> ModuleType:
    """What huggingface_hub reads from the environment (its module `constants`). Raises UsageError."""
    try:
        # Imported where it is needed: most commands never ask for the hub.
        from huggingface_hub import constants
    except ValueError as error:
        raise UsageError(
            f"a setting of the hub in the environment cannot be read: {error}",
            "check the variables that begin with HF_",
        ) from error
    return constants


def repository_folder(repository: str) -> Path:
    """The folder of a repository in the cache, whether it exists or not."""
    return cache_directory() / (_FOLDER_START + repository.replace("/", _SEPARATOR))


def cached_file(name: HubName) -> Path | None:
    """The file, or the first part, that `name` means among what is in the cache; None if nothing there fits.

    Without a revision the commit of `main` is looked at first, then the others, the newest first.
    """
    for snapshot in _snapshots(repository_folder(name.repository), name.revision):
        try:
            return snapshot / choose_files(name, _files_in(snapshot))[0]
        except ModelFileError:
            continue
    return None


def cached_models() -> list[CachedModel]:
    """Every whole model in the cache, in the order of repositories, commits and files."""
    found = []
    for folder in _listed(cache_directory()):
        if not folder.name.startswith(_FOLDER_START):
            continue
        repository = folder.name[len(_FOLDER_START) :].replace(_SEPARATOR, "/", 1)
        refs = _refs(folder)
        for snapshot in _listed(folder / "snapshots"):
            here = tuple(sorted(ref for ref, commit in refs.items() if commit == snapshot.name))
            for first, parts in models_among(_files_in(snapshot)).items():
                files = tuple(snapshot / part for part in parts)
                found.append(CachedModel(repository, snapshot.name, here, first, files))
    return found


def _snapshots(folder: Path, revision: str) -> Iterator[Path]:
    """The snapshots that may hold what is wanted, the best first."""
    refs = _refs(folder)
    if revision:
        snapshots = _listed(folder / "snapshots")
        commit = refs.get(revision, revision)
        found = [path for path in snapshots if path.name == commit]
        # As in git, a commit can be shortened.
        short = [path for path in snapshots if len(revision) >= 7 and path.name.startswith(revision.lower())]
        yield from found or (short if len(short) == 1 else [])
        return
    main = refs.get("main")
    yield from sorted(_listed(folder / "snapshots"), key=lambda path: (path.name != main, -_modified(path), path.name))


def _refs(folder: Path) -> dict[str, str]:
    """The commit of each branch and tag that is known in a repository's folder."""
    root = folder / "refs"
    refs = {}
    for path in root.rglob("*"):
        try:
            refs[path.relative_to(root).as_posix()] = path.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
    return refs


def _files_in(snapshot: Path) -> list[str]:
    """The files of a snapshot, as paths in the repository; links into nowhere are left out."""
    return [
        (Path(root) / name).relative_to(snapshot).as_posix()
        for root, _folders, names in os.walk(snapshot)
        for name in names
        if name.lower().endswith(".gguf") and (Path(root) / name).is_file()
    ]


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError:
        return []


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
