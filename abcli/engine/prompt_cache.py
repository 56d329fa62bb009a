"""The prompt cache: the KV state of long prompt prefixes in a directory, one file per prefix.

Several processes may use a directory at once without locks: a file appears whole, by a rename, and is never changed.
Nothing is forced to the disk, for a power cut costs no more than the time to compute a prefix again: the digests
tell. Prompts are private, so the directory and the files are the user's alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from abcli.engine.prompt_file import (
    VERSION,
    DamagedFileError,
    Index,
    Piece,
    TooLargeError,
    read_index,
    read_piece,
    write_entry,
)

__all__ = ["CacheKey", "Entry", "EntrySummary", "Piece", "PromptCache", "clear", "entries"]

# Fewer tokens are not worth a file, neither as a whole nor as what a new file has beyond an old one.
MIN_TOKENS = 64
# A temporary file that nobody has written to for so long (seconds) was left by a killed process.
STALE_SECONDS = 3600.0

_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.prefix", re.ASCII)
_TEMPORARY = re.compile(r"\.prefix-.*\.tmp", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class CacheKey:
    """All that must be equal for stored state to be right; `model_name` is for people and does not count.

    `scaling` describes the rotation apart from the base, factors chosen by the context size included; `build` names
    llama.cpp, whose state bytes change from release to release.
    """

    model: str
    base: float
    scaling: str
    cache_type_k: str
    cache_type_v: str
    flash_attention: str
    build: str
    model_name: str = field(default="", compare=False)

    def texts(self) -> dict[str, str]:
        """The key as it stands in a file, the version of the file's layout included."""
        names = [item.name for item in fields(self) if item.compare]
        return {**{name: str(getattr(self, name)) for name in names}, "layout": str(VERSION)}

    def digest(self) -> str:
        """SHA-256 of the key, in hex."""
        return hashlib.sha256(json.dumps(self.texts(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file that begins with the wanted tokens: it holds `length` tokens, of which the first `common` are wanted."""

    path: Path
    length: int
    common: int


@dataclass(frozen=True)
class EntrySummary:
    """A stored prefix for people: `size` in bytes, `last_use` in seconds since 1970.

    `problem` is empty, or says why the file cannot be used; `tokens` is 0 and the texts are empty then.
    """

    path: Path
    size: int
    last_use: float
    tokens: int = 0
    model: str = ""
    key: dict[str, str] = field(default_factory=dict)
    problem: str = ""


class PromptCache:
    """The stored prefixes under one key. What goes wrong costs a warning, never an error."""

    def __init__(self, directory: Path, key: CacheKey, limit_bytes: int, warn: Callable[[str], None]) -> None:
        """All files of `directory` together, whatever their key, take at most `limit_bytes`.

        `warn` gets one line per problem, and the same line only once. The directory is made when it is first needed.
        """
        self._directory = directory
        self._key = key
        self._texts = key.texts()
        self._name_start = key.digest()[:16] + "-"
        self._limit = limit_bytes
        self._warn_user = warn
        self._warned: set[str] = set()

    def find(self, tokens: Sequence[int]) -> Entry | None:
        """The entry with the longest common prefix with `tokens`; None if none has MIN_TOKENS in common.

        Reads the indexes only, not the state.
        """
        return max(self._candidates(tokens), key=lambda entry: (entry.common, -entry.length), default=None)

    def read(self, entry: Entry) -> Iterator[Piece]:
        """The pieces of `entry` that lie wholly or partly below `entry.common`, in order from token 0.

        The last may reach beyond: the caller cuts it off. Each is checked before it is yielded; at damage the
        user is warned, the file removed and the iteration ends, with what was yielded still good. An entry that
        another process has removed yields nothing, or goes on to its end if reading has begun.
        """
        with contextlib.suppress(OSError):
            os.utime(entry.path)
        try:
            with entry.path.open("rb") as file:
                index = self._ours(read_index(file))
                for info in index.pieces if index is not None else ():
                    if info.start >= entry.common:
                        break
                    yield read_piece(file, info)
        except FileNotFoundError:
            return
        except DamagedFileError as error:
            self._drop(entry.path, error)
        except OSError as error:
            self._warn(f"prompt cache: {entry.path} cannot be read: {error.strerror or error}")

    def write(self, tokens: Sequence[int], pieces: Iterable[Piece]) -> None:
        """Store `pieces`, which tile all of `tokens`; then remove what was used longest ago until the limit holds.

        Without a look at the pieces nothing is written if `tokens` are fewer than MIN_TOKENS, or if an entry holds
        all but fewer than MIN_TOKENS of them. Entries that the new one continues are removed. A full or read-only
        disk and an entry beyond the limit cost one warning. What `pieces` raises goes through.
        """
        held = list(self._candidates(tokens))
        best = max(held, key=lambda entry: entry.common, default=None)
        if len(tokens) - (best.common if best is not None else 0) < MIN_TOKENS:
            return
        name = hashlib.sha256(np.asarray(tokens, "<i4").tobytes()).hexdigest()[:32]
        path = self._directory / f"{self._name_start}{name}.prefix"
        try:
            self._store(path, tokens, pieces)
        except TooLargeError as error:
            self._warn(f"prompt cache: a prompt is too long to be stored: {error.message}")
        except OSError as error:
            self._warn(f"prompt cache: cannot write to {self._directory}: {error.strerror or error}")
        else:
            for entry in held:
                if entry.common == entry.length and entry.path != path:
                    _remove(entry.path)
        _remove_stale(self._directory)
        self._evict(path)

    def _store(self, path: Path, tokens: Sequence[int], pieces: Iterable[Piece]) -> None:
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        # mkstemp makes files that only the user may read.
        descriptor, name = tempfile.mkstemp(prefix=".prefix-", suffix=".tmp", dir=self._directory)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                write_entry(file, self._texts, self._key.model_name, tokens, pieces, self._limit)
            temporary.replace(path)
        except BaseException:
            _remove(temporary)
            raise

    def _candidates(self, tokens: Sequence[int]) -> Iterator[Entry]:
        """The entries under this key with at least MIN_TOKENS of `tokens`."""
        wanted = np.asarray(tokens, np.int32)
        for path, _status in self._files():
            if path.name.startswith(self._name_start):
                index = self._index(path)
                common = _common(index.tokens, wanted) if index is not None else 0
                if index is not None and common >= MIN_TOKENS:
                    yield Entry(path, len(index.tokens), common)

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        try:
            return _files(self._directory, _NAME)
        except OSError as error:
            self._warn(f"prompt cache: cannot list {self._directory}: {error.strerror or error}")
            return []

    def _index(self, path: Path) -> Index | None:
        """The index of a file under this key; None, with a warning at need, for any other."""
        try:
            with path.open("rb") as file:
                return self._ours(read_index(file))
        except FileNotFoundError:
            pass
        except DamagedFileError as error:
            self._drop(path, error)
        except OSError as error:
            self._warn(f"prompt cache: {path} cannot be read: {error.strerror or error}")
        return None

    def _ours(self, index: Index | None) -> Index | None:
        return index if index is not None and index.key == self._texts else None

    def _drop(self, path: Path, error: DamagedFileError) -> None:
        self._warn(f"prompt cache: {path} is damaged and not used: {error.message}")
        _remove(path)

    def _warn(self, line: str) -> None:
        if line not in self._warned:
            self._warned.add(line)
            self._warn_user(line)

    def _evict(self, kept: Path) -> None:
        files = sorted(self._files(), key=lambda item: item[1].st_mtime_ns)
        total = sum(status.st_size for _path, status in files)
        for path, status in files:
            if total <= self._limit:
                return
            if path != kept:
                _remove(path)
                total -= status.st_size


def entries(directory: Path) -> list[EntrySummary]:
    """What is stored in `directory`, the last used first. Raises OSError if it cannot be listed."""
    found = []
    for path, status in _files(directory, _NAME):
        summary = EntrySummary(path, status.st_size, status.st_mtime)
        try:
            with path.open("rb") as file:
                index = read_index(file)
        except FileNotFoundError:
            continue
        except DamagedFileError as error:
            summary = replace(summary, problem=f"damaged: {error.message}")
        except OSError as error:
            summary = replace(summary, problem=f"unreadable: {error.strerror or error}")
        else:
            if index is None:
                summary = replace(summary, problem="of another version of abcli")
            else:
                summary = replace(summary, tokens=len(index.tokens), model=index.model, key=index.key)
        found.append(summary)
    return sorted(found, key=lambda summary: summary.last_use, reverse=True)


def clear(directory: Path, older_than: float = 0.0) -> tuple[int, int]:
    """Remove what was last used more than `older_than` seconds ago; the numbers of files and bytes that went.

    Files that are not abcli's stay, and so do those that are being written. Raises OSError if one cannot be removed.
    """
    removed = size = 0
    latest = time.time() - older_than
    for path, status in _files(directory, _NAME):
        if older_than <= 0 or status.st_mtime < latest:
            path.unlink(missing_ok=True)
            removed += 1
            size += status.st_size
    _remove_stale(directory)
    return removed, size


def _common(held: NDArray[np.int32], wanted: NDArray[np.int32]) -> int:
    """The length of the common prefix."""
    shorter = min(len(held), len(wanted))
    differs = held[:shorter] != wanted[:shorter]
    return int(differs.argmax()) if differs.any() else shorter


def _files(directory: Path, pattern: re.Pattern[str]) -> list[tuple[Path, os.stat_result]]:
    """The regular files of `directory` whose names fit `pattern`, with their status; none if it does not exist."""
    found = []
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as items:
        for item in items:
            with contextlib.suppress(FileNotFoundError):
                if pattern.fullmatch(item.name) and item.is_file(follow_symlinks=False):
                    found.append((Path(item.path), item.stat(follow_symlinks=False)))
    return found


def _remove(path: Path) -> None:
    """Remove a file if that is possible; one that another process has open lives on for it."""
    with contextlib.suppress(OSError):
        path.unlink()


def _remove_stale(directory: Path) -> None:
    """Remove temporary files whose writer is gone."""
    with contextlib.suppress(OSError):
        for path, status in _files(directory, _TEMPORARY):
            if time.time() - status.st_mtime > STALE_SECONDS:
                _remove(path)
