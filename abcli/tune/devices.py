"""Where torch computes, and in how much memory."""

from __future__ import annotations

import torch

from abcli.engine.memory import available_memory
from abcli.errors import UsageError


def torch_device(name: str) -> torch.device:
    """The device that `name` means: "auto" is a GPU if torch has one. Raises UsageError for one that is not there."""
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind in ("cuda", "mps") if has[kind]), "cpu")
    if not has[name]:
        raise UsageError(f"torch has no device {name} here", "use `device=auto`")
    return torch.device(name)


def free_bytes(device: torch.device) -> int:
    """The bytes of memory that torch can take on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return available_memory()
