"""Paths, environment names, settings and every default, each exactly once."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import platformdirs

MergeRule = Literal["confidence", "mean", "product", "max", "entropy", "pool"]
Spread = Literal["symmetric", "paper"]
CacheType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
FlashAttention = Literal["auto", "on", "off"]
PrefillMode = Literal["auto", "shared", "exact"]
EngineChoice = Literal["auto", "fused", "contexts"]
# How the states of a text's tokens become one embedding: their mean, the first one's, or the last one's.
Pooling = Literal["mean", "cls", "last"]

# A number for each head, layer by layer.
HeadNumbers: TypeAlias = tuple[tuple[float, ...], ...]

MERGE_RULES: tuple[MergeRule, ...] = get_args(MergeRule)
SPREADS: tuple[Spread, ...] = get_args(Spread)
PREFILL_MODES: tuple[PrefillMode, ...] = get_args(PrefillMode)
ENGINE_CHOICES: tuple[EngineChoice, ...] = get_args(EngineChoice)

MAX_BUCKETS = 16
DEFAULT_BUCKETS = 6
DEFAULT_CONTEXT = 4096
# The lowest gate of docs/buckets.md at which nothing measured is lost.
USUAL_GATE = 0.95
# llama.cpp pads a context to a multiple of this (llama-context.cpp).
CONTEXT_STEP = 256
MAX_CONTEXT = 2**31 - CONTEXT_STEP
# Bytes that stored prompt prefixes may take on the disk.
PROMPT_CACHE_LIMIT = 4 << 30

ENV_HOME = "ABCLI_HOME"
ENV_DEBUG = "ABCLI_DEBUG"

DEFAULT_MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Tuning:
    """What is changed in the heads of a model; what is empty leaves them as they are.

    `gains` are factors on the outputs of its attention heads. `multipliers` are factors on the RoPE base of its heads
    of keys, and of the queries that meet them: on the bucket's base, or on that which a layer has of its own.
    """

    gains: HeadNumbers = ()
    multipliers: HeadNumbers = ()

    def __bool__(self) -> bool:
        return bool(self.gains or self.multipliers)


UNTUNED = Tuning()


@dataclass(frozen=True)
class LoraConfig:
    """A LoRA adapter that changes the model; `scale` (float32) multiplies its weights, 0 leaves it out."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """What is loaded; -1 GPU layers: all of them."""

    path: Path
    gpu_layers: int = -1
    lora: tuple[LoraConfig, ...] = ()


@dataclass(frozen=True)
class ContextConfig:
    """How tokens are decoded; 0 threads: one per core; a context size of 0 tokens: the trained length.

    No `prefill` is that of the model's profile if it has one, else "auto", which shares long prompts. `prompt_cache` is
    the directory that keeps the state of long prompts, None for none. `engine` decodes all buckets in one batch
    ("fused"), each in a context of its own ("contexts"), or as measured to be faster ("auto"). `gated` lays the cells
    out for answers with a gate; with "auto" it is measured whether a gate saves time. A batch gives the logits after
    `outputs` tokens in each bucket, or after one in each slot if these are more; `make_engine` sees to it. `force`
    loads also what is predicted not to fit into memory.
    """

    context_size: int = DEFAULT_CONTEXT
    slots: int = 1
    batch_size: int = 2048
    ubatch_size: int = 512
    threads: int = 0
    flash_attention: FlashAttention = "auto"
    cache_type_k: CacheType = "f16"
    cache_type_v: CacheType = "f16"
    prefill: PrefillMode | None = None
    prompt_cache: Path | None = None
    engine: EngineChoice = "auto"
    gated: bool | Literal["auto"] = False
    outputs: int = 1
    force: bool = False


@dataclass(frozen=True)
class BucketConfig:
    """Which buckets are asked for; `bases` and `multipliers` override `count` and `spread`.

    `weights` are those of the merge rule `pool`, one for each bucket, with the sum 1; none are equal ones.
    """

    count: int = DEFAULT_BUCKETS
    spread: Spread = "symmetric"
    bases: tuple[float, ...] = ()
    multipliers: tuple[float, ...] = ()
    merge: MergeRule = "confidence"
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Buckets:
    """The buckets of a model: the RoPE base of each, how they are merged, and the base of a shared prefill.

    Bases are rounded to float32, as llama.cpp keeps them. `gate` is what the gate "auto" means where a gate pays.
    """

    bases: tuple[float, ...]
    prefill_base: float
    merge: MergeRule = "confidence"
    weights: tuple[float, ...] = ()
    gate: float = USUAL_GATE


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


def completion_file() -> Path:
    """Where the description of all commands is kept for the completion of shells: beside the prompt cache."""
    return prompt_cache_directory().with_name("completion.json")


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
