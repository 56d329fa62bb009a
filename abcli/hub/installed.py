"""The models on this machine: those in the hub's cache and those in abcli's folders; and how to remove cached ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abcli.errors import ModelFileError
from abcli.gguf.header import Header, read_header
from abcli.hub.cache import CachedModel, cache_directory, cached_models, repository_folder
from abcli.hub.listing import listed_models
from abcli.hub.names import HubName, choose_files, quant_of


@dataclass(frozen=True)
class ModelHere:
    """A model on this machine; `files` are its parts in order, `size` their bytes.

    `header` is None, and `problem` says why, for a file that cannot be read. `cached` is None for a file of the user's.
    """

    name: str
    files: tuple[Path, ...]
    size: int
    quant: str
    header: Header | None
    cached: CachedModel | None
    problem: str = ""


def models_here(aliases: dict[str, str]) -> list[ModelHere]:
    """Every model that `listed_models` finds, with what its file says."""
    return [_described(found.name, found.files, found.cached) for found in listed_models(aliases)]


def _described(name: str, files: tuple[Path, ...], cached: CachedModel | None) -> ModelHere:
    header, problem, size = None, "", 0
    try:
        size = sum(path.stat().st_size for path in files)
        header = read_header(files[0])
    except ModelFileError as error:
        problem = error.message
    except OSError as error:
        problem = f"cannot read {files[0]}: {error.strerror}"
    quant = quant_of(cached.name if cached is not None else files[0].name)
    return ModelHere(name, files, size, quant or _main_type(header), header, cached, problem)


def _main_type(header: Header | None) -> str:
    """The type that most bytes of the weights have, in capitals."""
    if header is None:
        return ""
    sizes: Counter[str] = Counter()
    for tensor in header.tensors:
        sizes[tensor.type_name] += tensor.size_bytes
    return max(sizes, key=lambda name: sizes[name]).upper() if sizes else ""


@dataclass(frozen=True)
class Removal:
    """What `remove` would delete: the links of these models; `freed` are the bytes that no other link needs."""

    models: tuple[CachedModel, ...]
    freed: int


def plan_removal(name: HubName) -> Removal:
    """What of the cache `name` means: one model in every commit, or all of a repository without a quant or file.

    A revision limits it to its commit. Raises ModelFileError if nothing of that name is in the cache.
    """
    models = [model for model in cached_models() if model.repository == name.repository]
    if name.revision:
        models = [model for model in models if name.revision in model.refs or model.commit.startswith(name.revision)]
    if name.quant or name.file:
        models = [model for model in models if _is_meant(name, model, models)]
    if not models:
        raise ModelFileError(f"{name} is not in {cache_directory()}", "`abcli models` shows what is there")
    return Removal(tuple(models), _freed(models))


def _freed(models: Iterable[CachedModel]) -> int:
    """The bytes of the blobs to which only the links of these models lead."""
    wanted = {path for model in models for path in model.files}
    kept = {
        path.resolve()
        for repository in {model.repository for model in models}
        for path in (repository_folder(repository) / "snapshots").rglob("*")
        if path.is_file() and path not in wanted
    }
    return sum(blob.stat().st_size for blob in {path.resolve() for path in wanted} - kept)


def remove(removal: Removal) -> None:
    """Delete models from the hub's cache, with what is left empty by that. Raises ModelFileError and OSError.

    Links into nowhere in the same repositories go, too: for their sake the library would refuse to delete anything.
    """
    for repository in {model.repository for model in removal.models}:
        for path in (repository_folder(repository) / "snapshots").rglob("*"):
            if path.is_symlink() and not path.exists():
                path.unlink()
    info, files = _scanned(removal.models)
    info.delete_files(*files).execute()
    # A commit that holds nothing any more goes, too, and with the last one the repository.
    info, _files = _scanned(())
    repositories = {model.repository for model in removal.models}
    empty = [
        revision.commit_hash
        for repository in info.repos
        if repository.repo_type == "model" and repository.repo_id in repositories
        for revision in repository.revisions
        if not revision.files
    ]
    if empty:
        info.delete_revisions(*empty).execute()


def _is_meant(name: HubName, model: CachedModel, models: list[CachedModel]) -> bool:
    here = [other.name for other in models if other.commit == model.commit]
    parts = [part.as_posix() for other in models if other.commit == model.commit for part in _inside(other)]
    try:
        return choose_files(HubName(name.repository, name.quant, name.file), [*here, *parts])[0] == model.name
    except ModelFileError:
        return False


def _inside(model: CachedModel) -> list[Path]:
    """The parts of a model as paths in the repository."""
    depth = len(Path(model.name).parts)
    return [Path(*path.parts[-depth:]) for path in model.files]


def _scanned(models: Iterable[CachedModel]) -> tuple[Any, list[Any]]:
    """The library's picture of the cache, and its entries for the files of `models`. Raises ModelFileError."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        info = scan_cache_dir(cache_directory())
    except CacheNotFound:
        raise ModelFileError(f"there is no cache in {cache_directory()}", "there is nothing to remove") from None
    wanted = {path.absolute() for model in models for path in model.files}
    files = [
        file
        for repository in info.repos
        for revision in repository.revisions
        for file in revision.files
        if file.file_path.absolute() in wanted
    ]
    if len(files) < len(wanted):
        raise ModelFileError(
            "the hub's cache is damaged: " + "; ".join(str(warning) for warning in info.warnings)[:300],
            f"delete the repository's folder in {cache_directory()}",
        )
    return info, files
