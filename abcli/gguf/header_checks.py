"""Checks the values in a model's header: the tokenizer, the hyperparameters and the tensors' types.

Each limit is either one that llama.cpp asserts (it would end the process), one whose violation divides
by zero there, or far beyond any real model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from abcli.errors import ModelFileError, UnsupportedModelError
from abcli.gguf.architectures import rotation
from abcli.gguf.cursor import FETCH_AGAIN, ArrayValue
from abcli.gguf.header import MAX_LAYERS, Header, TensorInfo, shape_text

MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS, src/llama-hparams.h
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")

# Whole numbers: key after the architecture's name -> smallest and largest sensible value.
INTEGER_RANGES: dict[str, tuple[int, int]] = {
    "block_count": (1, MAX_LAYERS),
    "context_length": (1, 2**31 - 1),
    "embedding_length": (1, 2**20),
    "embedding_length_out": (1, 2**20),
    "vocab_size": (1, 2**24),
    "expert_count": (0, MAX_EXPERTS),
    "expert_group_count": (0, MAX_EXPERTS),
    "expert_group_used_count": (0, MAX_EXPERTS),
    "nextn_predict_layers": (0, MAX_LAYERS),
    "leading_dense_block_count": (0, MAX_LAYERS),
    "attention.key_length": (1, 2**16),
    "attention.value_length": (1, 2**16),
    "attention.key_length_swa": (1, 2**16),
    "attention.value_length_swa": (1, 2**16),
    "attention.shared_kv_layers": (0, MAX_LAYERS),
    "attention.group_norm_groups": (1, 2**16),
    "rope.dimension_count": (0, 2**16),
    "rope.dimension_count_swa": (0, 2**16),
    "ssm.conv_kernel": (1, 2**10),
    "ssm.inner_size": (1, 2**22),
    "ssm.state_size": (1, 2**16),
    "ssm.time_step_rank": (1, 2**20),
    "ssm.group_count": (0, 2**16),
    "wkv.head_size": (1, 2**16),
    "shortconv.l_cache": (1, 2**10),
}
# Whole numbers which a file gives once or for each layer.
PER_LAYER_RANGES: dict[str, tuple[int, int]] = {
    "attention.head_count": (0, 2**16),
    "attention.head_count_kv": (0, 2**16),
    "feed_forward_length": (0, 2**24),
    "expert_used_count": (0, MAX_EXPERTS),
}
REQUIRED = ("block_count", "context_length", "embedding_length")
POSITIVE_NUMBERS = ("rope.freq_base", "rope.freq_base_swa")
# ggml asserts eps >= 0, which a NaN fails too; a scaling factor of 0 means none.
NON_NEGATIVE_NUMBERS = (
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "attention.group_norm_epsilon",
    "rope.scaling.factor",
    "rope.scale_linear",
)

# A beginning- or end-of-text token outside the vocabulary leaves a model that never stops.
ESSENTIAL_TOKENS = ("bos_token_id", "eos_token_id", "eot_token_id")
# Tokenizers for which llama.cpp has no default of these; to add one that is missing is an assertion.
NO_DEFAULT_TOKEN = {
    "add_bos_token": ("bos_token_id", ("t5", "rwkv", "gemma4")),
    "add_eos_token": ("eos_token_id", ("rwkv", "gemma4", "bert")),
}

# Tokenizers which end the process, or run forever, at a byte for which the vocabulary has no token.
BYTE_TOKENS = ("llama", "rwkv")
ESCAPES = {ord("\t"): b"\\t", ord("\n"): b"\\n", ord("\r"): b"\\r"}

# Architectures whose graphs assert that keys and values have the same length, and the first group also
# that all of it is rotated (src/models/*.cpp).
_ALL_ROTATED = """
    apertus arcee baichuan dbrx deci ernie4_5 exaone falcon granite internlm2 llama llama4 mistral3 olmo
    olmo2 olmoe orion qwen2 qwen2moe qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe seed_oss smollm3 starcoder2
    xverse
"""
_EQUAL_LENGTHS = """
    bloom chatglm cohere2 command-r glm4 gpt2 gptneox granitehybrid jais mpt nemotron openelm phi2 phi3 qwen
    qwen35 qwen35moe qwen3next refact stablelm starcoder
"""
# Architectures whose loaders assert that there are experts.
EXPERTS_NEEDED = ("bailingmoe2", "glm4moe", "grovemoe", "smallthinker")
ALL_ROTATED = frozenset(_ALL_ROTATED.split())
EQUAL_LENGTHS = ALL_ROTATED | frozenset(_EQUAL_LENGTHS.split())

# Types which no kernel multiplies with or looks rows up in.
NO_WEIGHT_TYPES = {"i8", "i16", "i32", "i64", "f64", "q8_1", "q8_K"}
# Matrices and vectors which are added or multiplied element by element; that is done in f32 alone.
ELEMENTWISE = ("_norm.", ".bias", "ssm_conv1d.", "ssm_a")
# The one table of numbers among the weights (which experts a token uses, in deepseek4).
NUMBER_TABLES = ("ffn_gate_tid2eid",)


def check_tokenizer(header: Header) -> None:
    """Check that there is a tokenizer and that llama.cpp will not trip over it.

    Raises UnsupportedModelError where there is none or it cannot write every text, ModelFileError
    where its parts contradict each other.
    """
    model = header.metadata.get("tokenizer.ggml.model")
    tokens = header.metadata.get("tokenizer.ggml.tokens")
    if model in (None, "none", "no_vocab") or tokens is None:
        raise UnsupportedModelError(
            f"{header.path} has no tokenizer", "use a GGUF file that was made with its tokenizer"
        )
    if not isinstance(model, str) or not isinstance(tokens, ArrayValue) or tokens.element_type != "string":
        raise ModelFileError(f"{header.path} has a tokenizer of the wrong type", FETCH_AGAIN)
    if tokens.count == 0:
        raise ModelFileError(f"{header.path} has a tokenizer without tokens", FETCH_AGAIN)
    _check_token_lists(header, model, tokens.count)
    # llama.cpp reads a token up to its first zero, names an empty one after its number, and asserts that
    # all tokens differ.
    read = (text.partition(b"\0")[0] if b"\0" in text else text for text in tokens.strings())
    texts = {text or b"[EMPTY_%d]" % number for number, text in enumerate(read)}
    if len(texts) < tokens.count:
        raise ModelFileError(
            f"{header.path} has {tokens.count - len(texts)} tokens twice in its vocabulary", FETCH_AGAIN
        )
    missing = sum(not (_spellings(model, byte) & texts) for byte in range(256)) if model in BYTE_TOKENS else 0
    if missing:
        raise UnsupportedModelError(
            f"{header.path} has no token for {missing} of the 256 bytes, so it cannot take every text",
            "use another conversion of the model, one with byte fallback",
        )
    _check_special_tokens(header, model, tokens.count)


def check_hyperparameters(header: Header) -> None:
    """Check that the architecture's numbers are there, in range and fit together; else ModelFileError."""
    for key in REQUIRED:
        if header.get(key) is None:
            raise _bad(header, key, "is missing")
    for key, (low, high) in INTEGER_RANGES.items():
        if header.get(key) is not None:
            _check_integer(header, key, low, high)
    for key, (low, high) in PER_LAYER_RANGES.items():
        _check_per_layer(header, key, low, high)
    for key in (*POSITIVE_NUMBERS, *NON_NEGATIVE_NUMBERS):
        _check_number(header, key)
    scaling = header.get("rope.scaling.type", "none")
    if scaling not in ROPE_SCALINGS:
        raise _bad(header, "rope.scaling.type", f"is {_text(scaling)}")
    _check_heads(header)
    _check_experts(header)
    if header.integer("nextn_predict_layers") >= header.layers:
        raise _bad(header, "nextn_predict_layers", f"leaves none of {header.layers} layers")
    head_size = header.integer("wkv.head_size")
    if head_size and header.embedding_length % head_size:
        raise _bad(header, "wkv.head_size", f"does not divide {header.embedding_length}")


def check_tensor_types(header: Header, tensors: Iterable[TensorInfo]) -> None:
    """Check that every tensor has a type llama.cpp can compute with; else UnsupportedModelError."""
    for tensor in tensors:
        if any(name in tensor.name for name in NUMBER_TABLES):
            continue
        is_vector = tensor.shape[0] == math.prod(tensor.shape)
        elementwise = is_vector or any(name in tensor.name for name in ELEMENTWISE)
        if tensor.type_name in NO_WEIGHT_TYPES or (elementwise and tensor.type_name != "f32"):
            raise UnsupportedModelError(
                f"{header.path}: the tensor {tensor.name!r} has the type {tensor.type_name}, "
                "which llama.cpp cannot compute with there",
                "use another quantisation of the model",
            )


def check_embeddings(header: Header, tensors: Iterable[TensorInfo]) -> None:
    """Check that the embeddings have a row for each token and the model's width; else ModelFileError."""
    for tensor in tensors:
        if tensor.name == "token_embd.weight" and tensor.shape != (header.embedding_length, header.vocabulary_size):
            raise ModelFileError(
                f"{header.path} has {header.vocabulary_size} tokens of {header.embedding_length} numbers, but "
                f"embeddings of {shape_text(tensor.shape)}",
                FETCH_AGAIN,
            )


def _check_token_lists(header: Header, model: str, count: int) -> None:
    allowed = {"scores": ("f32", "i32"), "token_type": ("i32",), "merges": ("string",)}
    for name, element_types in allowed.items():
        value = header.metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            continue
        if not isinstance(value, ArrayValue) or value.element_type not in element_types:
            raise ModelFileError(f"{header.path} has a tokenizer.ggml.{name} of the wrong type", FETCH_AGAIN)
        if name != "merges" and value.count < count:
            raise ModelFileError(
                f"{header.path} has {count} tokens, but {value.count} values in tokenizer.ggml.{name}",
                FETCH_AGAIN,
            )
    # Kimi-K2's vocabulary does without merges.
    needs_merges = model in ("gpt2", "gemma4") and header.metadata.get("tokenizer.ggml.pre") != "kimi-k2"
    if needs_merges and header.metadata.get("tokenizer.ggml.merges") is None:
        raise ModelFileError(f"{header.path} has a tokenizer without merges", FETCH_AGAIN)


def _check_special_tokens(header: Header, model: str, count: int) -> None:
    for name in ESSENTIAL_TOKENS:
        token = header.metadata.get(f"tokenizer.ggml.{name}")
        if token is not None and (type(token) is not int or not 0 <= token < count):
            raise ModelFileError(
                f"{header.path} has a tokenizer.ggml.{name} of {_text(token)}, but {count} tokens",
                FETCH_AGAIN,
            )
    for switch, (name, models) in NO_DEFAULT_TOKEN.items():
        wanted = header.metadata.get(f"tokenizer.ggml.{switch}") is True
        if wanted and model in models and header.metadata.get(f"tokenizer.ggml.{name}") is None:
            raise ModelFileError(
                f"{header.path} sets tokenizer.ggml.{switch} without tokenizer.ggml.{name}", FETCH_AGAIN
            )


def _spellings(model: str, byte: int) -> set[bytes]:
    """How a token for a single byte may be written in the vocabulary."""
    if model == "rwkv":
        return {b"\\x%02x" % byte, bytes([byte]).replace(b"\\", b"\\\\"), ESCAPES.get(byte, b"\\x%02x" % byte)}
    return {b"<0x%02X>" % byte, bytes([byte])}


def _check_integer(header: Header, key: str, low: int, high: int) -> None:
    value = header.get(key)
    # llama.cpp takes these as u32 and nothing else.
    if header.types[f"{header.architecture}.{key}"] != "u32" or not low <= value <= high:
        raise _bad(header, key, f"is {_text(value)}, not a u32 in {low}..{high}")


def _check_number(header: Header, key: str) -> None:
    value = header.get(key)
    if value is None:
        return
    sound = isinstance(value, float) and math.isfinite(value) and value >= 0
    if not sound or (value == 0 and key in POSITIVE_NUMBERS):
        raise _bad(header, key, f"is {_text(value)}")


def _check_per_layer(header: Header, key: str, low: int, high: int) -> None:
    value = header.get(key)
    if not isinstance(value, ArrayValue):
        if value is not None:
            _check_integer(header, key, low, high)
        return
    if value.element_type not in ("u32", "i32", "bool"):
        raise _bad(header, key, f"is an array of {value.element_type}")
    if value.count != header.layers:
        raise _bad(header, key, f"has {value.count} values for {header.layers} layers")
    numbers = value.numbers().astype(np.int64)
    if numbers.min() < low or numbers.max() > high:
        raise _bad(header, key, f"has values outside {low}..{high}")


def _check_heads(header: Header) -> None:
    heads, kv_heads = header.heads, header.kv_heads
    names = {tensor.name for tensor in header.tensors}
    for layer, (queries, keys) in enumerate(zip(heads, kv_heads, strict=True)):
        # A layer without attention has no heads, but no tensor for them either; other architectures give
        # these names to tensors of linear attention too.
        attends = header.architecture in EQUAL_LENGTHS and any(
            f"blk.{layer}.{name}.weight" in names for name in ("attn_k", "attn_qkv")
        )
        if (keys and queries % keys) or (attends and not queries * keys):
            raise _bad(header, "attention.head_count_kv", f"is {keys} for {queries} heads in layer {layer}")
    if not heads[0]:
        if header.architecture in EQUAL_LENGTHS:
            raise _bad(header, "attention.head_count", "is 0")
        return
    if min(header.key_length, header.value_length) < 1:
        raise _bad(header, "attention.head_count", f"is {heads[0]} for {header.embedding_length} dimensions")
    _check_head_lengths(header)
    rotated = header.integer("rope.dimension_count")
    if rotated % 2 or rotated > header.key_length:
        raise _bad(header, "rope.dimension_count", f"is {rotated} for heads of {header.key_length} dimensions")
    kind = rotation(header)
    if rotated == 0 and header.get("rope.dimension_count") is not None and kind not in ("none", "unknown"):
        # llama.cpp would go round for ever.
        raise _bad(header, "rope.dimension_count", "is 0")
    if kind == "sections":
        _check_sections(header)


def _check_head_lengths(header: Header) -> None:
    if header.get("attention.key_length_swa") is not None:
        return  # two kinds of layers, compared kind by kind
    key_length, value_length = header.key_length, header.value_length
    if header.architecture in EQUAL_LENGTHS and key_length != value_length:
        raise _bad(header, "attention.value_length", f"is {value_length} for keys of {key_length} dimensions")
    rotated = header.integer("rope.dimension_count", key_length)
    if header.architecture in ALL_ROTATED and rotated != key_length:
        raise _bad(header, "rope.dimension_count", f"is {rotated} for heads of {key_length} dimensions")


def _check_sections(header: Header) -> None:
    """The parts that a head is divided into for M-RoPE: ggml divides by their sum and asserts that they fit."""
    key = "rope.dimension_sections"
    value = header.get(key)
    if not isinstance(value, ArrayValue) or value.element_type not in ("i32", "u32") or not 3 <= value.count <= 4:
        raise _bad(header, key, f"is {_text(value)}, not 3 or 4 whole numbers")
    sections = value.numbers().astype(np.int64)
    if sections.min() < 0 or not sections[:3].any() or sections.sum() > header.key_length:
        raise _bad(header, key, f"is {sections.tolist()} for heads of {header.key_length} dimensions")


def _check_experts(header: Header) -> None:
    experts, used = header.integer("expert_count"), max(header.per_layer("expert_used_count"))
    if experts <= 1 and header.architecture.startswith("hunyuan"):
        return  # llama.cpp reads these as no experts at all
    groups, groups_used = header.integer("expert_group_count"), header.integer("expert_group_used_count")
    if not experts and header.architecture in EXPERTS_NEEDED:
        raise _bad(header, "expert_count", "is 0")
    if used > experts or (experts and not used):
        raise _bad(header, "expert_used_count", f"is {used} of {experts} experts")
    if groups and groups >= experts:
        raise _bad(header, "expert_group_count", f"is {groups} for {experts} experts")
    if groups > 1 and (experts % groups or not 0 < groups_used < groups):
        raise _bad(header, "expert_group_used_count", f"is {groups_used} of {groups} groups of {experts} experts")


def _bad(header: Header, key: str, what: str) -> ModelFileError:
    return ModelFileError(f"{header.path}: {header.architecture}.{key} {what}", FETCH_AGAIN)


def _text(value: object) -> str:
    return f"an array of {value.element_type}" if isinstance(value, ArrayValue) else repr(value)[:40]
