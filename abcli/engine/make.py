"""From a loaded model and settings to an engine of one kind or the other."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Literal

from abcli.config import PROMPT_CACHE_LIMIT, Buckets, ContextConfig
from abcli.engine.backend import Backend
from abcli.engine.contexts import ContextsBackend
from abcli.engine.engine import MIN_SHARED_TOKENS, Engine
from abcli.engine.fused import FusedBackend
from abcli.engine.memory import outputs_at_once
from abcli.engine.prompt_cache import CacheKey, PromptCache
from abcli.gguf.checked import CheckedModel
from abcli.native.model import Model

Kind = Literal["fused", "contexts"]


def make_engine(
    kind: Kind, model: Model, config: ContextConfig, buckets: Buckets, warn: Callable[[str], None] = lambda _line: None
) -> Engine:
    """An engine for `buckets`; the model stays the caller's and must outlive it.

    `warn` gets a line for what goes wrong with the prompt cache on disk. Raises UnsupportedModelError for a model that
    a fused engine cannot serve, with the reason, and NativeError if llama.cpp cannot make a context.
    """
    config = replace(config, outputs=outputs_at_once(model.checked, config, len(buckets.bases), fused=kind == "fused"))
    with ExitStack() as stack:
        backend: Backend
        backend = FusedBackend(model, config, buckets) if kind == "fused" else ContextsBackend(model, config, buckets)
        stack.callback(backend.close)
        cache = None
        if config.prompt_cache is not None:
            if (backend.buckets > 1 and not backend.sharing.shared) or model.is_recurrent:
                warn(f"`prompt_cache` needs a shared prefill or a single bucket: {backend.sharing}")
            else:
                cache = _open_cache(config.prompt_cache, backend, config, model.checked, warn)
        engine = Engine(
            backend,
            slots=config.slots,
            context_size=config.context_size,
            vocabulary_size=model.vocabulary_size,
            least_shared=2 if config.prefill == "shared" else MIN_SHARED_TOKENS,
            cache=cache,
            forgets=not model.is_recurrent,
        )
        stack.pop_all()
    return engine


def _open_cache(
    directory: Path, backend: Backend, config: ContextConfig, model: CheckedModel, warn: Callable[[str], None]
) -> PromptCache:
    scaling, build = backend.cell_format
    key = CacheKey(
        model=model.fingerprint,
        base=backend.bases[backend.leader],
        scaling=scaling,
        cache_type_k=config.cache_type_k,
        cache_type_v=config.cache_type_v,
        flash_attention=config.flash_attention,
        build=build,
        model_name=model.name,
    )
    return PromptCache(directory, key, PROMPT_CACHE_LIMIT, warn)
