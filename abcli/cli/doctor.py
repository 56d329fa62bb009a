"""`abcli doctor`: what is installed, what this machine has, and what to try when something is slow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from abcli.config import PROMPT_CACHE_LIMIT
from abcli.diagnosis import diagnose
from abcli.text import counted, gibibytes
from abcli.ui.terminal import Terminal, one_line

_LITTLE_MEMORY = 2 << 30
_NEARLY = 0.9


def doctor(*, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False) -> None:
    """A screen of facts on standard output; what is broken is said, and never an error."""
    report = diagnose()
    report["advice"] = list(advice(report))
    text = json.dumps(report, ensure_ascii=False) if as_json else "\n".join(_lines(report))
    Terminal().write(text + "\n")


def _lines(report: dict[str, Any]) -> list[str]:
    rows = [
        ("abcli", f"{report['abcli']}, Python {report['python']}, {report['system']}"),
        *_native(report["llama_cpp"]),
        ("extras", _or_problem(report["extras"], _extras)),
        ("memory", _or_problem(report["memory"], _memory)),
        (
            "model",
            report["default_model"] if isinstance(report["default_model"], str) else "the default one is missing",
        ),
        *_stored(report["stored"]),
        *[("try", line) for line in report["advice"]],
    ]
    width = max(len(title) for title, _ in rows) + 2
    return [f"{title.ljust(width)}{one_line(text)}" for title, text in rows]


def _or_problem(part: dict[str, Any], show: Any) -> str:
    return f"unknown: {part['problem']}" if "problem" in part else str(show(part))


def _native(native: dict[str, Any]) -> list[tuple[str, str]]:
    if "problem" in native:
        return [("llama.cpp", f"does not load: {native['problem']}")]
    hook = native["hook_obstacle"]
    return [
        ("llama.cpp", native["version"].removeprefix("llama.cpp ")),
        *[("device", _device(device)) for device in native["devices"]],
        ("engine", f"buckets are turned {f'beside its graph: {hook}' if hook else 'in its graph, the fast way'}"),
    ]


def _device(device: dict[str, Any]) -> str:
    memory = f", {gibibytes(device['free_memory'])} free" if device["total_memory"] else ""
    return f"{device['name']}: {device['description']}{memory}"


def _extras(extras: dict[str, dict[str, str]]) -> str:
    here = [name for name, packages in extras.items() if all(packages.values())]
    missing = [name for name in extras if name not in here]
    return f"{', '.join(here) or 'none'}" + (f"; not installed: {', '.join(missing)}" if missing else "")


def _memory(memory: dict[str, Any]) -> str:
    room = f"{gibibytes(memory['free'])} of {gibibytes(memory['total'])} free"
    return f"{room}; {counted(memory['processors'], 'processor')}, load {memory['load']}"


def _stored(stored: dict[str, Any]) -> list[tuple[str, str]]:
    if "problem" in stored:
        return [("stored", f"unknown: {stored['problem']}")]
    return [
        (name, f"{decimal(found['size'])}, {counted(found['files'], 'file')} in {found['path']}")
        for name, found in stored.items()
        if found["files"]
    ]


def advice(report: dict[str, Any]) -> Iterator[str]:
    """What to do about what is wrong, and about slowness, a line each; `report` is `diagnose`'s."""
    native, memory, stored = report["llama_cpp"], report["memory"], report["stored"]
    if "problem" in native:
        yield "llama.cpp does not load: install llama-cpp-python again (in a checkout: make distclean setup)"
    else:
        devices = [device for device in native["devices"] if not device["name"].upper().startswith(("CPU", "BLAS"))]
        if not devices and shutil.which("nvidia-smi"):
            yield "there seems to be an NVIDIA GPU, and llama.cpp was built without CUDA: make setup ACCEL=cuda"
        if native["hook_obstacle"]:
            yield "one batch of all buckets costs more here than it should: try --engine contexts"
    if "problem" in stored:
        yield "a setting or a folder cannot be read: check the variables that begin with HF_ and ABCLI_"
    elif stored["prompts"]["size"] > _NEARLY * PROMPT_CACHE_LIMIT:
        yield "the prompt cache is nearly full, and old prompts are dropped: abcli cache clear --older-than 7"
    if isinstance(report["default_model"], dict):
        yield "the default model is not here: abcli pull default fetches it"
    if memory.get("free", _LITTLE_MEMORY) < _LITTLE_MEMORY:
        yield f"only {gibibytes(memory['free'])} of memory are free: close programs, or take a smaller -c or --buckets"
    if memory.get("load", 0) > memory.get("processors", 1):
        yield f"other programs keep the cores busy (load {memory['load']} on {memory['processors']}): wait, or end them"
    yield "slow answers: --buckets 3 or --gate 0.5 ask for less; abcli bench MODEL measures what is fast here"
    yield "slow prompts: --prompt-cache keeps long ones; slow first answers: engines are tried once for each model"
