"""Which models are on this machine, by name; their files are not opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from abcli.config import DEFAULT_MODEL_FILE
from abcli.errors import AbcliError
from abcli.hub.cache import CachedModel, cached_file, cached_models
from abcli.hub.locate import DEFAULT_NAME, LocalName, model_folders, resolve_name
from abcli.hub.names import HubName, models_among, quant_of

_SHORT_COMMIT = 12


@dataclass(frozen=True)
class Listed:
    """A model; `files` are its parts in order. `cached` is None for a file of the user's."""

    name: str
    files: tuple[Path, ...]
    cached: CachedModel | None = None


def listed_models(aliases: Mapping[str, str]) -> list[Listed]:
    """Every model in abcli's folders, under an alias, or in the hub's cache; each file once, by its shortest name."""
    own: dict[Path, Listed] = {}
    for files in [*_in_folders(), *_under_aliases(aliases)]:
        if (real := files[0].resolve()) not in own:
            name = DEFAULT_NAME if files[0].name == DEFAULT_MODEL_FILE else str(files[0])
            own[real] = Listed(name, files)
    return [*own.values(), *(Listed(_cached_name(model), model.files, model) for model in cached_models())]


def _in_folders() -> Iterable[tuple[Path, ...]]:
    for folder in model_folders():
        try:
            names = [path.name for path in folder.iterdir() if path.is_file()]
        except OSError:
            continue
        yield from (tuple(folder / part for part in parts) for parts in models_among(names).values())


def _under_aliases(aliases: Mapping[str, str]) -> Iterable[tuple[Path, ...]]:
    for target in aliases.values():
        try:
            found = resolve_name(target)
        except AbcliError:
            continue
        if isinstance(found, LocalName) and found.path.is_file():
            names = [path.name for path in found.path.parent.iterdir()]
            parts = models_among(names).get(found.path.name, (found.path.name,))
            yield tuple(found.path.with_name(part) for part in parts)


def _cached_name(model: CachedModel) -> str:
    """The shortest name that leads to a model of the cache."""
    quant, commit = quant_of(model.name), model.commit[:_SHORT_COMMIT]
    names = [HubName(model.repository, quant, revision=revision) for revision in ("", commit)] if quant else []
    names[1:1] = [HubName(model.repository, file=model.name)]
    names.append(HubName(model.repository, file=model.name, revision=model.commit))
    return str(next((name for name in names if cached_file(name) == model.files[0]), names[-1]))
