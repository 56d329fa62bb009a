"""The checks of a model file: every kind of bad file is refused with words that name what is wrong."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.errors import AbcliError, ModelFileError, UnsupportedModelError
from abcli.gguf.check import check_file, split_paths
from abcli.gguf.header import read_header
from abcli.gguf.verification import Verification
from tests.support.models import checked_model
from tests.support.tiny_gguf import sentence_piece_vocabulary, write_tiny_mamba, write_tiny_model

NAN, INFINITY = float("nan"), float("inf")


def refused(path: Path, kind: type[AbcliError] = ModelFileError) -> str:
    """The message with which `path` is refused; it and its hint are one line each."""
    with pytest.raises(kind) as caught:
        check_file(path)
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value.message


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "bloom"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
def test_sound_models_pass(tmp_path: Path, architecture: Any, dtype: Any) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", architecture=architecture, dtype=dtype)
    assert check_file(path)[0].architecture == architecture


def test_more_sound_models_pass(tmp_path: Path, real_model: Path) -> None:
    check_file(real_model)
    check_file(write_tiny_mamba(tmp_path / "a.gguf"))
    check_file(write_tiny_model(tmp_path / "b.gguf", tokenizer="llama", chat_template=None))
    check_file(write_tiny_model(tmp_path / "c.gguf", rope_factors=[2.0] * 8))


FOREIGN = {
    "a PNG image": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "a JPEG image": b"\xff\xd8\xff\xe0" + bytes(100),
    "a zip archive": b"PK\x03\x04" + bytes(100),
    "a gzip archive": b"\x1f\x8b\x08" + bytes(100),
    "a safetensors file": struct.pack("<Q", 100) + b'{"__metadata__":{}}',
    "an HTML page": b"\n<!DOCTYPE html><html><body>Not found</body></html>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a JSON document": b' {"error": "Entry not found"}',
    "a text file": b"Entry not found",
    "a file of zeros": bytes(4096),
    "before GGUF": b"tjgg" + bytes(100),
    "a big-endian GGUF": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "is not a GGUF file": bytes(range(128, 256)),
    "is empty": b"",
}


@pytest.mark.parametrize("words", FOREIGN)
def test_other_kinds_of_files_are_named(tmp_path: Path, words: str) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(FOREIGN[words])
    assert words in refused(path)


def test_paths_that_lead_to_no_file(tmp_path: Path) -> None:
    assert "there is no file" in refused(tmp_path / "missing.gguf")
    assert "is a directory" in refused(tmp_path)
    assert "cannot read" in refused(Path("a\0b"))
    assert "cannot read" in refused(tmp_path / ("a" * 1000))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may read everything")
def test_an_unreadable_file(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    path.chmod(0)
    assert "Permission denied" in refused(path)


def test_a_truncated_file_says_how_much_is_missing(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    size = path.stat().st_size
    os.truncate(path, size - 1000)
    assert f"truncated: 1000 of {size} bytes are missing" in refused(path)
    os.truncate(path, 1000)
    assert "ends in the middle of its header" in refused(path)


def test_tensors_must_follow_each_other(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    data = path.read_bytes()
    second = read_header(path).tensors[1]
    entry = data.index(second.name.encode()) + len(second.name) + 4 + 8 * len(second.shape) + 4
    for shift, words in ((-32, "overlaps the one before it"), (32, "leaves a gap"), (1, "leaves a gap")):
        offset = struct.pack("<Q", second.offset + shift)
        path.write_bytes(data[:entry] + offset + data[entry + 8 :])
        assert words in refused(path)


def test_names_may_not_repeat(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.1.attn_q.weight", b"blk.0.attn_q.weight"))
    assert "the tensor 'blk.0.attn_q.weight' twice" in refused(path)
    path.write_bytes(data.replace(b"llama.feed_forward_length", b"llama.rope.freq_base\0\0\0\0\0"))
    assert "a metadata key the name" in refused(path)
    path.write_bytes(data.replace(b"tokenizer.ggml.bos_token_id", b"tokenizer.ggml.eos_token_id"))
    assert "the key 'tokenizer.ggml.eos_token_id' twice" in refused(path)


def test_an_alignment_llama_cpp_cannot_map(tmp_path: Path) -> None:
    sizes = {"embedding": 20, "heads": 2}
    path = write_tiny_model(tmp_path / "m.gguf", metadata={"general.alignment": 64}, **sizes)
    check_file(path)
    write_tiny_model(path, metadata={"general.alignment": 8}, **sizes)
    assert "aligns tensors to 8 bytes; 32 are needed" in refused(path, UnsupportedModelError)


# What is changed in the metadata -> words of the message.
BAD_VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "no blocks": ({"llama.block_count": 0}, "block_count is 0"),
    "too many blocks": ({"llama.block_count": 513}, "block_count is 513"),
    "blocks as a number": ({"llama.block_count": 2.0}, "block_count is 2.0"),
    "blocks as text": ({"llama.block_count": "2"}, "block_count is '2'"),
    "no block count": ({"llama.block_count": None}, "block_count is missing"),
    "no context": ({"llama.context_length": 0}, "context_length is 0"),
    "no context length": ({"llama.context_length": None}, "context_length is missing"),
    "no width": ({"llama.embedding_length": 0}, "embedding_length is 0"),
    "negative width": ({"llama.embedding_length": -1}, "embedding_length is -1"),
    "absurd width": ({"llama.embedding_length": 2**31}, "embedding_length is 2147483648"),
    "heads in the wrong type": ({"llama.attention.head_count": [1.0, 2.0]}, "an array of f32"),
    "too few heads in the list": ({"llama.attention.head_count": [4]}, "1 values for 2 layers"),
    "negative heads": ({"llama.attention.head_count": [np.int32(-4).item(), 4]}, "values outside"),
    "too many heads": ({"llama.attention.head_count": 65536}, "65536 for 64 dimensions"),
    "heads that do not divide": ({"llama.attention.head_count_kv": 3}, "is 3 for 4 heads in layer 0"),
    "no heads for keys": ({"llama.attention.head_count_kv": 0}, "is 0 for 4 heads in layer 0"),
    "no heads": ({"llama.attention.head_count": 0, "llama.attention.head_count_kv": 0}, "for 0 heads"),
    "an odd rotation": ({"llama.rope.dimension_count": 15}, "dimension_count is 15"),
    "too wide a rotation": ({"llama.rope.dimension_count": 128}, "is 128 for heads of 16 dimensions"),
    "half a rotation": ({"llama.rope.dimension_count": 8}, "is 8 for heads of 16 dimensions"),
    "unequal lengths": ({"llama.attention.value_length": 32}, "is 32 for keys of 16 dimensions"),
    "a base of 0": ({"llama.rope.freq_base": 0.0}, "freq_base is 0.0"),
    "a negative base": ({"llama.rope.freq_base": -1.0}, "freq_base is -1.0"),
    "a base that is no number": ({"llama.rope.freq_base": NAN}, "freq_base is nan"),
    "an infinite base": ({"llama.rope.freq_base": INFINITY}, "freq_base is inf"),
    "a whole base": ({"llama.rope.freq_base": 10000}, "freq_base is 10000"),
    "eps that is no number": ({"llama.attention.layer_norm_rms_epsilon": NAN}, "epsilon is nan"),
    "negative eps": ({"llama.attention.layer_norm_rms_epsilon": -1e-5}, "epsilon is -"),
    "an unknown scaling": ({"llama.rope.scaling.type": "cubic"}, "scaling.type is 'cubic'"),
    "a scaling of the wrong type": ({"llama.rope.scaling.type": 1}, "scaling.type is 1"),
    "too many experts": ({"llama.expert_count": 1025}, "expert_count is 1025"),
    "experts none of which is used": ({"llama.expert_count": 4}, "expert_used_count is 0 of 4"),
    "experts used without any": ({"llama.expert_used_count": 2}, "expert_used_count is 2 of 0"),
    "groups without experts": ({"llama.expert_group_count": 2}, "expert_group_count is 2 for 0"),
    "groups that do not divide": (
        {"llama.expert_count": 4, "llama.expert_used_count": 2, "llama.expert_group_count": 3},
        "expert_group_used_count is 0 of 3",
    ),
    "only layers for drafts": ({"llama.nextn_predict_layers": 2}, "leaves none of 2 layers"),
    "a tokenizer of the wrong type": ({"tokenizer.ggml.model": 1}, "tokenizer of the wrong type"),
    "tokens that are numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "tokenizer of the wrong type"),
    "too few token types": ({"tokenizer.ggml.token_type": [1]}, "320 tokens, but 1 values"),
    "too few scores": ({"tokenizer.ggml.scores": [1.0]}, "320 tokens, but 1 values"),
    "types that are numbers": ({"tokenizer.ggml.token_type": [1.0]}, "token_type of the wrong type"),
    "no merges": ({"tokenizer.ggml.merges": None}, "without merges"),
    "merges that are numbers": ({"tokenizer.ggml.merges": [1]}, "merges of the wrong type"),
    "an end beyond the vocabulary": ({"tokenizer.ggml.eos_token_id": 320}, "eos_token_id of 320"),
    "a beginning beyond it": ({"tokenizer.ggml.bos_token_id": 2**32 - 1}, "bos_token_id of 4294967295"),
    "a token twice": ({"tokenizer.ggml.tokens": [b"a", b"b", b"a"]}, "1 tokens twice"),
    "a token twice up to a zero": ({"tokenizer.ggml.tokens": [b"a\0b", b"a"]}, "1 tokens twice"),
    "an empty token's name": ({"tokenizer.ggml.tokens": [b"", b"[EMPTY_0]"]}, "1 tokens twice"),
}


@pytest.mark.parametrize("case", BAD_VALUES)
def test_bad_values_are_named(tmp_path: Path, case: str) -> None:
    metadata, words = BAD_VALUES[case]
    assert words in refused(write_tiny_model(tmp_path / "m.gguf", metadata=metadata))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ([4, 32, 0, 0], "is [4, 32, 0, 0] for heads of 16"),
        ([0, 0, 0, 0], "is [0, 0, 0, 0]"),
        ([0, 0, 0, 4], "is [0, 0, 0, 4]"),
        ([8, -4, 4, 0], "is [8, -4, 4, 0]"),
        ([2**31 - 1, 2**31 - 1, 4, 0], "for heads of 16 dimensions"),
        ([4, 4], "is an array of i32, not 3 or 4"),
        ([4.0, 4.0, 0.0, 0.0], "is an array of f32"),
        (4, "is 4, not 3 or 4"),
        (None, "is None, not 3 or 4"),
    ],
)
def test_the_sections_of_a_head_must_fit(tmp_path: Path, sections: Any, words: str) -> None:
    path = tmp_path / "m.gguf"
    check_file(write_tiny_model(path, architecture="qwen2vl"))
    write_tiny_model(path, architecture="qwen2vl", metadata={"qwen2vl.rope.dimension_sections": sections})
    assert words in refused(path)


@pytest.mark.parametrize("architecture", ["gemma3", "stablelm", "qwen2vl"])
def test_a_rotation_of_nothing_never_ends(tmp_path: Path, architecture: Any) -> None:
    metadata = {f"{architecture}.rope.dimension_count": 0}
    path = write_tiny_model(tmp_path / "m.gguf", architecture=architecture, metadata=metadata)
    assert "rope.dimension_count is 0" in refused(path)


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "no tokenizer": ({"tokenizer.ggml.model": None}, "has no tokenizer"),
    "no tokens": ({"tokenizer.ggml.tokens": None}, "has no tokenizer"),
    "the tokenizer none": ({"tokenizer.ggml.model": "none"}, "has no tokenizer"),
    "an adapter": ({"general.type": "adapter"}, "a LoRA adapter"),
    "a projector": ({"general.type": "mmproj"}, "a projector"),
    "an importance matrix": ({"general.type": "imatrix"}, "an importance matrix"),
    "an encoder": ({"llama.attention.causal": False}, "an embedding model"),
    "an embedding model": ({"llama.pooling_type": 1}, "an embedding model"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_sound_files_that_write_no_text(tmp_path: Path, case: str) -> None:
    metadata, words = UNSUPPORTED[case]
    path = write_tiny_model(tmp_path / "m.gguf", metadata=metadata)
    assert words in refused(path, UnsupportedModelError)


@pytest.mark.parametrize("architecture", ["clip", "bert", "t5encoder"])
def test_architectures_that_write_no_text(tmp_path: Path, architecture: str) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", metadata={"general.architecture": architecture})
    assert "not a model that writes text" in refused(path, UnsupportedModelError)


@pytest.mark.parametrize(
    ("architecture", "reason"), [("t5", "encoder"), *[(name, "diffusion") for name in ("dream", "llada-moe", "rnd1")]]
)
def test_models_that_write_in_another_way_are_refused_with_the_reason(
    tmp_path: Path, architecture: str, reason: str
) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", metadata={"general.architecture": architecture})
    message = refused(path, UnsupportedModelError)
    assert reason in message
    assert "token by token" in message
    assert "not a model that writes text" not in message


@pytest.mark.parametrize("name", [None, "two\nlines", "a b", "(unknown)", "a" * 65])
def test_an_architecture_has_a_plain_name(tmp_path: Path, name: str | None) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", metadata={"general.architecture": name})
    assert "general.architecture" in refused(path)


def test_a_file_without_weights(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf")
    header = read_header(path)
    data = bytearray(path.read_bytes())
    first = header.tensors[0].name.encode()
    data[8:16] = bytes(8)
    path.write_bytes(data[: data.index(first) - 8])
    assert "no weights" in refused(path, UnsupportedModelError)
    found = {check.name: check.status for check in Verification(path).structure()}
    assert (found["tensor types"], found["embeddings"]) == ("failed", "failed")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("blk.0.ffn_up.weight", np.zeros((128, 64), np.int32)),
        ("blk.0.ffn_up.weight", np.zeros((128, 64), np.float64)),
        ("blk.0.attn_norm.weight", np.zeros(64, np.float16)),
        ("output_norm.weight", np.zeros(64, np.float16)),
    ],
)
def test_types_llama_cpp_cannot_compute_with(tmp_path: Path, name: str, values: Any) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", tensors={name: values})
    assert name in refused(path, UnsupportedModelError)


def test_a_vocabulary_without_some_bytes(tmp_path: Path) -> None:
    tokens = sentence_piece_vocabulary(320).tokens
    tokens[tokens.index(b"<0xF0>")] = b"<0xG0>"
    path = write_tiny_model(tmp_path / "m.gguf", tokenizer="llama", metadata={"tokenizer.ggml.tokens": tokens})
    assert "no token for 1 of the 256 bytes" in refused(path, UnsupportedModelError)


def write_parts(directory: Path, *, second: dict[str, Any] | None = None) -> Path:
    """A model in two parts; returns the first."""
    first = directory / "m-00001-of-00002.gguf"
    parts = {"split.count": np.uint16(2), "split.tensors.count": np.int32(21)}
    write_tiny_model(first, metadata={**parts, "split.no": np.uint16(0)})
    number = {"split.no": np.uint16(1)} if second is None else second
    write_tiny_model(directory / "m-00002-of-00002.gguf", metadata={**parts, **number})
    return first


def test_all_parts_of_a_split_model_are_checked(tmp_path: Path) -> None:
    first = write_parts(tmp_path)
    second = tmp_path / "m-00002-of-00002.gguf"
    files = check_file(first)
    assert split_paths(files[0]) == (first, second)
    assert files == (read_header(first), read_header(second))
    assert checked_model(first).weight_bytes == files[0].weight_bytes + files[1].weight_bytes
    with pytest.raises(ModelFileError) as caught:
        check_file(second)
    assert caught.value.hint == "give the first part: m-00001-of-00002.gguf"
    os.truncate(second, second.stat().st_size - 10)
    assert "truncated" in refused(first)
    second.unlink()
    assert "00002-of-00002.gguf is missing" in refused(first)


@pytest.mark.parametrize("number", [{}, {"split.no": np.uint16(0)}, {"split.no": 1}])
def test_a_part_of_another_model(tmp_path: Path, number: dict[str, Any]) -> None:
    assert "does not belong" in refused(write_parts(tmp_path, second=number))


def test_a_first_part_under_another_name(tmp_path: Path) -> None:
    renamed = write_parts(tmp_path).rename(tmp_path / "m.gguf")
    assert "its name does not say so" in refused(renamed)
    path = write_tiny_model(tmp_path / "n.gguf", metadata={"split.count": "2"})
    assert "of '2' parts" in refused(path)


WORDS = st.sampled_from([0, 1, 3, 255, 2**16, 2**31, 2**32 - 1]).map(lambda number: struct.pack("<I", number))


@settings(max_examples=200, deadline=1000)
@given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), WORDS), min_size=1, max_size=3))
def test_a_changed_file_passes_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[float, bytes]]
) -> None:
    path = tmp_path_factory.getbasetemp() / "original.gguf"
    if not path.is_file():
        write_tiny_model(path, vocabulary_size=260, layers=1)
    data, size = bytearray(path.read_bytes()), read_header(path).data_offset
    for place, word in edits:
        start = int(place * size)
        data[start : start + 4] = word
    changed = path.with_name("edited.gguf")
    changed.write_bytes(data)
    with contextlib.suppress(ModelFileError, UnsupportedModelError):
        check_file(changed)
