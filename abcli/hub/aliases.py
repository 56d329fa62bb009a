"""Names that the user gives to models: one JSON file, written atomically under a lock."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from abcli.atomic import write_atomically
from abcli.config import aliases_file
from abcli.errors import ModelFileError, UsageError

MAX_NAME = 64
_VERSION = 1
_MAX_BYTES = 1 << 20
_LOCK_PATIENCE_SECONDS = 20
_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._-]{{0,{MAX_NAME - 1}}}")
_RESERVED = ("default",)


def check_alias(name: str) -> str:
    """`name` if a model may be called so. Raises UsageError."""
    if not _NAME.fullmatch(name) or name.lower() in _RESERVED or name.lower().endswith(".gguf"):
        raise UsageError(
            f"{name!r:.100} cannot be an alias",
            f"take 1 to {MAX_NAME} letters, digits, '.', '_' and '-'; not 'default', and not ending in .gguf",
        )
    return name


def aliases() -> dict[str, str]:
    """Every alias with what it stands for. Raises ModelFileError for a file that is damaged or cannot be read."""
    path = aliases_file()
    try:
        with path.open("rb") as file:
            return _decode(file.read(_MAX_BYTES + 1))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelFileError(
            f"cannot read the aliases in {path}: {reason:.200}", "repair the file, or remove it and its aliases"
        ) from error


def set_alias(name: str, target: str) -> str | None:
    """Let `name` stand for `target` from now on; what it stood for before. Raises UsageError and ModelFileError."""
    check_alias(name)
    with _changing() as table:
        before = table.get(name)
        table[name] = target
    return before


def remove_alias(name: str) -> str:
    """Forget an alias; what it stood for. Raises ModelFileError if there is none of that name."""
    with _changing() as table:
        if name not in table:
            known = ", ".join(sorted(table))
            raise ModelFileError(
                f"there is no alias {name!r:.100}", f"there are: {known}" if known else "there is none at all"
            )
        return table.pop(name)


def _decode(data: bytes) -> dict[str, str]:
    """The aliases in the file's JSON. Raises ValueError."""
    if len(data) > _MAX_BYTES:
        raise ValueError("it is too large")
    content: Any = json.loads(data)
    if not isinstance(content, dict) or content.get("version") != _VERSION:
        raise ValueError(f"it is not a file of aliases, version {_VERSION}")
    table = content.get("aliases")
    if not isinstance(table, dict) or not all(isinstance(target, str) and target for target in table.values()):
        raise ValueError("an alias does not stand for a name")
    return table


@contextmanager
def _changing() -> Iterator[dict[str, str]]:
    """The aliases, to be changed in place; they are written after the block, unless it raises."""
    path = aliases_file()
    with _locked(path):
        table = aliases()
        before = dict(table)
        yield table
        if table == before:
            return
        content = {"version": _VERSION, "aliases": dict(sorted(table.items()))}
        try:
            write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=True) + "\n").encode())
        except OSError as error:
            raise _unwritable(path, error) from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # Few commands write, and this takes a while to import.
    from filelock import FileLock, Timeout

    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=_LOCK_PATIENCE_SECONDS, mode=0o600)
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ModelFileError(f"another process is writing to {path}", "try again when it has ended") from None
    except (OSError, NotImplementedError) as error:
        raise _unwritable(path, error) from error
    try:
        yield
    finally:
        lock.release()


def _unwritable(path: Path, error: Exception) -> ModelFileError:
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ModelFileError(f"cannot write {path}: {reason}", "check its permissions and the space on its disk")
