"""Writes a llama model with random weights, for measuring speed and memory at sizes that nobody need fetch.

    python scripts/random_model.py FILE [--layers 22] [--embedding 2048] [--heads 32] [--kv-heads 4]
                                        [--feed-forward 5632] [--vocabulary 32000] [--type Q4_0]

The defaults are the shape of TinyLlama: 1.1 billion parameters. Blocks of quantised numbers are made as they are, so
that it takes as long as writing the file. What the model says is noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.tiny_gguf import add_value, byte_pair_vocabulary

_TYPES = {name: gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_0", "Q4_1")}
_BLOCK = 32
# The standard deviation of uniformly random 4-bit and 8-bit numbers.
_SPREAD = {"Q4_0": 4.61, "Q4_1": 4.61, "Q8_0": 73.9}


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    for name, size in (
        ("layers", 22),
        ("embedding", 2048),
        ("heads", 32),
        ("kv-heads", 4),
        ("feed-forward", 5632),
        ("vocabulary", 32000),
    ):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--type", choices=_TYPES, default="Q4_0")
    options = parser.parse_args()
    writer = gguf.GGUFWriter(options.file, "llama")
    for key, value in metadata(options).items():
        add_value(writer, key, value)
    random = np.random.default_rng(0)
    for name, shape in shapes(options).items():
        if len(shape) == 1:
            writer.add_tensor(name, np.ones(shape, np.float32))
        else:
            # Twice the size that keeps numbers as large as they are, so that attention and answers are not flat.
            weights = matrix(random, shape, options.type, 2 / np.sqrt(shape[1]))
            writer.add_tensor(name, weights, raw_dtype=_TYPES[options.type])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.0f} MB")


def metadata(options: argparse.Namespace) -> dict[str, Any]:
    """The header's values."""
    vocabulary = byte_pair_vocabulary(options.vocabulary)
    return {
        "llama.context_length": 8192,
        "llama.embedding_length": options.embedding,
        "llama.block_count": options.layers,
        "llama.feed_forward_length": options.feed_forward,
        "llama.attention.head_count": options.heads,
        "llama.attention.head_count_kv": options.kv_heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.dimension_count": options.embedding // options.heads,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        "tokenizer.ggml.merges": vocabulary.merges,
        "tokenizer.ggml.add_bos_token": False,
        **{f"tokenizer.ggml.{name}_token_id": token for name, token in vocabulary.special.items()},
    }


def shapes(options: argparse.Namespace) -> dict[str, tuple[int, ...]]:
    """The shape (outputs, inputs) of each tensor; vectors are those of norms."""
    width, feed_forward = options.embedding, options.feed_forward
    keys = width // options.heads * options.kv_heads
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (options.vocabulary, width),
        "output.weight": (options.vocabulary, width),
        "output_norm.weight": (width,),
    }
    for layer in range(options.layers):
        parts = {
            "attn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (keys, width),
            "attn_v": (keys, width),
            "attn_output": (width, width),
            "ffn_norm": (width,),
            "ffn_gate": (feed_forward, width),
            "ffn_up": (feed_forward, width),
            "ffn_down": (width, feed_forward),
        }
        found |= {f"blk.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return found


def matrix(random: np.random.Generator, shape: tuple[int, ...], kind: str, deviation: float) -> npt.NDArray[Any]:
    """Random numbers around 0: a float array, or the bytes (uint8 [outputs, row bytes]) of a quantised type."""
    if kind in ("F32", "F16"):
        numbers = random.standard_normal(shape, np.float32) * np.float32(deviation)
        return numbers if kind == "F32" else numbers.astype(np.float16)
    block, size = gguf.GGML_QUANT_SIZES[_TYPES[kind]]
    assert block == _BLOCK
    rows = np.frombuffer(random.bytes(shape[0] * shape[1] // block * size), np.uint8).copy()
    blocks = rows.reshape(-1, size)
    scale = deviation / _SPREAD[kind]
    scales = np.array([scale] if kind != "Q4_1" else [scale, -7.5 * scale], np.float16)
    blocks[:, : scales.nbytes] = scales.view(np.uint8)
    return rows.reshape(shape[0], -1)


if __name__ == "__main__":
    main()
