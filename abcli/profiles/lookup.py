"""Which profile a model uses: the user's own win over those that come with abcli."""

from __future__ import annotations

from pathlib import Path

from abcli.errors import ProfileError
from abcli.profiles.catalogue import shipped
from abcli.profiles.profile import Profile
from abcli.profiles.store import Warn, find, has_any, pick, profiles


def may_have_profile(directory: Path, size: int) -> bool:
    """Whether a model file of `size` bytes can have a profile, without its fingerprint, which takes far longer.

    Raises ProfileError if the directory or the catalogue cannot be read.
    """
    return has_any(directory) or bool(shipped(size=size))


def default_profile(directory: Path, fingerprint: str, warn: Warn) -> Profile | None:
    """The default profile of a model, None if it has none; `warn` gets a line for each damaged one.

    Raises ProfileError if the directory or the catalogue cannot be read.
    """
    return find(directory, fingerprint, None, warn) or pick(_shipped_for(fingerprint), None)


def named_profile(directory: Path, fingerprint: str, name: str, model: str) -> Profile:
    """The profile of this name of the model with this fingerprint; `model` is what to call it in an error.

    Raises UsageError for an impossible name, ProfileError, with the names there are, for a missing or damaged one.
    """
    own = find(directory, fingerprint, name, _ignore)
    if own is not None:
        return own
    known = _shipped_for(fingerprint)
    found = pick(known, name)
    if found is not None:
        return found
    names = sorted({profile.name for profile in [*profiles(directory, _ignore, fingerprint), *known]})
    raise ProfileError(
        f"{model} has no profile {name!r}",
        f"there are: {', '.join(names)}" if names else "it has none; `abcli calibrate` makes one",
    )


def _shipped_for(fingerprint: str) -> list[Profile]:
    return [profile for profile in shipped() if profile.fingerprint == fingerprint]


def _ignore(_line: str) -> None:
    """Takes the warnings about files that were not asked for."""
