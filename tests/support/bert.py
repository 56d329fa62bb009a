"""BERT in float64, after its paper (arXiv 1810.04805), for what llama.cpp computes to be checked against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_HEADS = 4


def bert_states(path: Path, tokens: Sequence[int]) -> Array:
    """The last states [tokens, width] of the tokens of a text, by the weights of a file of `write_tiny_bert`."""
    weights = {tensor.name: np.asarray(tensor.data, np.float64) for tensor in gguf.GGUFReader(path).tensors}

    def linear(name: str, values: Array) -> Array:
        return values @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(name: str, values: Array) -> Array:
        moved = values - values.mean(axis=1, keepdims=True)
        moved /= np.sqrt(moved.var(axis=1, keepdims=True) + 1e-5)
        return moved * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    states = weights["token_embd.weight"][list(tokens)] + weights["token_types.weight"][0]
    states = norm("token_embd_norm", states + weights["position_embd.weight"][: len(tokens)])
    for layer in range(2):
        block = f"blk.{layer}."
        query, key, value = (
            linear(f"{block}attn_{part}", states).reshape(len(tokens), _HEADS, -1).swapaxes(0, 1) for part in "qkv"
        )
        scores = query @ key.swapaxes(1, 2) / np.sqrt(query.shape[2])
        shares = np.exp(scores - scores.max(axis=2, keepdims=True))
        shares /= shares.sum(axis=2, keepdims=True)
        seen = (shares @ value).swapaxes(0, 1).reshape(len(tokens), -1)
        states = norm(f"{block}attn_output_norm", states + linear(f"{block}attn_output", seen))
        inner = linear(f"{block}ffn_up", states)
        # GELU by its tanh approximation (arXiv 1606.08415), as llama.cpp has it.
        inner = inner / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (inner + 0.044715 * inner**3)))
        states = norm(f"{block}layer_output_norm", states + linear(f"{block}ffn_down", inner))
    return states
