"""Starts `abcli serve` with llama-server's flags, for what starts a llama-server itself, such as llama.cpp's tests.

Where --model names no file, as when a model is to be fetched, it serves ABCLI_MODEL, or the default model; flags in
ABCLI_SERVE_FLAGS are added. A flag of llama-server's that has no counterpart ends it with an error that names it.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from abcli.cli._entry import main

# What means the same; None: under the same name.
SAME = {
    "--port": None,
    "--host": None,
    "--temp": None,
    "--seed": None,
    "--batch-size": None,
    "--ubatch-size": None,
    "--threads": None,
    "--n-gpu-layers": "--gpu-layers",
    "--alias": None,
    "--parallel": None,
    "--n-predict": "--predict",
    "--api-key": None,
    "--chat-template": None,
    "--chat-template-file": "--chat-template",
    "--reasoning-format": None,
    "--reasoning": "--thinking",
    "-fa": None,
    "-ctk": None,
    "-ctv": None,
}
# Where models come from, and what is always so here.
WITHOUT_MEANING = {"--hf-repo": 1, "--hf-file": 1, "--model": 1, "--offline": 0, "--cont-batching": 0, "--jinja": 0}
WITHOUT_MEANING |= {"--no-jinja": 0, "--verbose": 0}
USUAL_SLOTS = 4


class UnknownFlagError(Exception):
    """A flag that has no counterpart."""


def translated(arguments: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """The arguments of `abcli serve` that mean what those of llama-server do. Raises UnknownFlagError."""
    found: dict[str, str | None] = {}
    waiting = list(arguments)
    while waiting:
        flag = waiting.pop(0)
        if flag in ("--slots", "--no-slots", "--metrics") or WITHOUT_MEANING.get(flag) == 0:
            found[flag] = None
        elif flag in SAME or flag in WITHOUT_MEANING or flag in ("--ctx-size", "--cors-origins"):
            found[flag] = waiting.pop(0)
        else:
            raise UnknownFlagError(flag)
    result = ["serve"]
    model = found.get("--model") or ""
    model = model if Path(model).is_file() else environment.get("ABCLI_MODEL", "")
    result += [model] if model else []
    for flag, value in found.items():
        if flag in SAME:
            # A template that knows thoughts is asked for them.
            value = "on" if (flag, value) == ("--reasoning", "auto") else value
            result += [SAME[flag] or flag, str(value)]
    if (size := found.get("--ctx-size")) is not None:
        # llama-server divides its context among the slots.
        result += ["--ctx-size", str(int(size) // int(found.get("--parallel") or USUAL_SLOTS))]
    if found.get("--cors-origins", "localhost") != "localhost":
        result += ["--cors-origin", str(found["--cors-origins"])]
    result += ["--no-slots"] if "--no-slots" in found else []
    result += [] if "--metrics" in found else ["--no-metrics"]
    return result + shlex.split(environment.get("ABCLI_SERVE_FLAGS", ""))


if __name__ == "__main__":
    try:
        sys.argv[1:] = translated(sys.argv[1:], os.environ)
    except UnknownFlagError as unknown:
        sys.exit(f"error: abcli serve has no counterpart of {unknown}")
    main()
