"""Paths, environment names, settings and every default, each exactly once."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import platformdirs

MergeRule = Literal["confidence", "mean", "product", "max", "entropy", "pool"]
Spread = Literal["symmetric", "paper"]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
FlashAttention = Literal["auto", "on", "off"]
PrefillMode = Literal["auto", "shared", "exact"]
EngineChoice = Literal["auto", "fused", "contexts"]

MERGE_RULES: tuple[MergeRule, ...] = get_args(MergeRule)
SPREADS: tuple[Spread, ...] = get_args(Spread)
PREFILL_MODES: tuple[PrefillMode, ...] = get_args(PrefillMode)
ENGINE_CHOICES: tuple[EngineChoice, ...] = get_args(EngineChoice)

MAX_BUCKETS = 16
DEFAULT_BUCKETS = 6
DEFAULT_CONTEXT = 4096
# Bytes that stored prompt prefixes may take on the disk.
PROMPT_CACHE_LIMIT = 4 << 30
DEFAULT_DRY_BREAKERS = ("\n", ":", '"', "*")
# llama.cpp reads this seed as "draw one"; abcli draws its own so that it can be shown.
NATIVE_RANDOM_SEED = 0xFFFFFFFF

ENV_HOME = "ABCLI_HOME"
ENV_DEBUG = "ABCLI_DEBUG"

DEFAULT_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class BucketConfig:
    """Which bases the buckets use; `bases` and `multipliers` override `count` and `spread`.

    `weights` are those of the merge rule `pool`, one for each bucket, with the sum 1; none are equal ones.
    """

    count: int = DEFAULT_BUCKETS
    spread: Spread = "symmetric"
    bases: tuple[float, ...] = ()
    multipliers: tuple[float, ...] = ()
    merge: MergeRule = "confidence"
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter that changes the model; `scale` (float32) multiplies its weights, 0 leaves it out."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class EngineConfig:
    """How a model is loaded and decoded; 0 threads: one per core; -1 GPU layers: all of them.

    `prefill_base` is the RoPE base under which a shared prefill computes; None is the model's native base.
    `prompt_cache` is the directory that keeps the state of long prompts, None for none. `engine` decodes all buckets in
    one batch ("fused"), each in a context of its own ("contexts"), or as measured to be faster ("auto").
    `force` loads also what is predicted not to fit into memory.
    """

    model: Path
    bases: tuple[float, ...]
    context_size: int = DEFAULT_CONTEXT
    slots: int = 1
    batch_size: int = 2048
    ubatch_size: int = 512
    threads: int = 0
    gpu_layers: int = -1
    flash_attention: FlashAttention = "auto"
    cache_type_k: CacheType = "f16"
    cache_type_v: CacheType = "f16"
    prefill: PrefillMode = "auto"
    prefill_base: float | None = None
    prompt_cache: Path | None = None
    engine: EngineChoice = "auto"
    force: bool = False
    lora: tuple[LoraConfig, ...] = ()


@dataclass(frozen=True)
class SamplingConfig:
    """llama.cpp's sampler settings under llama.cpp's names and defaults (common/common.h).

    At most one of `grammar` (GBNF), `json_schema`, `regex` (ECMA-262, matching the whole answer) and `lark` is given;
    `schema_lenient` leaves out what cannot be enforced of a schema.
    """

    seed: int = -1
    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    top_n_sigma: float = -1.0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_penalty_last_n: int = -1
    dry_breakers: tuple[str, ...] = DEFAULT_DRY_BREAKERS
    repeat_last_n: int = 64
    repeat_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    mirostat: int = 0
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str = ""
    json_schema: str = ""
    regex: str = ""
    lark: str = ""
    schema_lenient: bool = False


@dataclass(frozen=True)
class GenerationConfig:
    """One answer: how to sample it and when to stop; -1 new tokens means until the context is full."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


def home() -> Path:
    """The directory of abcli's own files: `$ABCLI_HOME`, else the platform's user data directory."""
    chosen = os.environ.get(ENV_HOME)
    return Path(chosen) if chosen else Path(platformdirs.user_data_dir("abcli", appauthor=False))


def sessions_directory() -> Path:
    """Where chat sessions are stored."""
    return home() / "sessions"


def history_file() -> Path:
    """Where the chat keeps what was typed, for Up."""
    return home() / "history"


def trial_directory() -> Path:
    """Where it is remembered which model files llama.cpp has loaded without trouble."""
    return home() / "trials"


def engines_directory() -> Path:
    """Where it is remembered which engine is right, and which is fast, for a model on this machine."""
    return home() / "engines"


def prompt_cache_directory() -> Path:
    """Where the state of prompts is stored: below `$ABCLI_HOME`, else in the platform's user cache directory."""
    if os.environ.get(ENV_HOME):
        return home() / "prompts"
    return Path(platformdirs.user_cache_dir("abcli", appauthor=False)) / "prompts"


def evaluations_directory() -> Path:
    """Where evaluations keep their results, so that none is computed twice: beside the prompt cache."""
    return prompt_cache_directory().with_name("evaluations")


def profiles_directory() -> Path:
    """Where calibrated profiles are stored: below `$ABCLI_HOME`, else in the platform's user configuration."""
    if os.environ.get(ENV_HOME):
        return home() / "profiles"
    return Path(platformdirs.user_config_dir("abcli", appauthor=False)) / "profiles"


def aliases_file() -> Path:
    """Where the user's own names of models are: below `$ABCLI_HOME`, else in the platform's user configuration."""
    if os.environ.get(ENV_HOME):
        return home() / "aliases.json"
    return Path(platformdirs.user_config_dir("abcli", appauthor=False)) / "aliases.json"


def debug() -> bool:
    """Whether errors should carry a traceback (`$ABCLI_DEBUG`)."""
    return os.environ.get(ENV_DEBUG, "") not in ("", "0")
