"""Where the model is that a user names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from abcli.config import DEFAULT_MODEL_FILE, home
from abcli.errors import ModelFileError
from abcli.hub.aliases import aliases
from abcli.hub.catalogue import KnownModel, known_models
from abcli.hub.names import SCHEME, HubName, is_quant, names_hub, normal_quant, parse_hub_name

DEFAULT_NAME = "default"


@dataclass(frozen=True)
class LocalName:
    """A model that is a file; it need not exist."""

    path: Path


@dataclass(frozen=True)
class BundledName:
    """A model of the catalogue that is not on the hub: the default model."""

    file: str


# Brings a model that is not here.
Fetch = Callable[[HubName | BundledName], Path]


def model_folders() -> tuple[Path, ...]:
    """Where abcli looks for models that are not on the hub: the working directory's `models/`, the checkout's, its own.

    They need not exist.
    """
    checkout = Path(__file__).resolve().parents[2] / "models"
    return (Path("models"), checkout, home() / "models")


def resolve_name(name: str | None) -> LocalName | HubName | BundledName:
    """What the user means by `name`; None or "default" is the default model.

    In this order: a file that exists; what begins with "hf:" or is a link; an alias; a model of the catalogue;
    a repository of the hub (user/repository...), unless its first part is a folder here; else a path. Nothing is
    asked for on the network. Raises UsageError for an impossible name, ModelFileError for damaged aliases.
    """
    if name is None or name == DEFAULT_NAME:
        return BundledName(DEFAULT_MODEL_FILE)
    if is_file(name):
        return LocalName(Path(name).expanduser())
    if not names_hub(name) and "/" not in name:
        target = aliases().get(name)
        # An alias of an alias would have to be searched for circles.
        return _without_alias(name if target is None else target)
    return _without_alias(name)


def _without_alias(name: str) -> LocalName | HubName | BundledName:
    if name == DEFAULT_NAME:
        return BundledName(DEFAULT_MODEL_FILE)
    if not names_hub(name):
        if is_file(name) or name.startswith(("/", ".", "~")):
            return LocalName(Path(name).expanduser())
        if "/" not in name:
            return _from_catalogue(name) or LocalName(Path(name))
        if Path(name.partition("/")[0]).is_dir():
            return LocalName(Path(name))
    found = parse_hub_name(name)
    return LocalName(Path(name).expanduser()) if found is None else found


def locate_model(name: str | None, fetch: Fetch | None = None) -> Path:
    """The path of the model called `name`; see `resolve_name`. A path is returned as it is, unchecked.

    A model of the hub is taken from the hub's cache, without a request, if anything there fits; else `fetch` is to
    bring it, as it is the default model if no folder has it. Raises ModelFileError if the model is not here and there
    is no `fetch`; UsageError for an impossible name; and what `fetch` raises.
    """
    found = resolve_name(name)
    if isinstance(found, LocalName):
        return found.path
    if isinstance(found, HubName):
        return _from_hub(found, fetch)
    for folder in model_folders():
        if (folder / found.file).is_file():
            return folder / found.file
    if fetch is None:
        raise ModelFileError(
            f"the default model {found.file} is not here", f"fetch it with `abcli pull {DEFAULT_NAME}`, or name another"
        )
    return fetch(found)


def portable_name(name: str | None) -> str:
    """`name` as it means the same model on another machine: an alias is followed, a path made absolute.

    Raises what `resolve_name` raises.
    """
    found = resolve_name(name)
    if isinstance(found, LocalName):
        return str(found.path.absolute())
    return f"{SCHEME}{found}" if isinstance(found, HubName) else DEFAULT_NAME


def _from_hub(name: HubName, fetch: Fetch | None) -> Path:
    # huggingface_hub is slow to import, and most models are named by a path.
    from abcli.hub.cache import cache_directory, cached_file

    path = cached_file(name)
    if path is not None:
        return path
    if fetch is None:
        raise ModelFileError(f"{name} is not in {cache_directory()}", f"fetch it with `abcli pull {name}`")
    return fetch(name)


def _from_catalogue(name: str) -> HubName | BundledName | None:
    """A model of the catalogue, or another quant of its repository, as in "gemma-3-1b-it:Q8_0"."""
    if (known := _known(name)) is not None:
        return known.hub or BundledName(known.file)
    start, _, quant = name.partition(":")
    known = _known(start)
    if known is None or known.hub is None or not is_quant(quant):
        return None
    return HubName(known.hub.repository, normal_quant(quant))


def _known(name: str) -> KnownModel | None:
    return known_models().get(name.lower())


def looks_like_model(word: str) -> bool:
    """Whether a command-line word is a model rather than a prompt.

    It is if it is "default", ends in .gguf, is an existing file, an alias or a name of the catalogue, begins with
    "hf:", or is a repository that says that it holds GGUF files or is followed by a quant.
    """
    if word == DEFAULT_NAME or word.lower().endswith(".gguf") or is_file(word):
        return True
    if any(letter.isspace() for letter in word):
        return False
    if names_hub(word) or word in aliases() or _from_catalogue(word) is not None:
        return True
    found = parse_hub_name(word) if "://" not in word else None
    # "yes/no" is a question.
    return found is not None and ("gguf" in found.repository.lower() or is_quant(found.quant))


def is_file(word: str) -> bool:
    """Whether `word` is the path of an existing file."""
    try:
        return Path(word).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return False  # too long for a path, a NUL byte, or no such user after ~
