"""The angles by which RoPE rotates a key or query per position, as ggml computes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class RopeParameters:
    """What a model's file says of its rotary embedding, apart from the base.

    `dimensions` of each head are rotated in pairs: (2i, 2i + 1), or with `neox` (i, i + dimensions / 2).
    """

    dimensions: int
    neox: bool
    frequency_scale: float = 1.0
    factors: tuple[float, ...] | None = None
    extrapolation_factor: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    original_context: int = 0


def angular_frequencies(parameters: RopeParameters, base: float) -> NDArray[np.float64]:
    """Radians per position of each pair, float64 [dimensions / 2], under RoPE base `base`.

    theta_i = base ** (-2i / dimensions) / factor_i; linear scaling multiplies by the frequency scale, YaRN mixes
    both by its ramp (ggml_rope_cache_init and rope_yarn in ggml-cpu/ops.cpp).
    """
    pairs = np.arange(parameters.dimensions // 2, dtype=np.float64)
    extrapolated = float(np.float32(base)) ** (-2.0 * pairs / parameters.dimensions)
    if parameters.factors is not None:
        extrapolated = extrapolated / np.asarray(parameters.factors, np.float64)
    interpolated = parameters.frequency_scale * extrapolated
    if parameters.extrapolation_factor == 0.0:
        return np.asarray(interpolated, np.float64)
    low, high = _correction_range(parameters, base)
    ramp = 1.0 - np.clip((pairs - low) / max(0.001, high - low), 0.0, 1.0)
    mix = ramp * parameters.extrapolation_factor
    return np.asarray(interpolated * (1.0 - mix) + extrapolated * mix, np.float64)


def _correction_range(parameters: RopeParameters, base: float) -> tuple[float, float]:
    """The pairs between which YaRN blends (`ggml_rope_yarn_corr_dims`)."""

    def pair(rotations: float) -> float:
        ratio = parameters.original_context / (rotations * 2.0 * np.pi)
        return float(parameters.dimensions * np.log(ratio) / (2.0 * np.log(base)))

    low = np.floor(pair(parameters.beta_fast))
    high = np.ceil(pair(parameters.beta_slow))
    return max(0.0, float(low)), min(parameters.dimensions - 1.0, float(high))
