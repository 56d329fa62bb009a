"""The rotary embedding of a model, read from its file as llama.cpp reads it."""

from __future__ import annotations

import numpy as np

from abcli.gguf.header import Header, TensorInfo
from abcli.rope.frequencies import RopeParameters

_FACTORS = "rope_freqs.weight"
_LONG_FACTORS = "rope_factors_long.weight"
_SHORT_FACTORS = "rope_factors_short.weight"


def rope_parameters(header: Header, *, neox: bool, context_size: int) -> RopeParameters:
    """The parameters llama.cpp uses in a context of `context_size` tokens (llama-model.cpp, llama-context.cpp).

    `context_size` matters to models with long and short factors.
    """
    dimensions = header.integer("rope.dimension_count", header.key_length)
    scaling = header.get("rope.scaling.type", "linear")
    factor = float(header.get("rope.scaling.factor", 0.0) or header.get("rope.scale_linear", 0.0) or 0.0)
    original = header.integer("rope.scaling.original_context_length", header.trained_context)
    return RopeParameters(
        dimensions=dimensions,
        neox=neox,
        frequency_scale=1.0 if factor == 0.0 or scaling == "none" else 1.0 / factor,
        factors=_factors(header, dimensions // 2, long=context_size > original),
        extrapolation_factor=1.0 if scaling == "yarn" else 0.0,
        original_context=original,
    )


def follows_context_size(header: Header) -> bool:
    """Whether the rotation depends on the size of the context: long ones have factors of their own."""
    return any(tensor.name == _LONG_FACTORS for tensor in header.tensors)


def _factors(header: Header, pairs: int, *, long: bool) -> tuple[float, ...] | None:
    """The model's frequency factors, None if it has none (`llama_model::get_rope_factors`)."""
    tensors = {tensor.name: tensor for tensor in header.tensors}
    for name in (_FACTORS, _LONG_FACTORS if long else _SHORT_FACTORS):
        if name in tensors:
            return _numbers(header, tensors[name], pairs)
    return None


def _numbers(header: Header, tensor: TensorInfo, count: int) -> tuple[float, ...] | None:
    if tensor.type_name != "f32" or tensor.shape[0] < count:
        return None
    with header.path.open("rb") as file:
        file.seek(header.data_offset + tensor.offset)
        return tuple(float(number) for number in np.frombuffer(file.read(4 * count), "<f4"))
