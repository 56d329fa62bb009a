"""From a file and settings to a model and an engine, with every check before llama.cpp sees the file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from time import perf_counter

from abcli.config import BucketConfig, EngineConfig
from abcli.engine.choose import Choice, choose
from abcli.engine.engine import Engine
from abcli.engine.make import make_engine
from abcli.engine.memory import MAX_CONTEXT, Prediction, check, gibibytes
from abcli.errors import UnsupportedModelError, UsageError
from abcli.gguf.header import Header
from abcli.gguf.lora import check_model, warn_of_ignored
from abcli.native.crash_probe import ensure_loadable
from abcli.native.model import Model
from abcli.rope.bases import choose_bases
from abcli.text import counted


@dataclass(frozen=True)
class Opened:
    """A model ready to generate.

    `load_seconds` is what checking, loading, choosing and making the engine took, `memory` what that should take.
    """

    model: Model
    engine: Engine
    header: Header
    load_seconds: float
    engine_choice: Choice
    memory: Prediction


@contextmanager
def open_engine(
    config: EngineConfig,
    buckets: BucketConfig,
    warn: Callable[[str], None] = lambda _line: None,
    say: Callable[[str], None] = lambda _text: None,
) -> Iterator[Opened]:
    """Check and load `config.model`, choose the bases and make an engine; all is freed after the block.

    `config.bases` is ignored in favour of `buckets`; a context size of 0 becomes the trained length; `config.engine`
    "auto" is decided by measuring, once per model and machine. `warn` gets a line for what goes wrong without harm,
    `say` one for what takes its time.

    Raises ModelFileError, UnsupportedModelError, UsageError, OutOfMemoryError and NativeError.
    """
    begin = perf_counter()
    header = check_model(config.model, config.lora)
    bases = choose_bases(buckets, header.native_base)
    if config.prefill_base is not None:
        (prefill_base,) = choose_bases(BucketConfig(bases=(config.prefill_base,)), header.native_base)
        config = replace(config, prefill_base=prefill_base)
    config = replace(config, bases=bases, context_size=_context_size(config, header))
    memory = check_memory(config, header)
    say(f"loading {header.name}: about {gibibytes(memory.total)} of memory for {counted(len(bases), 'bucket')}")
    ensure_loadable(config.model, header)
    warn_of_ignored(header, warn)
    with Model(config.model, config.gpu_layers, header.adapters) as model:
        check_buckets(model, len(bases))
        choice = choose(model, config, header, say=say)
        with make_engine(choice.kind, model, config, header, warn) as engine:
            yield Opened(model, engine, header, perf_counter() - begin, choice, memory)


def check_memory(config: EngineConfig, header: Header) -> Prediction:
    """What a set-up is predicted to need. Raises OutOfMemoryError if that does not fit, unless `config.force`."""
    return check(config, header, force=config.force)


def _context_size(config: EngineConfig, header: Header) -> int:
    size = config.context_size or header.trained_context
    if not 0 < size <= MAX_CONTEXT:
        raise UsageError(
            f"a context of {size} tokens is impossible",
            f"choose 1 to {MAX_CONTEXT}, or 0 for the trained length",
        )
    return size


def check_buckets(model: Model, buckets: int) -> None:
    """Several buckets need keys that are rotated by RoPE and nothing else that carries the past.

    Raises UnsupportedModelError for a model that is otherwise.
    """
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
