"""`abcli inspect`: what a model's header says, and what its buckets would cost, without loading the model."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from abcli.chat.calls.format import CallFormat
from abcli.cli._flags import flag
from abcli.cli._lora import LoraFlag, parse_loras
from abcli.cli._model_name import ModelNameOptions
from abcli.config import (
    DEFAULT_BUCKETS,
    DEFAULT_CONTEXT,
    MAX_BUCKETS,
    MAX_CONTEXT,
    BucketConfig,
    CacheType,
    ContextConfig,
    EngineChoice,
    FlashAttention,
    ModelConfig,
)
from abcli.errors import TemplateError, UsageError
from abcli.gguf.check import check_kind_of_file
from abcli.gguf.checked import check_model
from abcli.gguf.description import AdapterInspection, Inspection, inspect_adapter
from abcli.gguf.description import inspect as inspect_files
from abcli.gguf.header import Header, read_header
from abcli.gguf.lora import is_adapter, read_adapter
from abcli.hub.locate import locate_model
from abcli.machine import Prediction, Room, free_room, predict
from abcli.rope.bases import resolve_buckets
from abcli.ui.inspection import adapter_text, cost_text, inspection_text
from abcli.ui.terminal import Terminal, in_flags

_CONTEXT = ContextConfig()
# A slot needs a sequence of its own and all share a spare one; llama.cpp has 256 (LLAMA_MAX_SEQ).
_MAX_SLOTS = 255


def inspect(
    model_word: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="GGUF file or name; default: the default model.")
    ] = None,
    *,
    name_options: ModelNameOptions,
    lora: LoraFlag = None,
    buckets: Annotated[int, flag(f"Buckets to count for, 1 to {MAX_BUCKETS}.", "--buckets", "-k")] = DEFAULT_BUCKETS,
    ctx_size: Annotated[int, flag("Tokens of context; 0: the trained length.", "--ctx-size", "-c")] = DEFAULT_CONTEXT,
    cache_type_k: Annotated[CacheType, flag("Type of the key cache.", "--cache-type-k", "-ctk")] = (
        _CONTEXT.cache_type_k
    ),
    cache_type_v: Annotated[CacheType, flag("Type of the value cache.", "--cache-type-v", "-ctv")] = (
        _CONTEXT.cache_type_v
    ),
    slots: Annotated[int, flag("Conversations or prompts at the same time.", "--slots")] = _CONTEXT.slots,
    ubatch_size: Annotated[int, flag("Tokens computed at once.", "--ubatch-size", "-ub")] = _CONTEXT.ubatch_size,
    flash_attn: Annotated[FlashAttention, flag("Flash attention.", "--flash-attn", "-fa")] = _CONTEXT.flash_attention,
    engine: Annotated[
        EngineChoice, flag("contexts: one for each bucket; fused: one for all; auto: the larger of both.", "--engine")
    ] = _CONTEXT.engine,
    gpu_layers: Annotated[int, flag("Layers on the GPU; -1: all.", "--gpu-layers", "-ngl")] = -1,
    as_json: Annotated[bool, flag("Print a JSON object instead of text.", "--json")] = False,
) -> None:
    """Describe a model on standard output."""
    if not 1 <= buckets <= MAX_BUCKETS:
        raise UsageError(f"{buckets} buckets are impossible", f"choose 1 to {MAX_BUCKETS}")
    for name, value, least, most in (
        ("--ctx-size", ctx_size, 0, MAX_CONTEXT),
        ("--slots", slots, 1, _MAX_SLOTS),
        ("--ubatch-size", ubatch_size, 1, 2**31 - 1),
        ("--gpu-layers", gpu_layers, -1, 2**31 - 1),
    ):
        if not least <= value <= most:
            raise UsageError(f"{name} {value} is impossible", f"choose {least} to {most}")
    path = locate_model(name_options.name(model_word))
    loras = parse_loras(lora)
    terminal = Terminal()
    if _is_adapter(path):
        if loras:
            raise UsageError(f"{path} is an adapter itself", "name the model: abcli inspect MODEL --lora FILE")
        adapter = inspect_adapter(read_adapter(path))
        terminal.write(_json(_adapter_report(adapter)) if as_json else adapter_text(adapter))
        return
    model = check_model(ModelConfig(path, gpu_layers, loras))
    wanted = resolve_buckets(BucketConfig(count=buckets), model.header.native_base)
    config = ContextConfig(
        context_size=ctx_size or model.header.trained_context,
        slots=slots,
        ubatch_size=ubatch_size,
        batch_size=max(ubatch_size, _CONTEXT.batch_size),
        flash_attention=flash_attn,
        engine=engine,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
    )
    found, prediction, room = inspect_files(model.files), predict(model, config, wanted), free_room(gpu_layers)
    adapters = [inspect_adapter(adapter) for adapter in model.adapters]
    form = _call_format(model.header)
    if as_json:
        report = _report(path, found, adapters, prediction, room)
        terminal.write(_json({**report, "tool_calls": _calls_report(form)}))
    else:
        texts = [inspection_text(found, form), *map(adapter_text, adapters), cost_text(prediction, room)]
        terminal.write("\n".join(texts))


def _is_adapter(path: Path) -> bool:
    check_kind_of_file(path)
    return is_adapter(read_header(path))


def _call_format(header: Header) -> CallFormat | None:
    """How the chat template writes calls of tools, None without one that works."""
    if not header.chat_template:
        return None
    # The sandbox for templates takes a while to import.
    from abcli.chat.calls.rendering import format_of_source

    try:
        return format_of_source(header.chat_template)
    except TemplateError:
        return None


def _calls_report(form: CallFormat | None) -> dict[str, Any] | None:
    """The object about calls and thoughts."""
    if form is None:
        return None
    thoughts = asdict(form.thoughts) if form.thoughts else None
    return {"format": form.name, "fallback": form.fallback, "several": form.several, "thoughts": thoughts}


def _json(report: dict[str, Any]) -> str:
    return json.dumps(report, ensure_ascii=False) + "\n"


def _adapter_report(found: AdapterInspection) -> dict[str, Any]:
    """The object of a LoRA file; sizes in bytes."""
    return {"kind": "lora", **asdict(found), "path": str(found.path), "changes": dict(found.changes)}


def _report(
    path: Path, found: Inspection, adapters: Sequence[AdapterInspection], prediction: Prediction, room: Room
) -> dict[str, Any]:
    """The object that --json prints; all sizes in bytes."""
    config, bases = prediction.setup.context, prediction.setup.buckets.bases
    described = asdict(found)
    described["parts"] = [{**asdict(part), "path": str(part.path)} for part in found.parts]
    # JSON has neither NaN nor infinity; not every number of RoPE is checked.
    described["rope"] = {key: _finite(value) for key, value in described["rope"].items()}
    return {
        "path": str(path),
        **described,
        "adapters": [_adapter_report(adapter) for adapter in adapters],
        "memory": {
            "buckets": len(bases),
            "bases": list(bases),
            "context_size": config.context_size,
            "slots": config.slots,
            "cache_type_k": config.cache_type_k,
            "cache_type_v": config.cache_type_v,
            "engine": "fused" if prediction.fused else "contexts",
            "contexts": prediction.contexts,
            "kv_bytes_per_token": prediction.kv_bytes_per_token,
            "parts": {item.name: item.total for item in prediction.items},
            "total": prediction.total,
            "resident": prediction.resident,
            "host": prediction.host,
            "device": prediction.device,
            "free": room.host,
            "free_on_devices": room.device,
            "fits": prediction.fits(room),
            "longest_context": prediction.longest_context(room),
            "most_buckets": prediction.most_buckets(room),
            "advice": in_flags(prediction.advice(room)) or None,
        },
    }


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
