"""LoRA files with random weights, and models into which the same weights are merged by numpy alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
import numpy.typing as npt

from abcli.gguf.header import read_header
from tests.support.tiny_gguf import add_value

Array = npt.NDArray[np.float32]
WeightType = Literal["f32", "f16", "q8_0"]


@dataclass(frozen=True)
class Matrices:
    """A float32 [rank, inputs] and B float32 [outputs, rank], for each expert where there are experts.

    Of embeddings A [tokens, rank] and B [width, rank].
    """

    a: Array
    b: Array


Lora = Mapping[str, Matrices]


def is_projection(name: str) -> bool:
    """Whether a tensor is one of a layer's matrices, which adapters usually change."""
    return name.startswith("blk.") and name.endswith(".weight") and "norm" not in name


def random_lora(
    model: Path, *, rank: int = 4, seed: int = 0, strength: float = 0.3, wanted: Callable[[str], bool] = is_projection
) -> dict[str, Matrices]:
    """Matrices for the `wanted` tensors of `model`, whose product is `strength` times as large as usual weights."""
    random = np.random.default_rng(seed)
    found = {}
    for tensor in read_header(model).tensors:
        if not wanted(tensor.name):
            continue
        inputs, outputs, *experts = tensor.shape
        shape_a, shape_b = (*experts, rank, inputs), (*experts, outputs, rank)
        if tensor.name == "token_embd.weight":
            shape_a, shape_b = (outputs, rank), (inputs, rank)
        a = random.standard_normal(shape_a) / np.sqrt(inputs)
        b = random.standard_normal(shape_b) * strength / np.sqrt(rank)
        found[tensor.name] = Matrices(a.astype(np.float32), b.astype(np.float32))
    return found


def write_lora(
    path: Path,
    lora: Lora,
    *,
    architecture: str = "llama",
    alpha: float = 4.0,
    dtype: WeightType = "f32",
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, npt.NDArray[Any] | None] | None = None,
) -> Path:
    """Write a LoRA file as llama.cpp's convert_lora_to_gguf.py does, and return `path`.

    `metadata` and `tensors` replace, add or, where the value is None, remove items, so that a test can break one thing.
    """
    values = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": alpha} | dict(metadata or {})
    writer = gguf.GGUFWriter(path, values.get("general.architecture") or architecture)
    if values.get("general.architecture", "") is None:
        del writer.kv_data[0]["general.architecture"]
    for key, value in values.items():
        add_value(writer, key, value)
    weights: dict[str, npt.NDArray[Any] | None] = {}
    for target, matrices in lora.items():
        weights |= {f"{target}.lora_a": matrices.a, f"{target}.lora_b": matrices.b}
    for name, tensor in (weights | dict(tensors or {})).items():
        if tensor is not None:
            _add(writer, name, tensor, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, name: str, tensor: npt.NDArray[Any], dtype: WeightType) -> None:
    if dtype == "f16" and tensor.dtype == np.float32:
        writer.add_tensor(name, tensor.astype(np.float16))
    elif dtype == "q8_0" and tensor.shape[-1] % 32 == 0:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(tensor, kind), raw_dtype=kind)
    else:
        writer.add_tensor(name, tensor)


def write_merged(path: Path, model: Path, loras: Iterable[tuple[Lora, float]], layers: int | None = None) -> Path:
    """Write the model with W + factor * B A instead of each W that one of `loras`, (matrices, factor), changes.

    All tensors become f32: activations are rounded before they meet quantised weights. Only the first `layers` are
    kept, if that is given.
    """
    reader = gguf.GGUFReader(model)
    architecture = read_header(model).architecture
    writer = gguf.GGUFWriter(path, architecture)
    for name, item in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            kind, value = item.types[0], item.contents()
            if layers is not None and name == f"{architecture}.block_count":
                value = layers
            writer.add_key_value(name, value, kind, item.types[-1] if len(item.types) > 1 else None)
    wanted = list(loras)
    for tensor in reader.tensors:
        if layers is not None and tensor.name.startswith("blk.") and int(tensor.name.split(".")[1]) >= layers:
            continue
        weights = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        for lora, factor in wanted:
            if tensor.name in lora:
                weights = weights + np.float32(factor) * _product(tensor.name, lora[tensor.name])
        writer.add_tensor(tensor.name, np.ascontiguousarray(weights))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _product(name: str, matrices: Matrices) -> Array:
    product = matrices.a @ matrices.b.T if name == "token_embd.weight" else matrices.b @ matrices.a
    return product.astype(np.float32)
