"""What is installed, what llama.cpp finds on this machine, and what is stored; nothing here fails."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from abcli.config import (
    engines_directory,
    evaluations_directory,
    home,
    profiles_directory,
    prompt_cache_directory,
    sessions_directory,
)
from abcli.version import __version__

# llama.cpp is asked in another process: where it was built for another CPU, it ends the process that loads it.
_ASK = "import json; from abcli.machine import describe; print(json.dumps(describe()))"
_ASK_SECONDS = 60
_EXTRA = re.compile(r"""^([\w.-]+).*;.*\bextra == ["']([\w.-]+)["']""")
# What only those need who change abcli.
_DEVELOPERS = ("dev", "docs")


def diagnose() -> dict[str, Any]:
    """Everything, as JSON has it; sizes in bytes. A part that cannot be found out holds `problem`, in words."""
    return {
        "abcli": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "llama_cpp": _found_out(_native),
        "extras": _found_out(extras),
        "memory": _found_out(_memory),
        "default_model": _found_out(_default_model),
        "stored": _found_out(_stored),
    }


def _found_out(find: Callable[[], Any]) -> Any:
    try:
        return find()
    except Exception as error:
        # A broken installation is what this is for.
        return {"problem": f"{type(error).__name__}: {error}"[:300]}


def _native() -> dict[str, Any]:
    """What `abcli.machine.describe` says in a process of its own."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=_ASK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return {"problem": f"llama.cpp gave no answer in {_ASK_SECONDS} seconds"}
    if done.returncode == 0:
        return dict(json.loads(done.stdout))
    lines = done.stderr.strip().splitlines()
    ending = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    return {"problem": (lines[-1] if lines else f"loading llama.cpp ended with {ending}")[:300]}


def extras() -> dict[str, dict[str, str]]:
    """What each extra brings: its packages with their versions, "" for one that is missing."""
    found: dict[str, dict[str, str]] = {}
    for requirement in importlib.metadata.requires("abcli") or ():
        if (match := _EXTRA.match(requirement)) and match[2] not in _DEVELOPERS:
            version = ""
            with suppress(importlib.metadata.PackageNotFoundError):
                version = importlib.metadata.version(match[1])
            found.setdefault(match[2], {})[match[1]] = version
    return dict(sorted(found.items()))


def _memory() -> dict[str, Any]:
    memory, load = psutil.virtual_memory(), psutil.getloadavg()[0]
    return {"total": memory.total, "free": memory.available, "processors": os.cpu_count() or 1, "load": round(load, 1)}


def _default_model() -> str:
    from abcli.hub.locate import locate_model

    return str(locate_model(None).absolute())


def _stored() -> dict[str, dict[str, Any]]:
    """Path, size and number of files of each folder that abcli keeps."""
    from abcli.hub.cache import cache_directory

    folders = {
        "prompts": prompt_cache_directory(),
        "evaluations": evaluations_directory(),
        "profiles": profiles_directory(),
        "sessions": sessions_directory(),
        "engines": engines_directory(),
        "models of the hub": cache_directory(),
        "own models": home() / "models",
    }
    return {name: {"path": str(path), **_size(path)} for name, path in folders.items()}


def _size(folder: Path) -> dict[str, int]:
    """Bytes and files below a folder; links, of which the hub's cache is full, count nothing."""
    size = files = 0
    for root, _folders, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                status = os.lstat(os.path.join(root, name))  # noqa: PTH118 - many files
                size, files = size + status.st_blocks * 512, files + 1
    return {"size": size, "files": files}
