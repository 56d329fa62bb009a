"""The model of a GGUF file in torch, in float32: what gradients of a tuning are taken through.

It computes what llama.cpp computes (src/models/{llama,qwen2,qwen3,gemma3}.cpp) with all weights frozen. Several answers
may follow one context in a row: `segments` says who sees whom.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import sqrt
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from abcli.errors import UnsupportedModelError
from abcli.gguf.architectures import WINDOW_BASES, rotation, window_layers, window_tokens
from abcli.rope.frequencies import angular_frequencies
from abcli.rope.parameters import rope_parameters
from abcli.tune.architecture import check_architecture
from abcli.tune.settings import Kind

if TYPE_CHECKING:
    from abcli.gguf.checked import CheckedModel

# Cosines and sines.
Angles: TypeAlias = tuple[Tensor, Tensor]

# The only Gemma 3 of so many layers divides its scores by another root (27B; llama.cpp's gemma3.cpp).
_GEMMA_27B_LAYERS = 62
# Queries that are attended with at once.
_BLOCK = 512


@dataclass(frozen=True)
class Rows:
    """A batch: int64 [rows, length] tokens, positions and segments.

    A token sees those before it of its own segment and of segment 0; what has segment -1 is filled up.
    """

    tokens: Tensor
    positions: Tensor
    segments: Tensor

    def to(self, device: torch.device) -> Rows:
        """The same on another device."""
        return Rows(self.tokens.to(device), self.positions.to(device), self.segments.to(device))


@dataclass(frozen=True)
class Heads:
    """A tuning as tensors: `gains` [layers, heads], `multipliers` [layers, heads of keys]; None leaves all as it is."""

    gains: Tensor | None = None
    multipliers: Tensor | None = None


class Twin:
    """A model in torch, without its adapters and tuning. Its weights take four bytes for each of its parameters."""

    def __init__(self, model: CheckedModel, device: torch.device) -> None:
        """Read the weights of a model's files. Raises UnsupportedModelError for a model it does not know."""
        header = model.header
        check_architecture(model)
        self.device = device
        self._layers, self._heads, self._key_heads = header.layers, header.heads[0], header.kv_heads[0]
        self.shapes: dict[Kind, tuple[int, int]] = {
            "gains": (self._layers, self._heads),
            "multipliers": (self._layers, self._key_heads),
        }
        self._gemma = header.architecture == "gemma3"
        self._epsilon = float(header.get("attention.layer_norm_rms_epsilon", 1e-6))
        self._score_divisor = sqrt(header.key_length)
        if self._gemma and self._layers == _GEMMA_27B_LAYERS:
            self._score_divisor = sqrt(header.embedding_length / self._heads)
        self._weights = _read(model, device)
        self._neox = rotation(header) == "halves"
        rope = rope_parameters(header, neox=self._neox, context_size=header.trained_context)
        # Apple's GPUs have no float64.
        self._exact = torch.device("cpu") if device.type == "mps" else device
        # Radians per position of each pair, and the power of a base's multiplier that divides them.
        self._frequencies = torch.tensor(angular_frequencies(rope, header.native_base), device=self._exact)
        pairs = torch.arange(rope.dimensions // 2, dtype=torch.float64, device=self._exact)
        self._powers = pairs * 2 / rope.dimensions
        self._window = window_tokens(header)
        self._windowed = window_layers(header) or ()
        # Layers with a window have a base of their own, and no scaling.
        base = float(header.get("rope.freq_base_swa", WINDOW_BASES["gemma3"]))
        plain = replace(rope, frequency_scale=1.0)
        self._window_frequencies = torch.tensor(angular_frequencies(plain, base), device=self._exact)

    def logits(self, rows: Rows, heads: Heads, wanted: Tensor, *, frugal: bool = False) -> Tensor:
        """Float32 [n, vocabulary] after the tokens that `wanted`, int64 [n, 2] of row and place, names.

        `frugal` computes each layer twice where gradients are asked for, instead of keeping all that is in between.
        """
        return self.spoken(self.hidden(rows, heads, wanted, frugal=frugal))

    def hidden(self, rows: Rows, heads: Heads, wanted: Tensor, *, frugal: bool = False) -> Tensor:
        """What `spoken` makes logits of, float32 [n, embedding]; arguments as those of `logits`."""
        numbers = self._embedded(rows.tokens)
        masks = self._masks(rows)
        frequencies = [self._frequencies, self._window_frequencies]
        common = [self._angles(rows.positions, of) for of in frequencies]
        for layer in range(self._layers):
            local = int(bool(self._window) and self._windowed[layer])
            gain = None if heads.gains is None else heads.gains[layer]
            angles = partial(_itself, common[local])
            if heads.multipliers is not None:
                # Angles of all layers would be too much to keep.
                angles = partial(self._angles, rows.positions, frequencies[local], heads.multipliers[layer])
            arguments = (layer, numbers, angles, masks[local], gain)
            if frugal and torch.is_grad_enabled():
                numbers = checkpoint(self._layer, *arguments, use_reentrant=False)
            else:
                numbers = self._layer(*arguments)
        return self._norm(numbers[wanted[:, 0], wanted[:, 1]], "output_norm")

    def spoken(self, hidden: Tensor) -> Tensor:
        """The logits, float32 [n, vocabulary], of what `hidden` gives."""
        return hidden @ self._weights.get("output.weight", self._weights["token_embd.weight"]).T

    def _embedded(self, tokens: Tensor) -> Tensor:
        numbers = self._weights["token_embd.weight"][tokens]
        return numbers * sqrt(numbers.shape[-1]) if self._gemma else numbers

    def _masks(self, rows: Rows) -> list[Tensor]:
        """Bool [rows, 1, length, length]: who sees whom, and the same within the window."""
        index = torch.arange(rows.tokens.shape[1], device=self.device)
        before = index[None, :] <= index[:, None]
        seen, own = rows.segments[:, None, :], rows.segments[:, :, None]
        mask = before[None] & ((seen == 0) | (seen == own))
        # What is filled up sees itself, or its softmax would have nothing to divide by.
        mask = (mask | torch.eye(len(index), dtype=torch.bool, device=self.device)[None])[:, None]
        if not self._window:
            return [mask]
        distance = rows.positions[:, None, :, None] - rows.positions[:, None, None, :]
        return [mask, mask & (distance < self._window)]

    def _angles(self, positions: Tensor, frequencies: Tensor, multipliers: Tensor | None = None) -> Angles:
        """Cosines and sines, float32 [rows, length, 1, pairs], or [rows, length, heads of keys, pairs]."""
        if multipliers is not None:
            frequencies = frequencies * multipliers.to(self._exact).double()[:, None] ** -self._powers
        angles = positions.to(self._exact).double()[:, :, None, None] * frequencies
        return angles.cos().float().to(self.device), angles.sin().float().to(self.device)

    def _layer(
        self, layer: int, numbers: Tensor, angles: Callable[[], Angles], mask: Tensor, gain: Tensor | None
    ) -> Tensor:
        name = f"blk.{layer}."
        attended = self._attention(name, self._norm(numbers, f"{name}attn_norm"), angles(), mask, gain)
        if self._gemma:
            attended = self._norm(attended, f"{name}post_attention_norm")
        numbers = numbers + attended
        hidden = self._norm(numbers, f"{name}ffn_norm")
        gate = self._project(hidden, f"{name}ffn_gate")
        gate = functional.gelu(gate, approximate="tanh") if self._gemma else functional.silu(gate)
        forward = self._project(gate * self._project(hidden, f"{name}ffn_up"), f"{name}ffn_down")
        if self._gemma:
            forward = self._norm(forward, f"{name}post_ffw_norm")
        return numbers + forward

    def _attention(self, name: str, hidden: Tensor, angles: Angles, mask: Tensor, gain: Tensor | None) -> Tensor:
        rows, length, _ = hidden.shape
        queries, keys, values = (
            self._project(hidden, f"{name}attn_{part}").view(rows, length, heads, -1)
            for part, heads in (("q", self._heads), ("k", self._key_heads), ("v", self._key_heads))
        )
        if f"{name}attn_q_norm.weight" in self._weights:
            queries, keys = self._norm(queries, f"{name}attn_q_norm"), self._norm(keys, f"{name}attn_k_norm")
        each = self._heads // self._key_heads
        # Queries, by the head of keys that they meet.
        queries = queries.unflatten(2, (self._key_heads, each))
        queries = self._rotated(queries, (angles[0].unsqueeze(3), angles[1].unsqueeze(3))).flatten(2, 3)
        keys = self._rotated(keys, angles)
        keys, values = (part.repeat_interleave(each, 2).transpose(1, 2) for part in (keys, values))
        outputs = self._attended(queries.transpose(1, 2), keys, values, mask).transpose(1, 2)
        if gain is not None:
            outputs = outputs * gain[:, None]
        return self._project(outputs.reshape(rows, length, -1), f"{name}attn_output")

    def _attended(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Attention in blocks of queries, each over the keys up to its end: nobody sees what comes later."""
        length = queries.shape[2]
        blocks = [(begin, min(begin + _BLOCK, length)) for begin in range(0, length, _BLOCK)]
        outputs = [
            functional.scaled_dot_product_attention(
                queries[:, :, begin:end],
                keys[:, :, :end],
                values[:, :, :end],
                attn_mask=mask[:, :, begin:end, :end],
                scale=1 / self._score_divisor,
            )
            for begin, end in blocks
        ]
        return torch.cat(outputs, 2)

    def _rotated(self, heads: Tensor, angles: Angles) -> Tensor:
        cosines, sines = angles
        turned = 2 * cosines.shape[-1]
        part, rest = heads[..., :turned], heads[..., turned:]
        if self._neox:
            first, second = part.chunk(2, -1)
            part = torch.cat([first * cosines - second * sines, first * sines + second * cosines], -1)
        else:
            first, second = part[..., 0::2], part[..., 1::2]
            part = torch.stack([first * cosines - second * sines, first * sines + second * cosines], -1).flatten(-2)
        return torch.cat([part, rest], -1) if rest.shape[-1] else part

    def _norm(self, numbers: Tensor, name: str) -> Tensor:
        scale = torch.rsqrt(numbers.pow(2).mean(-1, keepdim=True) + self._epsilon)
        return numbers * scale * self._weights[f"{name}.weight"]

    def _project(self, numbers: Tensor, name: str) -> Tensor:
        return functional.linear(numbers, self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias"))


def _itself(angles: Angles) -> Angles:
    return angles


def _read(model: CheckedModel, device: torch.device) -> dict[str, Tensor]:
    """All weights as float32. Raises UnsupportedModelError for a quantisation that the package gguf does not know."""
    import gguf

    weights: dict[str, Tensor] = {}
    for part in model.files:
        for item in gguf.GGUFReader(part.path).tensors:
            try:
                numbers: Any = gguf.quants.dequantize(item.data, item.tensor_type)
            except NotImplementedError:
                raise UnsupportedModelError(
                    f"{part.path.name} has weights of type {item.tensor_type.name}, which torch cannot be given",
                    "tune another quantisation of the model; each has its own profile",
                ) from None
            weights[item.name] = torch.from_numpy(np.array(numbers, np.float32)).to(device)
    return weights
