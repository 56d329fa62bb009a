"""What commands want to know of this machine and of llama.cpp on it, without a model that is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from abcli.engine.memory import Prediction, Room, free_room, predict
from abcli.engine.prompt_cache import EntrySummary, clear, entries
from abcli.engine.workers import available_cores
from abcli.native.crash_probe import ensure_loadable
from abcli.native.llama import Device, devices, echo_log, version
from abcli.native.rotating.hook import hook_obstacle

__all__ = [
    "Device",
    "EntrySummary",
    "Prediction",
    "Room",
    "available_cores",
    "clear",
    "describe",
    "devices",
    "ensure_loadable",
    "entries",
    "free_room",
    "log_to",
    "predict",
    "version",
]


def log_to(write: Callable[[str], object] | None) -> None:
    """Pass every piece of llama.cpp's log to `write` from now on; None stops it."""
    echo_log(write)


def describe() -> dict[str, Any]:
    """llama.cpp's version and devices (memory in bytes), and why its graphs cannot be changed here, "" if they can."""
    return {
        "version": version(),
        "devices": [asdict(device) for device in devices()],
        "hook_obstacle": hook_obstacle(),
        "cores": available_cores(),
    }
