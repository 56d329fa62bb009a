"""From the name of a model and settings to an LLM."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from abcli.config import (
    DEFAULT_CONTEXT,
    ContextConfig,
    FlashAttention,
    LoraConfig,
    MergeRule,
    ModelConfig,
    Spread,
    prompt_cache_directory,
)
from abcli.errors import UsageError
from abcli.hub.locate import Fetch, locate_model
from abcli.llm.model import LLM
from abcli.prepare import AUTO_PROFILE, Warn, prepare
from abcli.rope.bases import asked_buckets
from abcli.sampling import GateSetting, check_gate

# The settings of a context that `load` hands on as they are.
_CONTEXT_SETTINGS = (
    *("slots", "batch_size", "ubatch_size", "threads", "cache_type_k", "cache_type_v", "prefill", "engine", "force"),
)


def load(
    model: str | os.PathLike[str] | None = None,
    *,
    buckets: int | None = None,
    bases: Sequence[float] = (),
    multipliers: Sequence[float] = (),
    spread: Spread | None = None,
    merge: MergeRule | None = None,
    weights: Sequence[float] = (),
    profile: str = AUTO_PROFILE,
    lora: Sequence[str | os.PathLike[str] | LoraConfig] = (),
    gpu_layers: int = -1,
    ctx_size: int = DEFAULT_CONTEXT,
    prefill_base: float | None = None,
    gate: GateSetting = None,
    prompt_cache: bool | str | os.PathLike[str] = False,
    chat_template: str | None = None,
    flash_attn: FlashAttention = "auto",
    fetch: Fetch | None = None,
    warn: Warn = lambda _line: None,
    **context: Any,
) -> LLM:
    """A loaded model: `model` is a path, a name as `abcli models` knows them, or None for the default model.

    `buckets`, `bases`, `multipliers`, `spread`, `merge` and `weights` say which buckets; without any, the model's
    profile does (`profile`: "auto", "none" or a name), else six. The other settings have the names, meanings and
    defaults of the command line's flags: in `context` may be slots, batch_size, ubatch_size, threads, cache_type_k,
    cache_type_v, prefill, engine and force. `gate` is that of answers whose settings name none. `fetch` gets the name
    of a model that is not here, one of the hub or the default one, and returns its path; without, that is an error.
    `warn` gets a line for what goes wrong without harm.

    Raises UsageError, TemplateError, ModelFileError, UnsupportedModelError, ProfileError, OutOfMemoryError,
    NativeError, and what `fetch` raises.
    """
    for name in context:
        if name not in _CONTEXT_SETTINGS:
            known = ", ".join(_CONTEXT_SETTINGS)
            raise UsageError(f"there is no setting `{name}`", f"beside load's own: {known}", setting=name)
    cache = prompt_cache_directory() if prompt_cache is True else Path(prompt_cache) if prompt_cache else None
    given = any(value is not None for value in (buckets, spread, merge)) or any((bases, multipliers, weights))
    asked = asked_buckets(buckets, bases, multipliers, spread, merge, weights) if given else None
    return LLM(
        prepare(
            ModelConfig(
                locate_model(None if model is None else os.fspath(model), fetch),
                gpu_layers,
                tuple(one if isinstance(one, LoraConfig) else LoraConfig(Path(one)) for one in lora),
            ),
            ContextConfig(
                context_size=ctx_size,
                flash_attention=flash_attn,
                prompt_cache=cache,
                gated="auto" if gate == "auto" else check_gate(gate) is not None,
                **context,
            ),
            asked,
            prefill_base=prefill_base,
            profile=profile,
            warn=warn,
        ),
        chat_template=chat_template,
        gate=check_gate(gate),
        warn=warn,
    )
