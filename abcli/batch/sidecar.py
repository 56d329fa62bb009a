"""The small file beside an output that says what the results in it were computed with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from abcli.atomic import write_atomically
from abcli.errors import BatchError, UsageError
from abcli.sampling import LIMITS, GenerationConfig
from abcli.version import __version__

_FORMAT = 1
_MAX_BYTES = 1 << 24
_SHOWN_CHARACTERS = 60
_SHOWN_DIFFERENCES = 12


@dataclass(frozen=True)
class Header:
    """What an output is bound to."""

    settings: Mapping[str, Any]
    """Names and JSON values: with other ones the results would be others."""
    seed: int
    """The run's seed, drawn if none was asked for."""
    created: int
    """When the run began, in seconds since 1970."""
    results: int | None = None
    """How many there are in all, once the run is complete."""
    size: int | None = None
    """Of the complete output, in bytes."""


def sidecar_path(output: Path) -> Path:
    """Where the header of `output` is."""
    return output.with_name(f"{output.name}.abcli.json")


def describe_generation(generation: GenerationConfig) -> dict[str, Any]:
    """The settings of answers as names and JSON values, -1 for a random seed."""
    return {**asdict(generation.sampling), **{name: getattr(generation, name) for name in LIMITS}}


def describe_versions() -> dict[str, Any]:
    """Which programs compute."""
    try:
        native = version("llama-cpp-python")
    except PackageNotFoundError:
        native = "unknown"
    return {"abcli": __version__, "llama-cpp-python": native}


def read_header(output: Path) -> Header | None:
    """The header of `output`, None if there is none. Raises BatchError for one that is damaged, and OSError."""
    path = sidecar_path(output)
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    try:
        return _decoded(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise BatchError(
            f"{path} is damaged or of another version of abcli", "use `restart` to compute everything anew"
        ) from None


def _decoded(data: bytes) -> Header:
    value = json.loads(data)
    if value.pop("abcli_batch") != _FORMAT:
        raise ValueError("another format")
    header = Header(**value)
    counts = (header.seed, header.created, header.results or 0, header.size or 0)
    if not isinstance(header.settings, dict) or any(type(count) is not int for count in counts):
        raise ValueError("other types")
    return header


def write_header(output: Path, header: Header) -> None:
    """Store the header of `output`, whole or not at all. Raises OSError."""
    value = {"abcli_batch": _FORMAT, **asdict(replace(header, settings=dict(header.settings)))}
    write_atomically(sidecar_path(output), (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`settings` as they are after having been written and read."""
    value: dict[str, Any] = json.loads(json.dumps(dict(settings)))
    return value


def check_same(output: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise UsageError, with what differs, if results under `new` settings do not belong beside those under `old`."""
    differences = find_differences(old, new)
    if differences:
        shown = "".join(f"\n  {difference}" for difference in differences[:_SHOWN_DIFFERENCES])
        more = len(differences) - _SHOWN_DIFFERENCES
        raise UsageError(
            f"{output} was begun with other settings (then -> now):{shown}" + (f"\n  and {more} more" * (more > 0)),
            "repeat the settings of then, choose another output, or use `restart` to compute everything anew",
        )


def find_differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Every setting that differs, as "name: old -> new"."""
    names = dict.fromkeys([*old, *new])
    missing = object()
    return [
        f"{name}: {_shown(old.get(name))} -> {_shown(new.get(name))}"
        for name in names
        if old.get(name, missing) != new.get(name, missing)
    ]


def _shown(value: Any) -> str:
    text = "none" if value is None or value == "" else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
