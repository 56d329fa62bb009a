"""From a file and settings to a model and an engine, with every check before llama.cpp sees the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

import psutil

from abcli.config import BucketConfig, EngineConfig
from abcli.engine.contexts import ContextsEngine
from abcli.engine.protocol import Engine
from abcli.errors import OutOfMemoryError, UnsupportedModelError, UsageError
from abcli.models.check import check_file
from abcli.models.header import Header
from abcli.native.library import supports_offload
from abcli.native.model import Model
from abcli.native.trial import ensure_loadable
from abcli.rope.bases import choose_bases

_CGROUP_MEMORY = Path("/sys/fs/cgroup")
_GIB = 1 << 30
# llama.cpp pads a context to a multiple of this (llama-context.cpp).
_CONTEXT_STEP = 256
_MAX_CONTEXT = 2**31 - _CONTEXT_STEP


@dataclass(frozen=True)
class Opened:
    """A model ready to generate; `load_seconds` is what checking, loading and making contexts took."""

    model: Model
    engine: Engine
    header: Header
    load_seconds: float


@contextmanager
def open_engine(
    config: EngineConfig, buckets: BucketConfig, warn: Callable[[str], None] | None = None
) -> Iterator[Opened]:
    """Check and load `config.model`, choose the bases and make an engine; all is freed after the block.

    `config.bases` is ignored in favour of `buckets`; a context size of 0 becomes the trained length. `warn` gets a
    line for what goes wrong without harm. Raises
    ModelFileError, UnsupportedModelError, UsageError, OutOfMemoryError and NativeError.
    """
    begin = perf_counter()
    header = check_file(config.model)
    bases = choose_bases(buckets, header.native_base)
    if config.prefill_base is not None:
        (prefill_base,) = choose_bases(BucketConfig(bases=(config.prefill_base,)), header.native_base)
        config = replace(config, prefill_base=prefill_base)
    config = replace(config, bases=bases, context_size=_context_size(config, header))
    check_memory(config, header)
    ensure_loadable(config.model, header)
    with Model(config.model, config.gpu_layers) as model:
        _check_buckets(model, len(bases))
        with ContextsEngine(model, config, warn, header) as engine:
            yield Opened(model, engine, header, perf_counter() - begin)


def check_memory(config: EngineConfig, header: Header) -> None:
    """Refuse a set-up whose caches cannot fit into the memory of this machine.

    Raises OutOfMemoryError. Layers on a GPU are left to llama.cpp, which knows that device's memory.
    """
    if config.gpu_layers != 0 and supports_offload():
        return
    per_bucket = header.kv_bytes_per_token(config.cache_type_k, config.cache_type_v)
    cells = _padded(config.context_size) * config.slots
    contexts = len(config.bases)
    if config.prefill != "exact" and contexts > 1 and (config.prefill_base or header.native_base) not in config.bases:
        contexts += 1  # the one that prefills for the others
    needed = per_bucket * cells * contexts
    available = available_memory()
    if needed > available:
        raise OutOfMemoryError(
            f"{contexts} caches of {cells} tokens need {needed / _GIB:.1f} GiB, "
            f"but {available / _GIB:.1f} GiB are free",
            _what_fits(per_bucket, available, config),
        )


def available_memory() -> int:
    """The bytes of memory this process can still take, container limits included."""
    available = int(psutil.virtual_memory().available)
    try:
        limit = int((_CGROUP_MEMORY / "memory.max").read_text())
        used = int((_CGROUP_MEMORY / "memory.current").read_text())
    except (OSError, ValueError):
        return available  # no limit, or no cgroups on this system
    return min(available, max(0, limit - used))


def _what_fits(per_bucket: int, available: int, config: EngineConfig) -> str:
    longest = available // (per_bucket * len(config.bases) * config.slots)
    longest -= longest % _CONTEXT_STEP
    if longest >= _CONTEXT_STEP:
        return f"a context of {longest} tokens would fit (--ctx-size {longest}); or take fewer buckets"
    return "take fewer buckets (--buckets) or smaller caches (--cache-type-k q8_0 --cache-type-v q8_0)"


def _context_size(config: EngineConfig, header: Header) -> int:
    size = config.context_size or header.trained_context
    if not 0 < size <= _MAX_CONTEXT:
        raise UsageError(
            f"a context of {size} tokens is impossible",
            f"choose 1 to {_MAX_CONTEXT}, or 0 for the trained length",
        )
    return size


def _padded(cells: int) -> int:
    return -(-cells // _CONTEXT_STEP) * _CONTEXT_STEP


def _check_buckets(model: Model, buckets: int) -> None:
    """Several buckets need keys that are rotated by RoPE and nothing else that carries the past."""
    if buckets == 1:
        return
    if model.is_recurrent:
        reason = "keeps a recurrent state, which no RoPE base reaches"
    elif not model.has_rope:
        reason = "does not use RoPE, so there is no base to vary"
    else:
        return
    raise UnsupportedModelError(
        f"{os.fspath(model.path)} ({model.architecture}) {reason}", "use --buckets 1 with this model"
    )
