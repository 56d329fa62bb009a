"""Dense llama-like transformers in numpy, float64: an implementation that shares nothing with llama.cpp or abcli."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from abcli.config import HeadNumbers

Array = NDArray[np.float64]


def reference_logits(
    path: Path, tokens: Sequence[int], bases: HeadNumbers, *, heads: int = 4, neox: bool = False
) -> Array:
    """Logits float64 [vocabulary] after the last of `tokens`, each head of keys under its own of `bases`.

    For float32 models of tests.support.tiny_gguf: "llama", or "qwen2" with `neox`.
    """
    weights = {item.name: item.data.astype(np.float64) for item in gguf.GGUFReader(path).tensors}

    def project(numbers: Array, name: str) -> Array:
        return np.asarray(numbers @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0))

    def norm(numbers: Array, name: str) -> Array:
        return np.asarray(numbers / np.sqrt((numbers**2).mean(-1, keepdims=True) + 1e-5) * weights[f"{name}.weight"])

    hidden = weights["token_embd.weight"][list(tokens)]
    count = len(tokens)
    for layer, of_heads in enumerate(bases):
        name = f"blk.{layer}."
        before = norm(hidden, f"{name}attn_norm")
        width = before.shape[-1] // heads
        queries, keys, values = (
            project(before, f"{name}attn_{part}").reshape(count, -1, width).swapaxes(0, 1) for part in "qkv"
        )
        outputs = []
        for head in range(heads):
            own = head * len(of_heads) // heads
            query, key = (_turned(of, of_heads[own], neox=neox) for of in (queries[head], keys[own]))
            scores = query @ key.T / np.sqrt(width) + np.triu(np.full((count, count), -np.inf), 1)
            attended = np.exp(scores - scores.max(-1, keepdims=True))
            outputs.append(attended / attended.sum(-1, keepdims=True) @ values[own])
        hidden = hidden + project(np.concatenate(outputs, -1), f"{name}attn_output")
        before = norm(hidden, f"{name}ffn_norm")
        gate = project(before, f"{name}ffn_gate")
        hidden = hidden + project(gate / (1 + np.exp(-gate)) * project(before, f"{name}ffn_up"), f"{name}ffn_down")
    return project(norm(hidden[-1:], "output_norm"), "output")[0]


def _turned(vectors: Array, base: float, *, neox: bool) -> Array:
    """Rows, each turned by its place: as complex numbers times e^(i * place * base^(-2j / width))."""
    count, width = vectors.shape
    half = width // 2
    first, second = (vectors[:, :half], vectors[:, half:]) if neox else (vectors[:, 0::2], vectors[:, 1::2])
    angles = np.outer(np.arange(count), base ** (-2.0 * np.arange(half) / width))
    turned = (first + 1j * second) * np.exp(1j * angles)
    found = np.empty_like(vectors)
    if neox:
        found[:, :half], found[:, half:] = turned.real, turned.imag
    else:
        found[:, 0::2], found[:, 1::2] = turned.real, turned.imag
    return found
