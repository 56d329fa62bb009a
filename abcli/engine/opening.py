"""From a checked model and settings to an engine, with every check before llama.cpp sees the file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

from abcli.config import USUAL_GATE, Buckets, ContextConfig
from abcli.engine.choose import Choice, choose
from abcli.engine.engine import Engine
from abcli.engine.gating import paying_gate
from abcli.engine.make import make_engine
from abcli.engine.memory import Prediction, check_memory
from abcli.errors import UnsupportedModelError
from abcli.gguf.checked import CheckedModel
from abcli.gguf.lora import warn_of_ignored
from abcli.native.crash_probe import ensure_loadable
from abcli.native.model import Model
from abcli.text import counted, gibibytes


@dataclass(frozen=True)
class Opened:
    """A model ready to decode with.

    `load_seconds` is what loading, choosing and making the engine took, `memory` what that should take.
    """

    model: Model
    engine: Engine
    load_seconds: float
    engine_choice: Choice
    memory: Prediction
    gate: float | None = USUAL_GATE
    """What "auto" stands for."""


@contextmanager
def open_engine(
    checked: CheckedModel,
    context: ContextConfig,
    buckets: Buckets,
    warn: Callable[[str], None],
    say: Callable[[str], None] = lambda _text: None,
) -> Iterator[Opened]:
    """Load a model and make an engine for it; all is freed after the block.

    The engine "auto" is decided by measuring, once per model and machine. `warn` gets a line for what goes wrong
    without harm, `say` one for what takes its time.

    Raises ModelFileError, UnsupportedModelError, OutOfMemoryError and NativeError.
    """
    begin = perf_counter()
    memory = check_memory(checked, context, buckets)
    count = counted(len(buckets.bases), "bucket")
    say(f"loading {checked.name}: about {gibibytes(memory.total)} of memory for {count}")
    ensure_loadable(checked)
    warn_of_ignored(checked.adapters, warn)
    with Model(checked) as model:
        check_buckets(model, len(buckets.bases))
        choice = choose(model, context, buckets, say=say)
        with make_engine(choice.kind, model, context, buckets, warn) as engine:
            gate: float | None = buckets.gate
            if context.gated == "auto":
                gate = paying_gate(checked, engine, choice.kind, context, buckets.gate, say)
            yield Opened(model, engine, perf_counter() - begin, choice, memory, gate)


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
    raise UnsupportedModelError(f"{model.path} ({model.architecture}) {reason}", "use `buckets=1` with this model")
