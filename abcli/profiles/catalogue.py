"""The profiles that come with abcli: those in the catalogue of known models, models/catalogue.json.

An entry's `profiles` is a list of profiles in the form of a profile's file, with an empty `chosen`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from abcli.errors import ProfileError
from abcli.hub.catalogue import catalogue_path
from abcli.profiles.profile import Profile, from_values

__all__ = ["catalogue_path", "shipped"]


def shipped(path: Path | None = None, *, size: int | None = None) -> list[Profile]:
    """The profiles in a catalogue (default: abcli's own); `size` limits them to model files of that many bytes.

    A size costs nothing to find out, and so spares every other model the reading of its header.
    No catalogue has no profiles. Raises ProfileError for a damaged one.
    """
    path = catalogue_path() if path is None else path
    try:
        models = json.loads(path.read_text(encoding="utf-8"))["models"]
        entries = [_entry(model) for model in models]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ProfileError(f"{path} is not a catalogue of models: {error!r:.200}", "install abcli again") from None
    return [
        from_values(values, f"{path}, profile {number} of {name!r:.80}")
        for name, model_size, profiles in entries
        if size is None or model_size == size
        for number, values in enumerate(profiles, 1)
    ]


def _entry(model: dict[str, Any]) -> tuple[str, int, list[Any]]:
    """Name, size and raw profiles of one model. Raises KeyError and TypeError."""
    profiles = model.get("profiles", []) if isinstance(model, dict) else None
    if not isinstance(profiles, list):
        raise TypeError("a model's profiles are not a list")
    return str(model["name"]), int(model["size"]), profiles
