"""What llama.cpp knows of an architecture and a GGUF header does not say: how it rotates, which layers see a window."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class _Windows:
    """Which layers of an architecture see a window if its file has no pattern (load_arch_hparams, src/models/*.cpp).

    Of `period` layers one sees everything: the last, or the first with `full_first`; 0: none does; None: the file has
    to say it. `tokens` is the window of a file without one, and of every file that has one if it is `fixed`.
    """

    period: int | None
    full_first: bool = False
    tokens: int = 0
    fixed: bool = False


# Those of the others have no effect, whatever their files say.
_WINDOWS: dict[str, _Windows] = {
    "afmoe": _Windows(4),
    "cohere2": _Windows(4),
    "cohere2moe": _Windows(4, full_first=True),
    "deepseek4": _Windows(0),
    "dots3note": _Windows(None),
    "exaone-moe": _Windows(4),
    "exaone4": _Windows(4, tokens=4096),
    "gemma2": _Windows(2, tokens=4096),
    "gemma3": _Windows(6),
    "gemma3n": _Windows(5),
    "gemma4": _Windows(None),
    "gpt-oss": _Windows(2),
    "granite_swa": _Windows(None),
    "laguna": _Windows(4, full_first=True),
    "lfm2": _Windows(0),
    "llama4": _Windows(4, tokens=8192, fixed=True),
    "maple": _Windows(None),
    "mellum": _Windows(4),
    "mimo2": _Windows(None),
    "muse-glimmer": _Windows(4),
    "olmo2": _Windows(4),
    "plamo3": _Windows(8),
    "smallthinker": _Windows(4, full_first=True, tokens=4096, fixed=True),
    "spark2_5": _Windows(None),
    "step35": _Windows(None),
}
# Without a key for it their files have no window.
_OPTIONAL = ("smallthinker",)
# exaone4 has windows only in its model of this many layers.
_EXAONE4_LAYERS = 64
# The base of layers with a window, where the file has none (rope_freq_base_train_swa).
WINDOW_BASES = dict.fromkeys(("gemma3", "gemma3n", "gemma4", "mimo2", "plamo3", "step35"), 10000.0)


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


def window_tokens(header: Header) -> int:
    """How many of the last tokens a layer with a window sees; 0 for a model without such layers."""
    name = header.architecture
    said = header.integer("attention.sliding_window", -1)
    rule = _WINDOWS.get(name)
    if rule is None:
        # Of an architecture that nobody here knows nothing can be ruled out.
        return 0 if name in ROTATIONS else max(0, said)
    if name == "exaone4" and len(header.heads) != _EXAONE4_LAYERS:
        return 0
    if said < 0:
        return rule.tokens if name not in _OPTIONAL else 0
    return rule.tokens if said and rule.fixed else said


def window_layers(header: Header) -> tuple[bool, ...] | None:
    """Which layers see only the last `window_tokens`; None where that cannot be told.

    No item is true for a model without a window.
    """
    layers = len(header.heads)
    if window_tokens(header) == 0:
        return (False,) * layers
    rule = _WINDOWS.get(header.architecture, _Windows(None))
    if header.architecture == "lfm2":
        return tuple(heads > 0 for heads in header.kv_heads)
    pattern = header.get("attention.sliding_window_pattern")
    if isinstance(pattern, ArrayValue) and pattern.element_type != "string" and rule.period != 0:
        flags = [bool(value) for value in pattern.numbers()[:layers]]
        return tuple(flags + [False] * (layers - len(flags)))
    period = rule.period
    if period:
        period = header.integer("attention.sliding_window_pattern", period)
    if period is None or period < 0:
        return None
    if period == 0:
        return (True,) * layers
    full = 0 if rule.full_first else period - 1
    # The layers that predict further tokens see everything.
    own = layers - header.integer("nextn_predict_layers")
    return tuple(layer < own and layer % period != full for layer in range(layers))
