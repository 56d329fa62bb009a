"""Reads the header of a GGUF file, the metadata and the list of tensors, without llama.cpp.

Format (ggml/docs/gguf.md): magic, version u32, tensor count u64, key count u64, then per key a name, a
value type and a value; then per tensor a name, its dimensions, a type and an offset into the data
section, which starts at the next multiple of the alignment.
"""

from __future__ import annotations

import math
import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abcli.errors import ModelFileError
from abcli.gguf.cursor import FETCH_AGAIN, ArrayValue, Cursor

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
DEFAULT_ROPE_BASE = 10000.0

MAX_KEYS = 65_536
MAX_KEY_BYTES = 4096
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 4
# ggml stores a tensor's name in 64 bytes, the final zero included.
MAX_TENSOR_NAME_BYTES = 63
# llama.cpp's LLAMA_MAX_LAYERS (src/llama-hparams.h).
MAX_LAYERS = 512

# ggml's tensor types (ggml/include/ggml.h): id -> name, elements per block, bytes per block.
TENSOR_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    9: ("q8_1", 32, 36),
    10: ("q2_K", 256, 84),
    11: ("q3_K", 256, 110),
    12: ("q4_K", 256, 144),
    13: ("q5_K", 256, 176),
    14: ("q6_K", 256, 210),
    15: ("q8_K", 256, 292),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1),
    25: ("i16", 1, 2),
    26: ("i32", 1, 4),
    27: ("i64", 1, 8),
    28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    34: ("tq1_0", 256, 54),
    35: ("tq2_0", 256, 66),
    39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
    41: ("q1_0", 128, 18),
    42: ("q2_0", 64, 18),
}
_BLOCK_OF_TYPE = {name: (elements, size) for name, elements, size in TENSOR_TYPES.values()}

Value = bool | int | float | str | ArrayValue


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: `shape` as the file has it (fastest dimension first), `offset` into the data section."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    type_name: str
    offset: int
    size_bytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself; `types` holds the type of every metadata value by name."""

    path: Path
    file_size: int
    version: int
    metadata: dict[str, Value] = field(repr=False)
    types: dict[str, str] = field(repr=False)
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    alignment: int
    data_offset: int

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture, "" where the file has none."""
        value = self.metadata.get("general.architecture")
        return value if isinstance(value, str) else ""

    def get(self, key_suffix: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key_suffix>`, or the default."""
        return self.metadata.get(f"{self.architecture}.{key_suffix}", default)

    def integer(self, key_suffix: str, default: int = 0) -> int:
        """A whole number of the architecture; the default where it is missing or something else."""
        value = self.get(key_suffix)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def per_layer(self, key_suffix: str, default: int = 0) -> tuple[int, ...]:
        """A whole number for each layer, whether the file has one for all layers or an array."""
        count = max(0, min(self.layers, MAX_LAYERS))
        value = self.get(key_suffix)
        if isinstance(value, ArrayValue) and value.element_type != "string":
            return tuple(int(item) for item in value.numbers()[:count])
        return (self.integer(key_suffix, default),) * count

    @property
    def native_base(self) -> float:
        """The RoPE base the model was trained with; llama.cpp's default where the file has none."""
        value = self.get("rope.freq_base", DEFAULT_ROPE_BASE)
        return float(value) if isinstance(value, (int, float)) else DEFAULT_ROPE_BASE

    @property
    def trained_context(self) -> int:
        """Tokens of context the model was trained for."""
        return self.integer("context_length")

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return self.integer("block_count")

    @property
    def embedding_length(self) -> int:
        """Width of the hidden state."""
        return self.integer("embedding_length")

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each layer."""
        return self.per_layer("attention.head_count")

    @property
    def kv_heads(self) -> tuple[int, ...]:
        """Heads of keys and values of each layer; as many as attention heads where the file has none."""
        if self.get("attention.head_count_kv") is None:
            return self.heads
        return self.per_layer("attention.head_count_kv")

    @property
    def compresses_keys(self) -> bool:
        """Whether keys and values are kept as one compressed vector for all heads (MLA)."""
        return self.integer("attention.kv_lora_rank") > 0

    @property
    def key_length(self) -> int:
        """Elements of one head's key; 0 for a model without attention."""
        return self.integer("attention.key_length", self._head_width())

    @property
    def value_length(self) -> int:
        """Elements of one head's value; 0 for a model without attention."""
        return self.integer("attention.value_length", self._head_width())

    @property
    def vocabulary_size(self) -> int:
        """Number of tokens of the tokenizer; without one, what the hyperparameters say, else 0."""
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        return tokens.count if isinstance(tokens, ArrayValue) else self.integer("vocab_size")

    @property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template, if there is one."""
        value = self.metadata.get("tokenizer.chat_template")
        return value if isinstance(value, str) and value else None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the file's tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    def _head_width(self) -> int:
        heads = self.heads[0] if self.heads else 0
        return self.embedding_length // heads if heads > 0 else 0


def row_bytes(type_name: str, elements: int) -> int:
    """Bytes of `elements` values of a ggml type; a block that is only begun counts whole."""
    block, size = _BLOCK_OF_TYPE[type_name]
    return -(-elements // block) * size


def read_header(path: Path) -> Header:
    """Read the header of the GGUF file `path`; of the tensors' data nothing is read.

    Raises ModelFileError for a file that cannot be opened, is not GGUF (little endian, version 2 or 3)
    or whose header contradicts itself or goes beyond the end of the file.
    """
    try:
        # Asked before opening: to open a named pipe would wait for somebody to write to it.
        if not stat.S_ISREG(path.stat().st_mode):
            raise ModelFileError(f"{path} is not a regular file", "give the path of a .gguf file")
        with path.open("rb") as file:
            return _header(Cursor(file, path, os.fstat(file.fileno()).st_size))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelFileError(f"cannot read {path}: {reason}", "check the path and its permissions") from error


def _header(cursor: Cursor) -> Header:
    version, tensor_count, key_count = _counts(cursor)
    metadata: dict[str, Value] = {}
    types: dict[str, str] = {}
    for _ in range(key_count):
        key = cursor.name("a metadata key", MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.damaged(f"has the key {key!r} twice")
        types[key], metadata[key] = cursor.value(key)
    alignment = _alignment(cursor, metadata, types)
    tensors: dict[str, TensorInfo] = {}
    for _ in range(tensor_count):
        tensor = _tensor(cursor)
        if tensor.name in tensors:
            raise cursor.damaged(f"has the tensor {tensor.name!r} twice")
        tensors[tensor.name] = tensor
    data_offset = -(-cursor.position // alignment) * alignment
    listed = tuple(tensors.values())
    return Header(cursor.path, cursor.size, version, metadata, types, listed, alignment, data_offset)


def _counts(cursor: Cursor) -> tuple[int, int, int]:
    if cursor.size < 4 or cursor.take(4) != MAGIC:
        raise ModelFileError(f"{cursor.path} is not a GGUF file", "give the path of a .gguf file")
    version = cursor.unsigned(4)
    if version & 0xFFFF == 0 and version:
        raise ModelFileError(
            f"{cursor.path} is a big-endian GGUF file", "fetch or convert a little-endian version of it"
        )
    if version not in VERSIONS:
        hint = "convert the model again with a current llama.cpp" if version == 1 else FETCH_AGAIN
        raise ModelFileError(f"{cursor.path} is GGUF version {version}; versions 2 and 3 can be read", hint)
    tensor_count, key_count = cursor.unsigned(8), cursor.unsigned(8)
    if tensor_count > MAX_TENSORS or key_count > MAX_KEYS:
        raise cursor.damaged(f"claims to have {tensor_count} tensors and {key_count} metadata keys")
    return version, tensor_count, key_count


def _alignment(cursor: Cursor, metadata: dict[str, Value], types: dict[str, str]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if types.get("general.alignment", "u32") != "u32" or not isinstance(alignment, int):
        raise cursor.damaged(f"has a general.alignment of type {types['general.alignment']}")
    if not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise cursor.damaged(f"has a general.alignment of {alignment}, which is no power of two")
    return alignment


def _tensor(cursor: Cursor) -> TensorInfo:
    name = cursor.name("a tensor", MAX_TENSOR_NAME_BYTES)
    dimensions = cursor.unsigned(4)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise cursor.damaged(f"gives the tensor {name!r} {dimensions} dimensions")
    shape = tuple(cursor.unsigned(8) for _ in range(dimensions))
    type_id, offset = cursor.unsigned(4), cursor.unsigned(8)
    elements = math.prod(shape)
    if elements == 0 or elements >= 2**62:
        raise cursor.damaged(f"gives the tensor {name!r} the shape {shape_text(shape)}")
    if type_id not in TENSOR_TYPES:
        raise ModelFileError(
            f"{cursor.path}: the tensor {name!r} has the unknown type {type_id}",
            "the file is damaged or made for another version of llama.cpp",
        )
    type_name, block, block_bytes = TENSOR_TYPES[type_id]
    if shape[0] % block:
        raise cursor.damaged(
            f"gives the tensor {name!r} rows of {shape[0]} elements; {type_name} needs multiples of {block}"
        )
    return TensorInfo(name, shape, type_id, type_name, offset, elements // block * block_bytes)


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape for a message, as in "64 x 320"."""
    return " x ".join(str(length) for length in shape)
