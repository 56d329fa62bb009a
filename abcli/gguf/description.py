"""What the header of a model file says about the model, as one record."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from abcli.gguf.architectures import WINDOW_BASES, Rotation, rotation, window_layers, window_tokens
from abcli.gguf.cursor import ArrayValue
from abcli.gguf.header import Header, TensorInfo
from abcli.gguf.lora import Adapter

# Signs in a template's source that it knows tools, or a model's thoughts apart from its answer.
_TOOLS = re.compile(r"\b(?:tools|tool_calls|available_tools)\b")
_THINKING = re.compile(r"enable_thinking|reasoning_content|<think>|<\|channel\|>|\bthinking\b")
_LAYER = re.compile(r"^blk\.\d+\.")
_TEMPLATE_PREFIX = "tokenizer.chat_template."
_MAX_TOKEN_TEXT = 40
_MAX_NAME = 200


@dataclass(frozen=True)
class Rope:
    """How positions enter; `base` is the trained one, `factors` the tensors that divide the frequencies.

    `window_base` is the base of the layers with a sliding window, None where they have no other.
    """

    rotation: Rotation
    base: float
    window_base: float | None
    dimensions: int
    scaling: str
    factor: float | None
    original_context: int | None
    factors: tuple[str, ...]


@dataclass(frozen=True)
class Window:
    """Layers that see only the last `tokens`; `layers`: which, from 0; None where only llama.cpp knows them."""

    tokens: int
    layers: tuple[int, ...] | None


@dataclass(frozen=True)
class SpecialToken:
    """A token with a role: its number and its text, None for a number outside the vocabulary."""

    role: str
    token: int
    text: str | None


@dataclass(frozen=True)
class Tokenizer:
    """The tokenizer's kind, llama.cpp's name of its splitting of texts, and its tokens."""

    model: str
    splitting: str
    tokens: int
    special: tuple[SpecialToken, ...]


@dataclass(frozen=True)
class Template:
    """The chat template: its length in characters, signs of what it supports, names of further templates."""

    characters: int
    tools: bool
    thinking: bool
    others: tuple[str, ...]


@dataclass(frozen=True)
class TypeShare:
    """All tensors of one type; `share` is their part of the bytes of all, 0 to 1."""

    type_name: str
    tensors: int
    elements: int
    size_bytes: int
    share: float
    bits_per_weight: float


@dataclass(frozen=True)
class TensorKind:
    """The tensors of one name in all layers: how many there are of each type."""

    name: str
    types: dict[str, int]
    size_bytes: int


@dataclass(frozen=True)
class Part:
    """One file of a model."""

    path: Path
    size_bytes: int
    tensors: int


@dataclass(frozen=True)
class Inspection:
    """Everything of interest in a header; counts of heads are per layer, all lengths in numbers or tokens."""

    architecture: str
    name: str | None
    licence: str | None
    parameters: int
    layers: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    key_length: int
    value_length: int
    embedding_length: int
    feed_forward: tuple[int, ...]
    experts: int
    experts_used: int
    trained_context: int
    rope: Rope
    window: Window | None
    tokenizer: Tokenizer
    template: Template | None
    types: tuple[TypeShare, ...]
    tensor_kinds: tuple[TensorKind, ...]
    bits_per_weight: float
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class AdapterInspection:
    """Everything of interest in a LoRA file; the product of its matrices of `ranks[i]` counts `factors[i]` times.

    `changes` are the kinds of the model's tensors that it changes, such as "attn_q", and how many of each.
    """

    path: Path
    size_bytes: int
    architecture: str
    name: str | None
    licence: str | None
    base_model: str | None
    task: str | None
    prompt_prefix: str | None
    ranks: tuple[int, ...]
    alpha: float
    scale: float
    factors: tuple[float, ...]
    changes: tuple[tuple[str, int], ...]
    left_out: int
    parameters: int
    types: tuple[TypeShare, ...]


def inspect_adapter(adapter: Adapter) -> AdapterInspection:
    """Describe a checked LoRA file."""
    header = adapter.header
    tensors = [tensor for pair in adapter.pairs for tensor in (pair.a, pair.b)]
    kinds = Counter(re.sub(r"^blk\.\d+\.|\.weight$", "", pair.target) for pair in adapter.pairs)
    return AdapterInspection(
        path=adapter.path,
        size_bytes=header.file_size,
        architecture=header.architecture,
        name=_text(header, "general.name"),
        licence=_text(header, "general.license"),
        base_model=adapter.base_model,
        task=_text(header, "adapter.lora.task_name"),
        prompt_prefix=_text(header, "adapter.lora.prompt_prefix"),
        ranks=adapter.ranks,
        alpha=adapter.alpha,
        scale=adapter.scale,
        factors=tuple(adapter.factor(rank) for rank in adapter.ranks),
        changes=tuple(sorted(kinds.items())),
        left_out=len(adapter.ignored),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors),
        types=type_shares(tensors),
    )


def inspect(files: Sequence[Header]) -> Inspection:
    """Describe a checked model with these files."""
    header = files[0]
    tensors = [tensor for part in files for tensor in part.tensors]
    types = type_shares(tensors)
    elements = sum(share.elements for share in types)
    return Inspection(
        architecture=header.architecture,
        name=_text(header, "general.name"),
        licence=_text(header, "general.license"),
        parameters=elements,
        layers=header.layers,
        heads=header.heads,
        kv_heads=header.kv_heads,
        key_length=header.key_length,
        value_length=header.value_length,
        embedding_length=header.embedding_length,
        feed_forward=header.per_layer("feed_forward_length"),
        experts=header.integer("expert_count"),
        experts_used=max(header.per_layer("expert_used_count"), default=0),
        trained_context=header.trained_context,
        rope=_rope(header, tensors),
        window=_window(header),
        tokenizer=_tokenizer(header),
        template=_template(header),
        types=types,
        tensor_kinds=tensor_kinds(tensors),
        bits_per_weight=8 * sum(share.size_bytes for share in types) / elements if elements else 0.0,
        parts=tuple(Part(part.path, part.file_size, len(part.tensors)) for part in files),
    )


def type_shares(tensors: Iterable[TensorInfo]) -> tuple[TypeShare, ...]:
    """The types of `tensors`, the one with the most bytes first."""
    groups: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault(tensor.type_name, []).append(tensor)
    total = sum(tensor.size_bytes for group in groups.values() for tensor in group)
    shares = []
    for name, group in groups.items():
        elements = sum(math.prod(tensor.shape) for tensor in group)
        size = sum(tensor.size_bytes for tensor in group)
        shares.append(TypeShare(name, len(group), elements, size, size / total, 8 * size / elements))
    return tuple(sorted(shares, key=lambda share: (-share.size_bytes, share.type_name)))


def tensor_kinds(tensors: Iterable[TensorInfo]) -> tuple[TensorKind, ...]:
    """The tensors by what they are called in every layer, as in "attn_q.weight"; the largest first."""
    groups: dict[str, list[TensorInfo]] = {}
    for tensor in tensors:
        groups.setdefault(_LAYER.sub("", tensor.name), []).append(tensor)
    kinds = [
        TensorKind(
            name,
            dict(Counter(tensor.type_name for tensor in group).most_common()),
            sum(tensor.size_bytes for tensor in group),
        )
        for name, group in groups.items()
    ]
    return tuple(sorted(kinds, key=lambda kind: (-kind.size_bytes, kind.name)))


def special_tokens(header: Header) -> tuple[SpecialToken, ...]:
    """The tokens to which `tokenizer.ggml.<role>_token_id` gives a role, in the order of the file."""
    prefix, suffix = "tokenizer.ggml.", "_token_id"
    wanted = {
        key[len(prefix) : -len(suffix)]: value
        for key, value in header.metadata.items()
        if key.startswith(prefix) and key.endswith(suffix) and type(value) is int
    }
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    texts: dict[int, str] = {}
    if isinstance(tokens, ArrayValue) and tokens.element_type == "string":
        numbers = set(wanted.values())
        for number, text in enumerate(tokens.strings()):
            if number in numbers:
                texts[number] = text.decode("utf-8", "backslashreplace")[:_MAX_TOKEN_TEXT]
    return tuple(SpecialToken(role, number, texts.get(number)) for role, number in wanted.items())


def _rope(header: Header, tensors: Iterable[TensorInfo]) -> Rope:
    factor = header.get("rope.scaling.factor", header.get("rope.scale_linear"))
    window_base = header.get("rope.freq_base_swa", WINDOW_BASES.get(header.architecture))
    original = header.integer("rope.scaling.original_context_length")
    names = sorted({tensor.name for tensor in tensors if "rope_freqs" in tensor.name or "rope_factors" in tensor.name})
    # Long models repeat the tensor in every layer.
    short = tuple(dict.fromkeys(_LAYER.sub("", name) for name in names))
    scaling = header.get("rope.scaling.type", "linear" if isinstance(factor, float) and factor else "none")
    return Rope(
        rotation=rotation(header),
        base=header.native_base,
        window_base=window_base if isinstance(window_base, float) else None,
        dimensions=header.integer("rope.dimension_count", header.key_length),
        scaling=scaling if isinstance(scaling, str) else "none",
        factor=factor if isinstance(factor, float) and factor > 0 else None,
        original_context=original if original > 0 else None,
        factors=short,
    )


def _window(header: Header) -> Window | None:
    layers = window_layers(header)
    if layers is not None and not any(layers):
        return None
    numbers = None if layers is None else tuple(number for number, windowed in enumerate(layers) if windowed)
    return Window(window_tokens(header), numbers)


def _tokenizer(header: Header) -> Tokenizer:
    return Tokenizer(
        model=_text(header, "tokenizer.ggml.model") or "unknown",
        splitting=_text(header, "tokenizer.ggml.pre") or "default",
        tokens=header.vocabulary_size,
        special=special_tokens(header),
    )


def _template(header: Header) -> Template | None:
    source = header.chat_template
    others = tuple(
        key[len(_TEMPLATE_PREFIX) :][:_MAX_NAME] for key in header.metadata if key.startswith(_TEMPLATE_PREFIX)
    )
    if source is None:
        return None
    return Template(
        characters=len(source),
        tools=bool(_TOOLS.search(source)) or "tool_use" in others,
        thinking=bool(_THINKING.search(source)),
        others=others,
    )


def _text(header: Header, key: str) -> str | None:
    value = header.metadata.get(key)
    return value[:_MAX_NAME] if isinstance(value, str) and value else None
