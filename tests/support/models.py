"""Models of files, opened as the layers above do it, on the CPU unless a test asks for a device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abcli.config import BucketConfig, Buckets, ContextConfig, LoraConfig, ModelConfig
from abcli.gguf.checked import CheckedModel, check_model
from abcli.native.model import Model
from abcli.rope.bases import resolve_buckets


def checked_model(path: Path, gpu_layers: int = 0, lora: Sequence[LoraConfig] = ()) -> CheckedModel:
    """The checked model of a file with its adapters."""
    return check_model(ModelConfig(path, gpu_layers, tuple(lora)))


def open_model(path: Path, gpu_layers: int = 0, lora: Sequence[LoraConfig] = ()) -> Model:
    """The loaded model of a file with its adapters."""
    return Model(checked_model(path, gpu_layers, lora))


def buckets_at(*bases: float, prefill_base: float | None = None, native: float = 10_000.0) -> Buckets:
    """Buckets with these bases, of a model trained with `native`."""
    return resolve_buckets(BucketConfig(bases=bases), native, prefill_base)


def set_up(
    bases: Sequence[float], prefill_base: float | None = None, native: float = 10_000.0, **context: Any
) -> tuple[ContextConfig, Buckets]:
    """What an engine is made with besides its model."""
    return ContextConfig(**context), buckets_at(*bases, prefill_base=prefill_base, native=native)
