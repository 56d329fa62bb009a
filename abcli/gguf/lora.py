"""LoRA adapters: what is in their files, and whether they fit a model.

To the product of a model's matrix W and x, llama.cpp adds scale * alpha / rank * B (A x) for each pair of tensors
`W.lora_a` and `W.lora_b` (src/llama-graph.cpp: build_lora_mm, build_lora_mm_id, build_inp_embd). Some files that do not
fit would run into an assertion there, which ends the process, so that everything is compared beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from abcli.config import LoraConfig
from abcli.errors import ModelFileError, UnsupportedModelError
from abcli.gguf.check import ARCHITECTURE_NAME, check_integrity, check_kind_of_file
from abcli.gguf.cursor import FETCH_AGAIN, ArrayValue
from abcli.gguf.header import MAX_DIMENSIONS, Header, TensorInfo, read_header, shape_text
from abcli.gguf.header_checks import NO_WEIGHT_TYPES

ADAPTER_TYPE = "adapter"
_KIND = "lora"
_SUFFIXES = (".lora_a", ".lora_b")
# llama.cpp passes over these without a word.
_IGNORED_SUFFIX = "_norm.weight"
# Rows of these are looked up, and so A and B have changed places (llama_adapter_lora_init_impl).
_LOOKED_UP_SUFFIX = "token_embd.weight"
_EMBEDDINGS, _OUTPUT = "token_embd.weight", "output.weight"
# llama.cpp asserts that such a matrix has no adapter (build_ffn).
_NO_ADAPTER_TYPE = "nvfp4"
_INVOCATION = "adapter.alora.invocation_tokens"
_CONVERT_HINT = "make it with llama.cpp's convert_lora_to_gguf.py"
_MAX_NAME = 200


@dataclass(frozen=True)
class Pair:
    """The two matrices that change the model's tensor `target`; shapes are the file's, the fastest dimension first."""

    target: str
    a: TensorInfo
    b: TensorInfo

    @property
    def rank(self) -> int:
        """The width between A and B."""
        return self.b.shape[0]


@dataclass(frozen=True)
class Adapter:
    """A checked LoRA file, counted `scale` times; `ignored` are tensors that llama.cpp leaves out."""

    header: Header
    pairs: tuple[Pair, ...] = field(repr=False)
    ignored: tuple[str, ...]
    alpha: float
    scale: float = 1.0

    @property
    def path(self) -> Path:
        """Where the file is."""
        return self.header.path

    @property
    def label(self) -> str:
        """The file's name, with the scale if it is not 1."""
        return self.path.name if self.scale == 1 else f"{self.path.name}:{self.scale:g}"

    @property
    def ranks(self) -> tuple[int, ...]:
        """The different ranks, in ascending order."""
        return tuple(sorted({pair.rank for pair in self.pairs}))

    def factor(self, rank: int) -> float:
        """How many times B A of this rank is added to the model's weights (llama_adapter_lora_weight::get_scale)."""
        return self.scale * self.alpha / rank if self.alpha else self.scale

    @property
    def weight_bytes(self) -> int:
        """Bytes of what llama.cpp loads."""
        return sum(pair.a.size_bytes + pair.b.size_bytes for pair in self.pairs)

    @property
    def base_model(self) -> str | None:
        """The model which the file says it was made for."""
        value = self.header.metadata.get("general.base_model.0.name")
        return value[:_MAX_NAME] if isinstance(value, str) and value else None


def is_adapter(header: Header) -> bool:
    """Whether a file says of itself that it is an adapter of any kind."""
    return header.metadata.get("general.type") == ADAPTER_TYPE


def check_adapters(files: Sequence[Header], loras: Sequence[LoraConfig]) -> tuple[Adapter, ...]:
    """The adapters `loras` of a checked model with these files; those with a scale of 0 are checked and left out.

    Raises ModelFileError for a damaged or foreign adapter, UnsupportedModelError for one that does not fit the model.
    """
    tensors = {tensor.name: tensor for file in files for tensor in file.tensors}
    adapters = [fitting(replace(read_adapter(lora.path), scale=lora.scale), files[0], tensors) for lora in loras]
    return tuple(adapter for adapter in adapters if adapter.scale != 0)


def read_adapter(path: Path) -> Adapter:
    """Check the LoRA file `path` as far as that goes without its model.

    Raises ModelFileError for a file that is missing, foreign, truncated or damaged, and UnsupportedModelError for an
    adapter of another kind.
    """
    check_kind_of_file(path)
    header = read_header(path)
    check_kind_of_adapter(header)
    check_integrity(header)
    return described_adapter(header)


def described_adapter(header: Header) -> Adapter:
    """The adapter of a file whose kind and layout have been checked. Raises ModelFileError, UnsupportedModelError."""
    pairs, ignored = _pairs(header)
    return Adapter(header, pairs, ignored, _alpha(header))


def check_kind_of_adapter(header: Header) -> None:
    """Check that the file is a LoRA adapter. Raises UnsupportedModelError, or ModelFileError for impossible values."""
    path = header.path
    for key in ("general.type", "general.architecture", "adapter.type"):
        # llama.cpp asserts that these are text.
        if header.types.get(key, "string") != "string":
            raise ModelFileError(f"{path}: {key} is {header.types[key]}, not text", FETCH_AGAIN)
    if not is_adapter(header):
        known = header.architecture if ARCHITECTURE_NAME.fullmatch(header.architecture) else "unknown"
        raise UnsupportedModelError(f"{path} is no LoRA adapter (architecture {known})", _CONVERT_HINT)
    kind = header.metadata.get("adapter.type")
    if kind != _KIND:
        raise UnsupportedModelError(f"{path} is an adapter of the type {kind!r:.40}, not {_KIND}", _CONVERT_HINT)
    if not ARCHITECTURE_NAME.fullmatch(header.architecture):
        raise ModelFileError(f"{path} does not say which architecture it is for (general.architecture)", FETCH_AGAIN)
    invocation = header.metadata.get(_INVOCATION)
    if invocation is not None and not (isinstance(invocation, ArrayValue) and invocation.count == 0):
        raise UnsupportedModelError(
            f"{path} is an activated LoRA (aLoRA): it counts only after certain tokens of a prompt, which abcli "
            "cannot switch on midway",
            "use a plain LoRA adapter",
        )
    if header.metadata.get("split.count", 1) not in (0, 1):
        raise UnsupportedModelError(
            f"{path} is one of several files", "put them together with `llama-gguf-split --merge`"
        )


def fitting(adapter: Adapter, model: Header, tensors: Mapping[str, TensorInfo]) -> Adapter:
    """`adapter`, if it fits the model that has `tensors`; else UnsupportedModelError, which names the first misfit."""
    made_for = f": {adapter.base_model!r}" if adapter.base_model else ""
    hint = f"use it with the model it was made for{made_for}, in its exact size"
    if adapter.header.architecture != model.architecture:
        raise UnsupportedModelError(
            f"{adapter.path} is a LoRA adapter for {adapter.header.architecture}, "
            f"but {model.path.name} is {model.architecture}",
            hint,
        )
    for pair in adapter.pairs:
        tensor = tensors.get(pair.target)
        misfit = "the model does not have it" if tensor is None else _misfit(pair, tensor, tensors)
        if misfit:
            raise UnsupportedModelError(
                f"{adapter.path} does not fit {model.path.name}: it changes the tensor {pair.target!r}, but {misfit}",
                hint,
            )
    return adapter


def warn_of_ignored(adapters: Iterable[Adapter], warn: Callable[[str], None]) -> None:
    """Tell `warn` which parts of a model's adapters llama.cpp leaves out."""
    for adapter in adapters:
        if adapter.ignored:
            count = len(adapter.ignored)
            warn(f"{adapter.path.name}: llama.cpp leaves out its {count} {'norm' if count == 1 else 'norms'}")


def _misfit(pair: Pair, tensor: TensorInfo, tensors: Iterable[str]) -> str:
    """Why the pair cannot change the model's `tensor`; empty if it can."""
    if len([length for length in tensor.shape if length > 1]) < 2:
        return "that is a vector, which llama.cpp's LoRA leaves as it is"
    wide, high, *others = _padded(tensor.shape)
    if pair.target.endswith(_LOOKED_UP_SUFFIX):
        fits = _padded(pair.a.shape) == (pair.rank, high, 1, 1) and _padded(pair.b.shape) == (pair.rank, wide, 1, 1)
    else:
        a, b = (wide, pair.rank, *others), (pair.rank, high, *others)
        fits = _padded(pair.a.shape) == a and _padded(pair.b.shape) == b
    if not fits:
        return (
            f"that is {shape_text(tensor.shape)}, and the adapter's A {shape_text(pair.a.shape)} and "
            f"B {shape_text(pair.b.shape)}"
        )
    if pair.target == _EMBEDDINGS and _OUTPUT not in tensors:
        return "the model has no other output matrix, and llama.cpp cannot change one that serves as both"
    if tensor.type_name == _NO_ADAPTER_TYPE:
        return f"that is {_NO_ADAPTER_TYPE}, which llama.cpp cannot combine with a LoRA"
    return ""


def _padded(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape, *[1] * (MAX_DIMENSIONS - len(shape)))


def _pairs(header: Header) -> tuple[tuple[Pair, ...], tuple[str, ...]]:
    """The pairs of matrices in the order of the file, and the names of the tensors that llama.cpp leaves out."""
    halves: dict[str, dict[str, TensorInfo]] = {}
    ignored = []
    for tensor in header.tensors:
        target, suffix = tensor.name[:-7], tensor.name[-7:]
        if suffix not in _SUFFIXES:
            if not tensor.name.endswith(_IGNORED_SUFFIX):
                raise ModelFileError(
                    f"{header.path} has the tensor {tensor.name!r}, which is no part of a LoRA", _CONVERT_HINT
                )
            ignored.append(tensor.name)
            continue
        # llama.cpp takes the suffix away wherever it stands in a name.
        if not target or any(other in target for other in _SUFFIXES):
            raise ModelFileError(f"{header.path} has a tensor with the impossible name {tensor.name!r}", FETCH_AGAIN)
        if tensor.type_name in NO_WEIGHT_TYPES:
            raise UnsupportedModelError(
                f"{header.path}: the tensor {tensor.name!r} has the type {tensor.type_name}, "
                "which llama.cpp cannot compute with",
                "convert the adapter again, to f16 or f32",
            )
        halves.setdefault(target, {})[suffix] = tensor
    if not halves:
        raise ModelFileError(f"{header.path} has no weights, only metadata", FETCH_AGAIN)
    pairs = []
    for target, found in halves.items():
        missing = [suffix for suffix in _SUFFIXES if suffix not in found]
        if missing:
            raise ModelFileError(f"{header.path} lacks the tensor {target + missing[0]!r}", FETCH_AGAIN)
        pairs.append(_pair(header, target, found[_SUFFIXES[0]], found[_SUFFIXES[1]]))
    return tuple(pairs), tuple(ignored)


def _pair(header: Header, target: str, a: TensorInfo, b: TensorInfo) -> Pair:
    rank = _padded(a.shape)[0 if target.endswith(_LOOKED_UP_SUFFIX) else 1]
    if rank != b.shape[0]:
        raise ModelFileError(
            f"{header.path}: the matrices for {target!r} have the ranks {rank} and {b.shape[0]} "
            f"(A {shape_text(a.shape)}, B {shape_text(b.shape)})",
            _CONVERT_HINT,
        )
    return Pair(target, a, b)


def _alpha(header: Header) -> float:
    """What the product of the matrices is multiplied with before it is divided by their rank; 0 for neither."""
    alpha = header.metadata.get("adapter.lora.alpha", 0.0)
    # llama.cpp asserts the type.
    if header.types.get("adapter.lora.alpha", "f32") != "f32" or not isinstance(alpha, float):
        raise ModelFileError(
            f"{header.path}: adapter.lora.alpha is {header.types['adapter.lora.alpha']}, not f32", FETCH_AGAIN
        )
    if not math.isfinite(alpha):
        raise ModelFileError(f"{header.path}: adapter.lora.alpha is {alpha}", FETCH_AGAIN)
    return alpha
