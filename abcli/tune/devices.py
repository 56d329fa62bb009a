"""Where torch computes."""

from __future__ import annotations

import torch

from abcli.errors import UsageError


def torch_device(name: str) -> torch.device:
    """The device that `name` means: "auto" is a GPU if torch has one. Raises UsageError for one that is not there."""
    has = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = next((kind for kind in ("cuda", "mps") if has[kind]), "cpu")
    if not has[name]:
        raise UsageError(f"torch has no device {name} here", "use --device auto")
    return torch.device(name)
