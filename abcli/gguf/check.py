"""Decides, without loading it, whether a file is a model that llama.cpp can be given.

llama.cpp refuses many bad files with an error, but some run into an assertion or a division by zero,
which ends the whole process. What is known to do so is refused here, with a message that names the value.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Sequence
from pathlib import Path

from abcli.errors import ModelFileError, UnsupportedModelError
from abcli.gguf.cursor import FETCH_AGAIN
from abcli.gguf.header import MAGIC, Header, TensorInfo, read_header
from abcli.gguf.header_checks import check_embeddings, check_hyperparameters, check_tensor_types, check_tokenizer

CHAT_MODEL_HINT = "use a GGUF file of a model that writes text"
EMBEDDING_HINT = "use a GGUF file of an embedding model"
ADAPTER_HINT = "name the model that it changes, and this file with `lora`"

# What a file that is no model starts with -> what to call it.
SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"PK\x03\x04", "a zip archive or a PyTorch checkpoint"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"7z\xbc\xaf", "a 7-Zip archive"),
    (b"%PDF-", "a PDF document"),
    (b"\x7fELF", "a program"),
    (b"\x80\x02", "a Python pickle"),
    (b"version https://git-lfs", "a git-lfs pointer, not the file it points to"),
    (b"lmgg", "a GGML file from before GGUF"),
    (b"fmgg", "a GGML file from before GGUF"),
    (b"tjgg", "a GGML file from before GGUF"),
    (b"FUGG", "a big-endian GGUF file"),
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<?xml", "an XML document"),
    (b"{", "a JSON document"),
)
HINTS = {
    "a safetensors file": "convert it with llama.cpp's convert_hf_to_gguf.py, a LoRA with convert_lora_to_gguf.py",
    "a git-lfs pointer, not the file it points to": "run `git lfs pull`, or download the file itself",
    "an HTML page": "the download gave a web page: fetch the file again from its download link",
    "a GGML file from before GGUF": "convert the model again with a current llama.cpp",
    "a big-endian GGUF file": "fetch or convert a little-endian version of it",
}

# general.type, and for older files general.architecture, of GGUF files that are no language models.
FOREIGN_TYPES = {
    "adapter": "a LoRA adapter",
    "mmproj": "a projector for images or audio (mmproj)",
    "imatrix": "an importance matrix",
}
FOREIGN_ARCHITECTURES = {
    "clip": "a projector for images or audio (mmproj)",
    "controlvector": "a control vector",
    "imatrix": "an importance matrix",
    "t5encoder": "an encoder",
    "eagle3": "a draft model for speculative decoding",
    "dflash": "a draft model for speculative decoding",
    "gemma4-assistant": "a draft model for speculative decoding",
    "wavtokenizer-dec": "a decoder for audio",
    "qwen3tts": "a speech model",
    "pockettts": "a speech model",
}
# Architectures of models that turn a text into numbers.
ENCODERS = frozenset(
    [
        "bert",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "jina-bert-v2",
        "jina-bert-v3",
        "eurobert",
        "gemma-embedding",
        "llama-embed",
    ]
)
# llama.h, llama_pooling_type: ways to one embedding of all tokens' states, and to how well two texts match.
_MEAN, _RANK = 1, 4
# Architectures whose models write text, but in another way than abcli can: what they are, and why not.
OTHER_WRITERS = {
    "t5": "an encoder-decoder model, whose encoder has to read the prompt first",
    **dict.fromkeys(
        ("dream", "llada", "llada-moe", "rnd1"), "a diffusion model, which does not write token by token but all over"
    ),
}
# llama.cpp maps the file and asserts that what it maps starts at a multiple of this (TENSOR_ALIGNMENT).
NATIVE_ALIGNMENT = 32
ARCHITECTURE_NAME = re.compile(r"[\w.+-]{1,64}", re.ASCII)
SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
MAX_SPLITS = 1024


def check_file(path: Path, *, embeds: bool = False) -> tuple[Header, ...]:
    """Check the model file `path`, with all its parts if it is split; the header of each file.

    Raises ModelFileError for a file that is missing, unreadable, foreign, truncated or damaged, and
    UnsupportedModelError for a sound file that is no model which writes text, or with `embeds` none that can make
    embeddings.
    """
    check_kind_of_file(path)
    header = read_header(path)
    check_integrity(header)
    files = (header, *(check_part(part, header) for part in split_paths(header)[1:]))
    tensors = [tensor for file in files for tensor in file.tensors]
    check_kind_of_model(header, embeds=embeds)
    check_tokenizer(header)
    check_hyperparameters(header)
    check_weights(header, tensors)
    check_tensor_types(header, tensors)
    check_embeddings(header, tensors)
    return files


def check_weights(header: Header, tensors: Sequence[TensorInfo]) -> None:
    """Raise UnsupportedModelError for a file without any."""
    if not tensors:
        raise UnsupportedModelError(f"{header.path} has no weights, only metadata", CHAT_MODEL_HINT)


def split_paths(header: Header) -> tuple[Path, ...]:
    """The files of a model in order: just the one, or all parts of a split model.

    Raises ModelFileError if the header belongs to a later part or the name does not lead to the others.
    """
    count = header.metadata.get("split.count", 1)
    number = header.metadata.get("split.no", 0)
    if type(count) is not int or type(number) is not int or not 0 <= count <= MAX_SPLITS:
        raise ModelFileError(f"{header.path} is part {number!r} of {count!r} parts", FETCH_AGAIN)
    if count <= 1:
        return (header.path,)
    match = SPLIT_NAME.fullmatch(header.path.name)
    if number != 0:
        first = f"{match['stem']}-00001-of-{count:05d}.gguf" if match else "the one ending in -00001"
        raise ModelFileError(
            f"{header.path} is part {number + 1} of {count} of a split model", f"give the first part: {first}"
        )
    if not match or int(match["number"]) != 1 or int(match["count"]) != count:
        raise ModelFileError(
            f"{header.path} is the first of {count} parts, but its name does not say so",
            f"give it back its name, which ended in -00001-of-{count:05d}.gguf",
        )
    names = (f"{match['stem']}-{part:05d}-of-{count:05d}.gguf" for part in range(1, count + 1))
    return tuple(header.path.with_name(name) for name in names)


def check_kind_of_file(path: Path) -> None:
    """Check that `path` is a regular file that begins like GGUF. Raises ModelFileError, which names what it is."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise ModelFileError(f"{path} is a directory", "give the path of a .gguf file in it")
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path} is not a regular file", "give the path of a .gguf file")
        if status.st_size == 0:
            raise ModelFileError(f"{path} is empty", FETCH_AGAIN)
        with path.open("rb") as file:
            start = file.read(512)
    except FileNotFoundError as error:
        raise ModelFileError(f"there is no file {path}", "check the spelling of the path") from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ModelFileError(f"cannot read {path}: {reason}", "check the path and its permissions") from error
    if not start.startswith(MAGIC):
        kind = _looks_like(start)
        raise ModelFileError(
            f"{path} is {kind}" if kind else f"{path} is not a GGUF file",
            HINTS.get(kind, "give the path of a GGUF file, which is what llama.cpp loads"),
        )


def _looks_like(start: bytes) -> str:
    """What a file that starts with these bytes seems to be, "" if nothing known."""
    if len(start) > 9 and start[8:10] == b'{"':
        return "a safetensors file"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for signature, kind in SIGNATURES:
        if start.startswith(signature) or text.startswith(signature.lower()):
            return kind
    if start == bytes(len(start)):
        return "a file of zeros, such as an unfinished download"
    if start.isascii() and all(byte >= 0x20 or byte in b"\t\r\n" for byte in start):
        return "a text file"
    return ""


def check_integrity(header: Header) -> None:
    """The tensors' data must follow each other as llama.cpp expects, and be there to the last byte.

    Raises ModelFileError, and UnsupportedModelError for an alignment that llama.cpp cannot map.
    """
    position = 0
    for tensor in header.tensors:
        if tensor.offset != position:
            what = "overlaps the one before it" if tensor.offset < position else "leaves a gap before it"
            raise ModelFileError(
                f"{header.path}: the tensor {tensor.name!r} {what} "
                f"(it starts at {tensor.offset} instead of {position})",
                FETCH_AGAIN,
            )
        if (header.data_offset + position) % NATIVE_ALIGNMENT:
            raise UnsupportedModelError(
                f"{header.path} aligns tensors to {header.alignment} bytes; {NATIVE_ALIGNMENT} are needed",
                "convert the model again with a current llama.cpp",
            )
        end = header.data_offset + position + tensor.size_bytes
        position += -(-tensor.size_bytes // header.alignment) * header.alignment
    if header.tensors and end > header.file_size:
        raise ModelFileError(
            f"{header.path} is truncated: {end - header.file_size} of {end} bytes are missing", FETCH_AGAIN
        )


def check_part(part: Path, first: Header) -> Header:
    """Check a later part of a split model and return its header. Raises ModelFileError."""
    if not part.is_file():
        raise ModelFileError(
            f"{part} is missing, a part of the split model {first.path.name}",
            "fetch all parts into the same directory",
        )
    check_kind_of_file(part)
    header = read_header(part)
    number = int(part.name[-len("00001-of-00002.gguf") :][:5]) - 1
    # llama.cpp reads the number of a later part as a u16 without asking for its type.
    if header.metadata.get("split.no") != number or header.types["split.no"] != "u16":
        raise ModelFileError(f"{part} does not belong to the split model {first.path.name}", FETCH_AGAIN)
    check_integrity(header)
    return header


def is_embedding_model(header: Header) -> bool:
    """Whether a model turns texts into numbers instead of writing on."""
    return (
        header.architecture in ENCODERS
        or header.get("attention.causal") is False
        or header.integer("pooling_type") in range(_MEAN, _RANK + 1)
    )


def check_kind_of_model(header: Header, *, embeds: bool = False) -> None:
    """Check that the model writes text, or with `embeds` that it can make embeddings, if need be of what it would say.

    Raises UnsupportedModelError, or ModelFileError without an architecture.
    """
    general_type = header.metadata.get("general.type")
    architecture = header.metadata.get("general.architecture")
    kind = FOREIGN_TYPES.get(general_type) if isinstance(general_type, str) else None
    if kind is None and not (isinstance(architecture, str) and ARCHITECTURE_NAME.fullmatch(architecture)):
        raise ModelFileError(
            f"{header.path} does not say which architecture it has (general.architecture)", FETCH_AGAIN
        )
    if kind is None and (other := OTHER_WRITERS.get(header.architecture)):
        raise UnsupportedModelError(
            f"{header.path} is {other}; abcli only decodes token by token",
            "llama.cpp's own programs run it; take a model of another architecture here",
        )
    kind = kind or FOREIGN_ARCHITECTURES.get(header.architecture)
    if kind is None and header.integer("pooling_type") == _RANK:
        kind = "a reranker"
    if kind is None and not embeds and is_embedding_model(header):
        kind = "an encoder for embeddings" if header.architecture in ENCODERS else "an embedding model"
    if kind is not None:
        hint = ADAPTER_HINT if kind == FOREIGN_TYPES["adapter"] else EMBEDDING_HINT if embeds else CHAT_MODEL_HINT
        wanted = "makes embeddings" if embeds else "writes text"
        raise UnsupportedModelError(f"{header.path} is {kind}, not a model that {wanted}", hint)
