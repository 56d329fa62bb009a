"""What stands before loading: a checked model, its profile, its buckets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias, get_args

from abcli.config import (
    ENGINE_CHOICES,
    MAX_CONTEXT,
    PREFILL_MODES,
    BucketConfig,
    Buckets,
    CacheType,
    ContextConfig,
    FlashAttention,
    ModelConfig,
    profiles_directory,
)
from abcli.errors import ProfileError, UsageError
from abcli.gguf.checked import CheckedModel, check_model
from abcli.profiles.lookup import default_profile, may_have_profile, named_profile
from abcli.profiles.profile import NO_PROFILE, Profile
from abcli.rope.bases import resolve_buckets

AUTO_PROFILE = "auto"
"""The model's default profile, if it has one and nothing else says which buckets to use."""
Warn: TypeAlias = Callable[[str], None]


# llama.cpp reads a quantised value cache only in its flash attention.
_PLAIN_CACHE_TYPES = ("f32", "f16", "bf16")
# More crash ggml (its GGML_MAX_N_THREADS).
_MAX_THREADS = 512


@dataclass(frozen=True)
class Prepared:
    """A model that has been checked, and everything that decides what it will answer; nothing is loaded yet."""

    model: CheckedModel
    context: ContextConfig
    buckets: Buckets
    profile: Profile | None = None
    """The one that the buckets come from."""


def prepare(
    config: ModelConfig,
    context: ContextConfig,
    asked: BucketConfig | None = None,
    *,
    prefill_base: float | None = None,
    profile: str = AUTO_PROFILE,
    warn: Warn = lambda _line: None,
) -> Prepared:
    """Check a model and decide on its buckets: those `asked` for, else the profile's, else the usual six.

    `profile` names one of the model, or is "auto" or "none". What is wrong with a default profile is a warning.
    A context size of 0 becomes the trained length; the prefill and its base are the profile's if they are left open.

    Raises ModelFileError, UnsupportedModelError, UsageError for impossible settings, and ProfileError for a profile
    asked for by name that is missing or damaged.
    """
    check_context(context)
    check_gpu_layers(config.gpu_layers)
    model = check_model(config)
    found: Profile | None = None
    if profile not in (AUTO_PROFILE, NO_PROFILE):
        if asked is not None:
            raise UsageError("both a profile and buckets are asked for", "give one of them", setting="profile")
        found = named_profile(profiles_directory(), model.fingerprint, profile, model.name)
    elif profile == AUTO_PROFILE and asked is None:
        found = _usual_profile(model, warn)
    size = context.context_size or model.header.trained_context
    if not 0 < size <= MAX_CONTEXT:
        raise UsageError(
            f"a context of {size} tokens is impossible",
            f"choose 1 to {MAX_CONTEXT}, or 0 for the trained length",
            setting="ctx_size",
        )
    prefill = context.prefill
    if found is not None:
        prefill = prefill or found.prefill
        prefill_base = found.prefill_base if prefill_base is None else prefill_base
        model = model.with_tuning(found.tuning)
        asked = BucketConfig(count=len(found.bases), bases=found.bases, merge=found.merge, weights=found.weights)
    buckets = resolve_buckets(asked or BucketConfig(), model.header.native_base, prefill_base)
    if found is not None and found.gate is not None:
        buckets = replace(buckets, gate=found.gate)
    return Prepared(model, replace(context, context_size=size, prefill=prefill or "auto"), buckets, found)


def check_context(context: ContextConfig) -> None:
    """Raise UsageError for settings that make no sense, or do not go together."""
    largest = 2**31 - 1
    for name, value, least, most in (
        ("ctx_size", context.context_size, 0, largest),
        ("slots", context.slots, 1, largest),
        ("batch_size", context.batch_size, 1, largest),
        ("ubatch_size", context.ubatch_size, 1, largest),
        ("threads", context.threads, 0, _MAX_THREADS),
    ):
        if not least <= value <= most:
            hint = f"choose {least} or more" if most == largest else f"choose {least} to {most}"
            raise UsageError(f"`{name}` {value} is impossible", hint, setting=name)
    for name, choice, known in (
        ("flash_attn", context.flash_attention, get_args(FlashAttention)),
        ("cache_type_k", context.cache_type_k, get_args(CacheType)),
        ("cache_type_v", context.cache_type_v, get_args(CacheType)),
        ("prefill", context.prefill or "auto", PREFILL_MODES),
        ("engine", context.engine, ENGINE_CHOICES),
    ):
        if choice not in known:
            raise UsageError(f"`{name}` {choice!r} is impossible", f"choose one of {', '.join(known)}", setting=name)
    if context.flash_attention == "off" and context.cache_type_v not in _PLAIN_CACHE_TYPES:
        raise UsageError(
            f"`cache_type_v={context.cache_type_v}` needs flash attention",
            "drop `flash_attn=off`, or take f16",
            setting="cache_type_v",
        )


def check_gpu_layers(gpu_layers: int) -> None:
    """Raise UsageError for a number of layers that llama.cpp cannot take."""
    if not -1 <= gpu_layers < 2**31:
        raise UsageError(f"`gpu_layers` {gpu_layers} is impossible", "choose -1 or more", setting="gpu_layers")


def _usual_profile(model: CheckedModel, warn: Warn) -> Profile | None:
    """The model's default profile; damage is a warning."""
    directory = profiles_directory()
    try:
        if not may_have_profile(directory, model.header.file_size):
            return None
        return default_profile(directory, model.fingerprint, warn)
    except ProfileError as error:
        warn(f"{error.message}; no profile is used")
        return None
