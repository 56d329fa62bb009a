"""The keywords of `llama_cpp.Llama`: what they are to abcli, and what cannot be had."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import llama_cpp

from abcli.config import LoraConfig
from abcli.errors import UsageError
from abcli.llm import LLM, load
from abcli.native.context import CACHE_TYPE_IDS

# The keywords of the base's `__init__` that `load` has no place for, with what they may say. The first kind would
# change what a model says, the others only how it is held.
_IMPOSSIBLE: Mapping[str, tuple[Any, ...]] = {
    "rope_scaling_type": (llama_cpp.LLAMA_ROPE_SCALING_TYPE_UNSPECIFIED,),
    # 1 is what it says.
    "rope_freq_scale": (0.0, 1.0),
    "yarn_orig_ctx": (0,),
    "yarn_ext_factor": (-1.0,),
    "yarn_attn_factor": (1.0,),
    "yarn_beta_fast": (32.0,),
    "yarn_beta_slow": (1.0,),
    "attention_type": (llama_cpp.LLAMA_ATTENTION_TYPE_UNSPECIFIED,),
    "kv_overrides": (None,),
    "vocab_only": (False,),
}
_IGNORED: Mapping[str, Any] = {
    "split_mode": llama_cpp.LLAMA_SPLIT_MODE_LAYER,
    "main_gpu": 0,
    "tensor_split": None,
    "use_mmap": True,
    "use_mlock": False,
    "n_threads_batch": None,
    "offload_kqv": True,
    "op_offload": None,
    "swa_full": None,
    "no_perf": False,
    "numa": False,
    "lora_base": None,
    "pooling_type": llama_cpp.LLAMA_POOLING_TYPE_UNSPECIFIED,
}
# What `load` takes beside what has a name of the base's.
_BUCKETS = (
    *("bases", "multipliers", "spread", "merge", "weights", "profile", "prefill", "prefill_base", "engine"),
    *("prompt_cache", "chat_template", "force"),
)
_warned: set[str] = set()


def opened(model_path: str, given: Mapping[str, Any], others: Mapping[str, Any]) -> LLM:
    """The model, loaded as the keywords say: `given` are those that the drop-in names, `others` the rest.

    Raises UsageError for what cannot be had, and what `load` raises.
    """
    buckets, opening = given["buckets"], _for_load(others)
    if given["rope_freq_base"]:
        if buckets == 1:
            buckets, opening["bases"] = None, (given["rope_freq_base"],)
        else:
            # LangChain always gives one.
            _warn("abcli.Llama does without `rope_freq_base`: buckets have bases of their own", once=True)
    lora = given["lora_path"]
    return load(
        model_path,
        buckets=buckets,
        lora=[LoraConfig(Path(lora), given["lora_scale"])] if lora else (),
        gpu_layers=given["n_gpu_layers"],
        ctx_size=given["n_ctx"],
        batch_size=given["n_batch"],
        ubatch_size=min(given["n_batch"], given["n_ubatch"]),
        threads=given["n_threads"] or 0,
        flash_attn="on" if given["flash_attn"] else "off",
        cache_type_k=_cache_type("type_k", given["type_k"]),
        cache_type_v=_cache_type("type_v", given["type_v"]),
        warn=partial(_warn, once=False),
        **opening,
    )


def _for_load(others: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the keywords that `load` takes. Raises UsageError for what cannot be had."""
    for name, value in others.items():
        if name in _BUCKETS:
            continue
        if name in _IMPOSSIBLE:
            if value not in _IMPOSSIBLE[name]:
                raise UsageError(f"`{name}={value}` cannot be had with buckets", "leave it out")
        elif name not in _IGNORED or value != _IGNORED[name]:
            _warn(f"abcli.Llama does without `{name}`", once=True)
    return {name: others[name] for name in _BUCKETS if name in others}


def _warn(line: str, *, once: bool) -> None:
    if not once or line not in _warned:
        _warned.add(line)
        warnings.warn(line, stacklevel=5)


def _cache_type(name: str, number: int | None) -> str:
    """A cache type by ggml's number. Raises UsageError."""
    names = {number: kind for kind, number in CACHE_TYPE_IDS.items()}
    if number is not None and number not in names:
        raise UsageError(f"`{name}={number}` is no type of caches", f"choose one of {sorted(names)}")
    return names[number] if number is not None else "f16"
