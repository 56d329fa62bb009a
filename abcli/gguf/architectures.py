"""What llama.cpp knows of an architecture and a GGUF header does not say: how it rotates, which layers see a window."""

from __future__ import annotations

from typing import Literal

from abcli.gguf.cursor import ArrayValue
from abcli.gguf.header import Header

Rotation = Literal["pairs", "halves", "sections", "none", "unknown"]

# llama_model_rope_type (src/llama-model.cpp). Neighbouring numbers of a head turn together (NORM).
_PAIRS = """
    arcee arctic baichuan bailingmoe bailingmoe3 chameleon chatglm cohere2 cohere2moe command-r deci deepseek
    deepseek2 deepseek2-ocr deepseek32 deepseek4 dots3note ernie4_5 ernie4_5-moe glm-dsa glm4 granite granite_swa
    granitehybrid granitemoe graniteswitch hy_v4 internlm2 llama llama4 maincoder minicpm mistral3 mistral4
    muse-glimmer nanbeige olmo plm smollm3 starcoder xverse
"""
# Numbers that lie half the rotated dimensions apart turn together (NEOX).
_HALVES = """
    afmoe apertus bailingmoe2 bitnet codeshell cogvlm dbrx dots1 exaone exaone-moe exaone4 falcon falcon-h1 gemma
    gemma2 gemma3 gemma3n gemma4 glm4moe gpt-oss gptneox grok grovemoe hrm_text hunyuan-dense hunyuan-moe hunyuan_vl
    hy_v3 jais2 laguna lfm2 lfm2moe maple mellum mimo2 minicpm3 minimax-01 minimax-m2 minimax-m3 nemotron olmo2
    olmoe openelm orion pangu-embedded phi2 phi3 phimoe plamo plamo2 plamo3 qwen qwen2 qwen2moe qwen3 qwen3moe
    qwen3next seed_oss smallthinker spark2_5 stablelm starcoder2 step35 talkie
"""
# Positions of several parts (M-RoPE).
_SECTIONS = "paddleocr qwen2vl qwen35 qwen35moe qwen3vl qwen3vlmoe qwen4exp"
_NONE = """
    arwkv7 bloom glm5-next gpt2 gptj jais jamba kimi-k3 kimi-linear mamba mamba2 mpt nemotron_h nemotron_h_moe refact
    rwkv6 rwkv6qwen2 rwkv7
"""
_KINDS: tuple[tuple[Rotation, str], ...] = (
    ("pairs", _PAIRS),
    ("halves", _HALVES),
    ("sections", _SECTIONS),
    ("none", _NONE),
)
ROTATIONS: dict[str, Rotation] = {name: kind for kind, names in _KINDS for name in names.split()}
# Architectures which are taken for M-RoPE only where the file has sections.
_MAYBE_SECTIONS = ("bailingmoe3", "glm4", "glm4moe", "hunyuan_vl")

# Of how many layers the last one (in smallthinker the first one) sees everything, where the file has no pattern
# (load_swa_pattern in src/models/*.cpp).
_WINDOW_PERIODS = {
    "afmoe": 4,
    "cohere2": 4,
    "exaone4": 4,
    "gemma2": 2,
    "gemma3": 6,
    "gemma3n": 5,
    "gpt-oss": 2,
    "olmo2": 4,
    "plamo3": 8,
    "smallthinker": 4,
}
# The base of layers with a window, where the file has none.
WINDOW_BASES = {"gemma3": 10000.0, "gemma3n": 10000.0}
_FULL_LAYER_FIRST = ("smallthinker",)
# Files of these carry a window that llama.cpp does not use.
_IGNORED_WINDOW = ("phi3",)


def rotation(header: Header) -> Rotation:
    """How llama.cpp rotates queries and keys of the model's architecture."""
    kind = ROTATIONS.get(header.architecture, "unknown")
    sections = header.get("rope.dimension_sections")
    if (
        header.architecture in _MAYBE_SECTIONS
        and isinstance(sections, ArrayValue)
        and sections.element_type != "string"
    ):
        return "sections" if sections.numbers().any() else kind
    return kind


def window_layers(header: Header) -> tuple[bool, ...] | None:
    """Which layers see only the last `attention.sliding_window` tokens; None where the file leaves it open.

    No item is true for a model without a window.
    """
    layers = len(header.heads)
    if header.integer("attention.sliding_window") <= 0 or header.architecture in _IGNORED_WINDOW:
        return (False,) * layers
    pattern = header.get("attention.sliding_window_pattern")
    if isinstance(pattern, ArrayValue) and pattern.element_type != "string":
        flags = [bool(value) for value in pattern.numbers()[:layers]]
        return tuple(flags + [False] * (layers - len(flags)))
    period = header.integer("attention.sliding_window_pattern", _WINDOW_PERIODS.get(header.architecture, 0))
    if period <= 0:
        return None
    full = 0 if header.architecture in _FULL_LAYER_FIRST else period - 1
    return tuple(layer % period != full for layer in range(layers))
