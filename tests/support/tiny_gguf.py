"""Tiny models with random weights, as GGUF files that llama.cpp really loads and decodes.

A file takes milliseconds to write and is a few hundred kilobytes, so a test can make its own. Tensor
names, shapes and metadata keys follow llama.cpp's loaders of the same architectures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, product
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float32]
Architecture = Literal["llama", "qwen2", "qwen2vl", "qwen3", "gemma3", "stablelm", "gpt2", "bloom"]
Tokenizer = Literal["gpt2", "llama"]
WeightType = Literal["f32", "f16", "q8_0"]

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# Fused query-key-value weights, biases everywhere, plain layer norms and no RoPE.
ROPELESS = ("gpt2", "bloom")


@dataclass
class Vocabulary:
    """The tokenizer's part of a model: parallel lists, one item per token."""

    model: Tokenizer
    tokens: list[bytes]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)


def byte_characters() -> list[str]:
    """The printable character which GPT-2's byte-level BPE writes for each byte 0..255."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def byte_pair_vocabulary(size: int) -> Vocabulary:
    """All 256 bytes, then merged pairs, those of letters first, then triples, then the control tokens."""
    characters = byte_characters()
    frequent = [characters[ord(letter)] for letter in " etaoinshrdlucmfwypvbgkqjxz"]
    count = size - 256 - len(CONTROL_TOKENS)
    # A dictionary keeps the first of equal pairs, and the order.
    every = list(dict.fromkeys((*product(frequent, repeat=2), *product(characters, repeat=2))))
    triples = ((first + second, third) for (first, second), third in product(every, characters))
    pairs = list(islice(chain(every, triples), max(0, count)))
    if len(pairs) != count:
        raise ValueError(f"a vocabulary cannot have {size} tokens")
    texts = [*characters, *(first + second for first, second in pairs), *CONTROL_TOKENS]
    first_control = size - len(CONTROL_TOKENS)
    return Vocabulary(
        model="gpt2",
        tokens=[text.encode() for text in texts],
        types=[gguf.TokenType.NORMAL] * first_control + [gguf.TokenType.CONTROL] * len(CONTROL_TOKENS),
        merges=[f"{first} {second}" for first, second in pairs],
        special={"bos": first_control, "eos": size - 1, "eot": size - 1, "padding": first_control},
    )


def sentence_piece_vocabulary(size: int) -> Vocabulary:
    """<unk>, <s>, </s>, the 256 byte tokens, two chat tokens, then letters; needs 261 tokens or more."""
    chat_tokens = ["<|im_start|>", "<|im_end|>"]
    head = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *chat_tokens]
    letters = "\u2581etaoinshrdlucmfwypvbgkqjxz"
    pieces = [*letters, *(first + second for first in letters for second in letters[1:])][: size - len(head)]
    if len(head) + len(pieces) != size:
        raise ValueError(f"a vocabulary of {size} tokens is too small or too large")
    kinds = gguf.TokenType
    return Vocabulary(
        model="llama",
        tokens=[text.encode() for text in [*head, *pieces]],
        types=[kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL]
        + [kinds.BYTE] * 256
        + [kinds.CONTROL] * len(chat_tokens)
        + [kinds.NORMAL] * len(pieces),
        scores=[0.0] * len(head) + [-float(rank + 1) for rank in range(len(pieces))],
        special={"bos": 1, "eos": 2, "unknown": 0, "eot": head.index("<|im_end|>")},
    )


def write_tiny_model(
    path: Path,
    *,
    architecture: Architecture = "llama",
    vocabulary_size: int = 320,
    layers: int = 2,
    embedding: int = 64,
    heads: int = 4,
    kv_heads: int = 2,
    feed_forward: int = 128,
    context_length: int = 4096,
    rope_base: float = 10000.0,
    rope_factors: Sequence[float] | None = None,
    seed: int = 0,
    dtype: WeightType = "f32",
    chat_template: str | None = CHATML,
    tokenizer: bool | Tokenizer = True,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array | None] | None = None,
) -> Path:
    """Write a transformer with random weights and return `path`.

    `tokenizer` is "gpt2" (byte-level BPE, also for True), "llama" (SentencePiece with byte tokens) or
    False for none. llama rotates neighbouring pairs (NORM), qwen2, qwen3, gemma3 and stablelm halves (NEOX),
    stablelm only half of each head, qwen2vl by several positions (M-RoPE), gpt2 and bloom not at all.
    All but every sixth layer of gemma3 have a base of their own and see a window. `rope_factors` (one
    per pair, llama only) divide the frequencies. `metadata` and `tensors` replace, add or, where the
    value is None, remove items, so that a test can break one thing.
    """
    random = np.random.default_rng(seed)
    if architecture in ROPELESS:
        weights = _fused_tensors(random, layers, embedding, heads, kv_heads, feed_forward)
        if architecture == "gpt2":
            weights["position_embd.weight"] = 0.1 * _normal(random, context_length, embedding)
        else:
            weights["token_embd_norm.weight"] = np.ones(embedding, np.float32)
            weights["token_embd_norm.bias"] = np.zeros(embedding, np.float32)
    else:
        biases = architecture in ("qwen2", "qwen2vl")
        weights = _llama_tensors(random, layers, embedding, heads, kv_heads, feed_forward, biases=biases)
        if architecture == "gemma3":
            weights |= _norms(layers, {"post_attention_norm": embedding, "post_ffw_norm": embedding})
        if architecture in ("gemma3", "qwen3"):
            weights |= _norms(layers, dict.fromkeys(("attn_q_norm", "attn_k_norm"), embedding // heads))
    if rope_factors is not None:
        weights["rope_freqs.weight"] = np.asarray(rope_factors, np.float32)
    _add_embeddings(random, weights, vocabulary_size, embedding)
    keys: dict[str, Any] = {
        "context_length": context_length,
        "embedding_length": embedding,
        "block_count": layers,
        "feed_forward_length": feed_forward,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
    }
    if architecture in ROPELESS:
        keys["attention.layer_norm_epsilon"] = 1e-5
    else:
        keys |= {
            "attention.layer_norm_rms_epsilon": 1e-5,
            "rope.dimension_count": embedding // heads,
            "rope.freq_base": float(rope_base),
        }
    if architecture == "qwen2vl":
        keys["rope.dimension_sections"] = [embedding // heads // 4, embedding // heads // 4, 0, 0]
    if architecture == "stablelm":
        keys |= {"rope.dimension_count": embedding // heads // 2, "attention.layer_norm_epsilon": 1e-5}
        keys["use_parallel_residual"] = False
        norms = [name for name in weights if name.endswith("_norm.weight")]
        weights |= {name.replace(".weight", ".bias"): np.zeros(embedding, np.float32) for name in norms}
    if architecture == "gemma3":
        keys |= {f"attention.{part}_length": embedding // heads for part in ("key", "value")}
        keys["attention.sliding_window"] = 64
    values = {f"{architecture}.{key}": value for key, value in keys.items()}
    values |= _tokenizer_metadata(tokenizer, vocabulary_size, chat_template)
    return _write(path, architecture, values | dict(metadata or {}), weights | dict(tensors or {}), dtype)


def write_tiny_experts(path: Path, *, experts: int = 4, used: int = 2, seed: int = 0) -> Path:
    """Write a llama-architecture model with `experts` in each layer, of which every token uses `used`."""
    random = np.random.default_rng(seed)
    tensors: dict[str, Array | None] = {}
    for layer in range(2):
        name = f"blk.{layer}.ffn_"
        for part, shape in (("gate", (128, 64)), ("up", (128, 64)), ("down", (64, 128))):
            tensors |= {f"{name}{part}.weight": None, f"{name}{part}_exps.weight": _normal(random, experts, *shape)}
        tensors[f"{name}gate_inp.weight"] = _normal(random, experts, 64)
    metadata = {"llama.expert_count": experts, "llama.expert_used_count": used}
    return write_tiny_model(path, tensors=tensors, metadata=metadata, seed=seed)


def write_tiny_mamba(
    path: Path,
    *,
    vocabulary_size: int = 320,
    layers: int = 2,
    embedding: int = 64,
    context_length: int = 4096,
    seed: int = 0,
    dtype: WeightType = "f32",
    chat_template: str | None = CHATML,
    tokenizer: bool | Tokenizer = True,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Array | None] | None = None,
) -> Path:
    """Write a recurrent (Mamba) model with random weights and return `path`; options as above."""
    random = np.random.default_rng(seed)
    inner, state, kernel, rank = 2 * embedding, 16, 4, max(1, embedding // 16)
    weights: dict[str, Array] = {}
    for layer in range(layers):
        name = f"blk.{layer}."
        weights |= {
            name + "attn_norm.weight": np.ones(embedding, np.float32),
            name + "ssm_in.weight": _normal(random, 2 * inner, embedding),
            name + "ssm_conv1d.weight": _normal(random, inner, kernel),
            name + "ssm_conv1d.bias": np.zeros(inner, np.float32),
            name + "ssm_x.weight": _normal(random, rank + 2 * state, inner),
            name + "ssm_dt.weight": _normal(random, inner, rank),
            name + "ssm_dt.bias": np.zeros(inner, np.float32),
            # Negative, so that the state decays.
            name + "ssm_a": -np.tile(np.arange(1, state + 1, dtype=np.float32), (inner, 1)),
            name + "ssm_d": np.ones(inner, np.float32),
            name + "ssm_out.weight": _normal(random, embedding, inner),
        }
    weights["output_norm.weight"] = np.ones(embedding, np.float32)
    _add_embeddings(random, weights, vocabulary_size, embedding)
    values: dict[str, Any] = {
        "mamba.context_length": context_length,
        "mamba.embedding_length": embedding,
        "mamba.feed_forward_length": 0,
        "mamba.attention.head_count": 0,
        "mamba.block_count": layers,
        "mamba.ssm.conv_kernel": kernel,
        "mamba.ssm.inner_size": inner,
        "mamba.ssm.state_size": state,
        "mamba.ssm.time_step_rank": rank,
        "mamba.attention.layer_norm_rms_epsilon": 1e-5,
    }
    values |= _tokenizer_metadata(tokenizer, vocabulary_size, chat_template)
    return _write(path, "mamba", values | dict(metadata or {}), weights | dict(tensors or {}), dtype)


def write_tiny_bert(path: Path, *, context_length: int = 64, seed: int = 0, **metadata: Any) -> Path:
    """Write an encoder for embeddings (BERT) with random weights and return `path`; `metadata` is its architecture's.

    Its tokenizer knows letters, at the beginning of words and within.
    """
    random = np.random.default_rng(seed)
    layers, embedding, feed_forward = 2, 32, 64
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*special, *("\u2581" + letter for letter in letters), *letters]
    kinds = gguf.TokenType
    weights: dict[str, Array] = {
        "token_embd.weight": random.standard_normal((len(tokens), embedding)).astype(np.float32),
        "position_embd.weight": _normal(random, context_length, embedding),
        "token_types.weight": _normal(random, 2, embedding),
    }
    shapes = {"ffn_up": (feed_forward, embedding), "ffn_down": (embedding, feed_forward)}
    shapes |= {f"attn_{part}": (embedding, embedding) for part in ("q", "k", "v", "output")}
    norms = [f"blk.{layer}.{part}_output_norm" for layer in range(layers) for part in ("attn", "layer")]
    for norm in ["token_embd_norm", *norms]:
        weights[norm + ".weight"] = (1 + 0.3 * random.standard_normal(embedding)).astype(np.float32)
        weights[norm + ".bias"] = (0.3 * random.standard_normal(embedding)).astype(np.float32)
    for layer in range(layers):
        for part, shape in shapes.items():
            weights[f"blk.{layer}.{part}.weight"] = 2 * _normal(random, *shape)
            weights[f"blk.{layer}.{part}.bias"] = (0.3 * random.standard_normal(shape[0])).astype(np.float32)
    keys = {
        "context_length": context_length,
        "embedding_length": embedding,
        "block_count": layers,
        "feed_forward_length": feed_forward,
        "attention.head_count": 4,
        "attention.layer_norm_epsilon": 1e-5,
        "attention.causal": False,
        "pooling_type": 1,
        **metadata,
    }
    ids = {"bos": 2, "cls": 2, "eos": 3, "seperator": 3, "unknown": 1, "padding": 0, "mask": 4}
    values: dict[str, Any] = {f"bert.{key}": value for key, value in keys.items()}
    values |= {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [token.encode() for token in tokens],
        "tokenizer.ggml.token_type": [kinds.CONTROL] * len(special) + [kinds.NORMAL] * (2 * len(letters)),
        "tokenizer.ggml.token_type_count": 2,
    }
    values |= {f"tokenizer.ggml.{name}_token_id": token for name, token in ids.items()}
    return _write(path, "bert", values, weights, "f32")


def _normal(random: np.random.Generator, *shape: int) -> Array:
    """A matrix (outputs, inputs) that keeps the size of what it is multiplied with."""
    return (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)


def _add_embeddings(
    random: np.random.Generator, weights: dict[str, Array], vocabulary_size: int, embedding: int
) -> None:
    weights["token_embd.weight"] = random.standard_normal((vocabulary_size, embedding)).astype(np.float32)
    # Factor 2: logits with a standard deviation of 2 give a distribution that is neither flat nor certain.
    weights["output.weight"] = 2 * _normal(random, vocabulary_size, embedding)


def _llama_tensors(
    random: np.random.Generator,
    layers: int,
    embedding: int,
    heads: int,
    kv_heads: int,
    feed_forward: int,
    *,
    biases: bool,
) -> dict[str, Array]:
    kv_width = embedding // heads * kv_heads
    weights: dict[str, Array] = {"output_norm.weight": np.ones(embedding, np.float32)}
    for layer in range(layers):
        name = f"blk.{layer}."
        weights |= {
            name + "attn_norm.weight": np.ones(embedding, np.float32),
            # Factor 3: sharp enough attention that positions, and so the RoPE base, matter.
            name + "attn_q.weight": 3 * _normal(random, embedding, embedding),
            name + "attn_k.weight": _normal(random, kv_width, embedding),
            name + "attn_v.weight": _normal(random, kv_width, embedding),
            name + "attn_output.weight": _normal(random, embedding, embedding),
            name + "ffn_norm.weight": np.ones(embedding, np.float32),
            name + "ffn_gate.weight": _normal(random, feed_forward, embedding),
            name + "ffn_down.weight": _normal(random, embedding, feed_forward),
            name + "ffn_up.weight": _normal(random, feed_forward, embedding),
        }
        if biases:
            for part, width in (("q", embedding), ("k", kv_width), ("v", kv_width)):
                weights[f"{name}attn_{part}.bias"] = 0.1 * _normal(random, width)
    return weights


def _norms(layers: int, widths: Mapping[str, int]) -> dict[str, Array]:
    return {
        f"blk.{layer}.{name}.weight": np.ones(width, np.float32)
        for layer in range(layers)
        for name, width in widths.items()
    }


def _fused_tensors(
    random: np.random.Generator, layers: int, embedding: int, heads: int, kv_heads: int, feed_forward: int
) -> dict[str, Array]:
    qkv_width = embedding + 2 * (embedding // heads * kv_heads)
    shapes = {
        "attn_qkv": (qkv_width, embedding),
        "attn_output": (embedding, embedding),
        "ffn_up": (feed_forward, embedding),
        "ffn_down": (embedding, feed_forward),
    }
    norms = [f"blk.{layer}.{part}_norm" for layer in range(layers) for part in ("attn", "ffn")]
    weights: dict[str, Array] = {}
    for norm in [*norms, "output_norm"]:
        weights[norm + ".weight"] = np.ones(embedding, np.float32)
        weights[norm + ".bias"] = np.zeros(embedding, np.float32)
    for layer in range(layers):
        for part, shape in shapes.items():
            weights[f"blk.{layer}.{part}.weight"] = _normal(random, *shape)
            weights[f"blk.{layer}.{part}.bias"] = np.zeros(shape[0], np.float32)
    return weights


def _tokenizer_metadata(kind: bool | Tokenizer, size: int, chat_template: str | None) -> dict[str, Any]:
    if kind is False:
        return {}
    vocabulary = sentence_piece_vocabulary(size) if kind == "llama" else byte_pair_vocabulary(size)
    values: dict[str, Any] = {
        "tokenizer.ggml.model": vocabulary.model,
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        "tokenizer.ggml.add_bos_token": vocabulary.model == "llama",
    }
    if vocabulary.model == "gpt2":
        values["tokenizer.ggml.pre"] = "gpt-2"
        values["tokenizer.ggml.merges"] = vocabulary.merges
    else:
        values["tokenizer.ggml.pre"] = "default"
        values["tokenizer.ggml.scores"] = vocabulary.scores
    values |= {f"tokenizer.ggml.{name}_token_id": token for name, token in vocabulary.special.items()}
    if chat_template is not None:
        values["tokenizer.chat_template"] = chat_template
    return values


def _write(
    path: Path,
    architecture: str,
    values: Mapping[str, Any],
    weights: Mapping[str, Array | None],
    dtype: WeightType,
) -> Path:
    writer = gguf.GGUFWriter(path, values.get("general.architecture") or architecture)
    if values.get("general.architecture", "") is None:
        del writer.kv_data[0]["general.architecture"]
    if "general.alignment" in values:
        writer.data_alignment = values["general.alignment"]
    for key, value in values.items():
        add_value(writer, key, value)
    for name, tensor in weights.items():
        if tensor is not None:
            _add_tensor(writer, name, tensor, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add one metadata item: u32 for counts and ids, f32 for numbers; a numpy scalar in its own type."""
    if value is None:
        return
    if isinstance(value, np.generic):
        kinds = gguf.GGUFValueType
        by_type = {"uint16": kinds.UINT16, "int32": kinds.INT32, "uint64": kinds.UINT64, "float64": kinds.FLOAT64}
        writer.add_key_value(key, value.item(), by_type[value.dtype.name])
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        if key != "general.architecture":
            writer.add_string(key, value)
    else:
        writer.add_array(key, [int(item) if isinstance(item, int) else item for item in value])


def _add_tensor(writer: gguf.GGUFWriter, name: str, tensor: Array, dtype: WeightType) -> None:
    # llama.cpp keeps vectors, and Mamba's convolution, in f32.
    if tensor.ndim < 2 or "ssm_a" in name or "conv1d" in name or dtype == "f32":
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    elif dtype == "f16":
        writer.add_tensor(name, tensor.astype(np.float16))
    else:
        quantization = gguf.GGMLQuantizationType.Q8_0
        if tensor.shape[-1] % 32:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, gguf.quants.quantize(tensor, quantization), raw_dtype=quantization)
