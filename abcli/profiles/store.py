"""Profiles on disk, one JSON file each: every write is atomic, and one lock orders those of several processes."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from abcli.atomic import write_atomically
from abcli.errors import ProfileError
from abcli.profiles.profile import MAX_BYTES, Profile, check_name, decode, encode, moment, utc_now

Warn = Callable[[str], None]

_SUFFIX = ".json"
_LOCK_NAME = ".lock"
_FINGERPRINT_DIGITS = 16
# Whoever holds the lock writes one small file.
_LOCK_PATIENCE_SECONDS = 20
_PERMISSIONS_HINT = "check its permissions and the space on its disk"


def stored_path(directory: Path, fingerprint: str, name: str) -> Path:
    """Where the profile called `name` of a model is, or would be. Raises UsageError for an impossible name."""
    return directory / f"{fingerprint[:_FINGERPRINT_DIGITS]}-{check_name(name)}{_SUFFIX}"


def save(profile: Profile, directory: Path, *, overwrite: bool = True) -> Path:
    """Store `profile` atomically and return its path; the directory is made if need be.

    Raises ProfileError for impossible values, if it cannot be written (with the old file intact), or if there is
    one of that name for that model and `overwrite` is off.
    """
    data = encode(profile)
    path = stored_path(directory, profile.fingerprint, profile.name)
    with _locked(directory), _reporting("write", path):
        if not overwrite and path.exists():
            raise ProfileError(
                f"there already is a profile {profile.name!r} for {profile.model}: {path}",
                "`force` replaces it",
            )
        write_atomically(path, data)
    return path


def load(path: Path) -> Profile:
    """The profile in any file. Raises ProfileError with the path."""
    with _reporting("read", path):
        # Opening a pipe or a device could wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ProfileError(f"{path} is not a file", "name a file that abcli has written")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    return decode(data, str(path))


def profiles(directory: Path, warn: Warn, fingerprint: str | None = None) -> list[Profile]:
    """The stored profiles, of all models or of one, the newest first; `warn` gets a line for each damaged file.

    Raises ProfileError if the directory is there and cannot be read.
    """
    found = []
    for path in _files(directory):
        if fingerprint is not None and not path.name.startswith(fingerprint[:_FINGERPRINT_DIGITS]):
            continue
        try:
            profile = load(path)
        except ProfileError as error:
            warn(f"{error.message}; not used")
            continue
        if path != stored_path(directory, profile.fingerprint, profile.name):
            warn(f"{path} is not called as what it holds; not used: import it with `abcli profiles import`")
        elif fingerprint is None or profile.fingerprint == fingerprint:
            found.append(profile)
    return sorted(found, key=lambda profile: (moment(profile.created), profile.name), reverse=True)


def has_any(directory: Path) -> bool:
    """Whether there may be profiles, found out without reading one. Raises ProfileError as `profiles` does."""
    return bool(_files(directory))


def pick(candidates: Sequence[Profile], name: str | None) -> Profile | None:
    """The one called `name`; without a name the default among the profiles of one model.

    The default is the one that was chosen last, or else the newest.
    """
    if name is not None:
        return next((profile for profile in candidates if profile.name == name), None)
    return max(
        candidates,
        key=lambda profile: (moment(profile.chosen), moment(profile.created), profile.name),
        default=None,
    )


def find(directory: Path, fingerprint: str, name: str | None, warn: Warn) -> Profile | None:
    """The stored profile of a model that is called `name`, without a name its default; None if there is none.

    Damaged files go to `warn`, but raise ProfileError where one is asked for by name.
    Raises UsageError for an impossible name.
    """
    if name is None:
        return pick(profiles(directory, warn, fingerprint), None)
    path = stored_path(directory, fingerprint, name)
    with _reporting("read", path):
        there = path.exists()
    profile = load(path) if there else None
    return profile if profile is not None and (profile.fingerprint, profile.name) == (fingerprint, name) else None


def choose(profile: Profile, directory: Path) -> Profile:
    """Make `profile` the default of its model, whatever is saved later, and return it as it is stored now.

    Raises ProfileError if it cannot be written.
    """
    path = stored_path(directory, profile.fingerprint, profile.name)
    with _locked(directory), _reporting("write", path):
        before = pick(profiles(directory, lambda _line: None, profile.fingerprint), None)
        now = moment(utc_now())
        if before is not None and before.chosen:
            # A clock that was set back must not undo the choice.
            now = max(now, moment(before.chosen) + timedelta(microseconds=1))
        chosen = replace(profile, chosen=now.isoformat(timespec="microseconds"))
        write_atomically(path, encode(chosen))
    return chosen


def remove(directory: Path, fingerprint: str, name: str) -> Path:
    """Delete a stored profile, damaged or not, and return where it was. Raises UsageError and ProfileError."""
    path = stored_path(directory, fingerprint, name)
    with _reporting("remove", path):
        path.unlink()
    return path


def export(profile: Profile, path: Path, *, overwrite: bool = False) -> None:
    """Write `profile` to a file of the user's choice, for others to import.

    Raises ProfileError if it cannot be written, or if the file exists and `overwrite` is off.
    """
    data = portable(profile)
    with _reporting("write", path):
        if not overwrite and path.exists():
            raise ProfileError(f"{path} already exists", "choose another name, or replace it with `force`")
        if path.exists() and not path.is_file():
            # Renaming over a device would take it away from everybody.
            raise ProfileError(f"{path} is not a file", "choose another name")
        write_atomically(path, data)


def portable(profile: Profile) -> bytes:
    """The content of an exported file: that it was chosen is the user's own affair. Raises ProfileError."""
    return encode(replace(profile, chosen=""))


def import_(source: Path | Profile, directory: Path, *, overwrite: bool = False) -> Profile:
    """Store the profile of an exported file, or one already decoded, of whichever model; returns what was stored.

    Raises ProfileError for a file that is not a sound profile, or for a name that is taken and `overwrite` off.
    """
    profile = replace(source if isinstance(source, Profile) else load(source), chosen="")
    save(profile, directory, overwrite=overwrite)
    return profile


def _files(directory: Path) -> list[Path]:
    """The files that could be profiles, in the order of their names."""
    try:
        paths = sorted(directory.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unusable("list", directory, error) from error
    return [path for path in paths if path.suffix == _SUFFIX and not path.name.startswith(".")]


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Keep other processes from writing profiles. Raises ProfileError if the directory cannot be made or locked."""
    # Few commands write, and this takes a while to import.
    from filelock import FileLock, Timeout

    with _reporting("write", directory):
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(directory / _LOCK_NAME, timeout=_LOCK_PATIENCE_SECONDS, mode=0o600)
        try:
            lock.acquire()
        except Timeout:
            raise ProfileError(f"another process is writing to {directory}", "try again when it has ended") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _reporting(action: str, path: Path) -> Iterator[None]:
    """Turn errors of the operating system into ProfileError."""
    try:
        yield
    except FileNotFoundError as error:
        raise ProfileError(f"cannot {action} {path}: there is no such file", "check the name") from error
    except (OSError, NotImplementedError, ValueError) as error:
        raise _unusable(action, path, error) from error


def _unusable(action: str, path: Path, error: Exception) -> ProfileError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ProfileError(f"cannot {action} {path}: {reason}", _PERMISSIONS_HINT)
