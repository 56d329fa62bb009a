"""The GGUF header reader: against the reference reader, and against headers made to hurt."""

from __future__ import annotations

import contextlib
import os
import struct
import time
import tracemalloc
from pathlib import Path

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.errors import AbcliError, ModelFileError
from abcli.gguf.header import TENSOR_TYPES, ArrayValue, Header, read_header, row_bytes
from tests.support.tiny_gguf import write_tiny_mamba, write_tiny_model


def assert_equals_reference(path: Path) -> Header:
    """Compare everything with the reader of the gguf package."""
    header = read_header(path)
    reference = gguf.GGUFReader(path)
    fields = {name: field for name, field in reference.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata.keys() == fields.keys()
    for name, field in fields.items():
        value = header.metadata[name]
        if isinstance(value, ArrayValue):
            assert value.count == len(field.data)
            parts = [bytes(field.parts[index]) for index in field.data]
            if value.element_type == "string":
                assert list(value.strings()) == parts
            else:
                assert value.numbers().tobytes() == b"".join(parts)
        else:
            assert value == field.contents()
    assert header.data_offset == reference.data_offset
    assert header.alignment == reference.alignment
    assert [tensor.name for tensor in header.tensors] == [tensor.name for tensor in reference.tensors]
    for ours, theirs in zip(header.tensors, reference.tensors, strict=True):
        assert ours.shape == tuple(theirs.shape)
        assert ours.type_id == theirs.tensor_type
        assert ours.size_bytes == theirs.n_bytes
        assert header.data_offset + ours.offset == theirs.data_offset
    return header


def test_the_real_model_equals_the_reference(real_model: Path) -> None:
    header = assert_equals_reference(real_model)
    assert header.architecture == "llama"
    assert header.native_base == 100_000.0
    assert header.trained_context == 8192
    assert (header.layers, header.embedding_length) == (30, 576)
    assert header.heads == (9,) * 30
    assert header.kv_heads == (3,) * 30
    assert (header.key_length, header.value_length) == (64, 64)
    assert header.vocabulary_size == 49152
    assert header.chat_template is not None
    assert header.weight_bytes <= header.file_size - header.data_offset


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("tokenizer", ["gpt2", "llama", False])
def test_tiny_models_equal_the_reference(tmp_path: Path, dtype: str, tokenizer: str | bool) -> None:
    assert_equals_reference(write_tiny_model(tmp_path / "m.gguf", dtype=dtype, tokenizer=tokenizer))


def test_the_tensor_types_are_those_of_gguf() -> None:
    for type_id, (name, elements, size) in TENSOR_TYPES.items():
        if type_id in {kind.value for kind in gguf.GGMLQuantizationType}:
            kind = gguf.GGMLQuantizationType(type_id)
            assert kind.name.lower() == name.lower()
            # ggml's block_q8_1 has two half floats and 32 bytes; the package counts 4 bytes more.
            if name != "q8_1":
                assert gguf.GGML_QUANT_SIZES[kind] == (elements, size)


def test_a_missing_base_is_llama_cpps_default(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", metadata={"llama.rope.freq_base": None})
    assert read_header(path).native_base == 10000.0


def test_heads_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", metadata={"llama.attention.head_count_kv": [2, 1]})
    header = read_header(path)
    assert header.kv_heads == (2, 1)


def test_keys_have_as_many_heads_as_queries_where_the_file_does_not_say(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", metadata={"llama.attention.head_count_kv": None})
    assert read_header(path).kv_heads == (4, 4)


def test_a_recurrent_model_may_have_a_template(tmp_path: Path) -> None:
    assert read_header(write_tiny_mamba(tmp_path / "m.gguf")).chat_template is not None


def test_a_block_that_is_only_begun_counts_whole() -> None:
    assert row_bytes("q8_0", 33) == 2 * 34
    assert row_bytes("bf16", 33) == 66


def test_arrays_know_what_they_hold() -> None:
    assert ArrayValue("f32", 2, struct.pack("<2f", 1, 2)).numbers().tolist() == [1.0, 2.0]
    with pytest.raises(TypeError):
        ArrayValue("string", 0, b"").numbers()
    with pytest.raises(TypeError):
        list(ArrayValue("f32", 0, b"").strings())


def test_a_vocabulary_as_large_as_any_is_read_in_well_under_a_second(tmp_path: Path) -> None:
    tokens = [b"token %06d" % number for number in range(262_144)]
    path = write_tiny_model(tmp_path / "m.gguf", metadata={"tokenizer.ggml.tokens": tokens})
    begin = time.perf_counter()
    header = read_header(path)
    assert time.perf_counter() - begin < 1.0
    assert header.vocabulary_size == 262_144


def key(name: bytes, value: bytes) -> bytes:
    """A metadata item; `value` is its type and its bytes."""
    return struct.pack("<Q", len(name)) + name + value


def tensor(name: bytes, shape: tuple[int, ...], type_id: int = 0, offset: int = 0) -> bytes:
    """An entry of the list of tensors."""
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return struct.pack("<Q", len(name)) + name + dimensions + struct.pack("<IQ", type_id, offset)


def file_of(keys: list[bytes] | int, tensors: list[bytes] | int, *, version: int = 3, filler: int = 4096) -> bytes:
    """A GGUF file of these items, or only of a claim about their number."""
    counts = [items if isinstance(items, int) else len(items) for items in (tensors, keys)]
    items = b"".join(part for part in (keys, tensors) if isinstance(part, list) for part in part)
    return b"GGUF" + struct.pack("<IQQ", version, *counts) + items + bytes(filler)


U32 = struct.pack("<I", 4)
STRING = struct.pack("<I", 8)
HUGE = 2**40
BAD_HEADERS = {
    "not GGUF": (b"GGML" + bytes(100), "not a GGUF file"),
    "only the magic": (b"GGUF", "ends in the middle"),
    "version 1": (file_of([], [], version=1), "GGUF version 1"),
    "version 4": (file_of([], [], version=4), "GGUF version 4"),
    "version 0": (file_of([], [], version=0), "GGUF version 0"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "a billion keys": (file_of(2**30, []), "1073741824 metadata keys"),
    "a billion tensors": (file_of([], 2**30), "1073741824 tensors"),
    "all bits of a count": (file_of(2**64 - 1, []), "metadata keys"),
    "keys beyond the end": (file_of(1000, [], filler=0), "ends in the middle"),
    "an empty key": (file_of([key(b"", U32 + bytes(4))], []), "name ''"),
    "a key with a zero": (file_of([key(b"a\0b", U32 + bytes(4))], []), "name 'a\\x00b'"),
    "a key twice": (file_of([key(b"a", U32 + bytes(4))] * 2, []), "'a' twice"),
    "a huge key": (file_of([struct.pack("<Q", HUGE)], []), f"has {HUGE} bytes"),
    "a huge string": (file_of([key(b"a", STRING + struct.pack("<Q", HUGE))], []), f"has {HUGE} bytes"),
    "a string beyond the end": (
        file_of([key(b"a", STRING + struct.pack("<Q", 10_000))], []),
        "ends in the middle",
    ),
    "an unknown type": (file_of([key(b"a", struct.pack("<I", 13))], []), "unknown type 13"),
    "an array of arrays": (file_of([key(b"a", struct.pack("<IIQ", 9, 9, 1))], []), "unknown type 9"),
    "a huge array": (file_of([key(b"a", struct.pack("<IIQ", 9, 4, HUGE))], []), f"has {HUGE} items"),
    "an array beyond the end": (
        file_of([key(b"a", struct.pack("<IIQ", 9, 4, 10_000))], []),
        "ends in the middle",
    ),
    "strings beyond the end": (
        file_of([key(b"a", struct.pack("<IIQ", 9, 8, 10_000))], []),
        "ends in the middle",
    ),
    "a huge item": (file_of([key(b"a", struct.pack("<IIQQ", 9, 8, 1, HUGE))], []), f"has {HUGE} bytes"),
    "an alignment of 0": (file_of([key(b"general.alignment", U32 + bytes(4))], []), "alignment of 0"),
    "an alignment of 33": (
        file_of([key(b"general.alignment", U32 + struct.pack("<I", 33))], []),
        "alignment of 33",
    ),
    "an alignment of text": (
        file_of([key(b"general.alignment", STRING + bytes(8))], []),
        "alignment of type string",
    ),
    "a tensor twice": (file_of([], [tensor(b"t", (1,))] * 2), "'t' twice"),
    "a long tensor name": (file_of([], [tensor(b"t" * 64, (1,))]), "has 64 bytes"),
    "no dimensions": (file_of([], [tensor(b"t", ())]), "0 dimensions"),
    "five dimensions": (file_of([], [tensor(b"t", (1,) * 5)]), "5 dimensions"),
    "an empty tensor": (file_of([], [tensor(b"t", (0,))]), "the shape 0"),
    "an absurd shape": (file_of([], [tensor(b"t", (2**63, 2**63))]), "the shape 9223372036854775808 x"),
    "a removed tensor type": (file_of([], [tensor(b"t", (32,), 4)]), "unknown type 4"),
    "an unknown tensor type": (file_of([], [tensor(b"t", (32,), 2**32 - 1)]), "unknown type 4294967295"),
    "half a block": (file_of([], [tensor(b"t", (48,), 8)]), "multiples of 32"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_bad_header_is_refused_without_time_or_memory(tmp_path: Path, case: str) -> None:
    data, words = BAD_HEADERS[case]
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError) as caught:
            read_header(path)
        _now, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert words in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    assert peak < 2 * 2**20


def test_a_huge_claim_in_a_huge_file_costs_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file_of([key(b"a", struct.pack("<IIQ", 9, 12, 16 * 2**20))], []))
    os.truncate(path, 2**34)  # sparse: takes no space
    tracemalloc.start()
    try:
        with pytest.raises(ModelFileError, match="header of more than"):
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < 2 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are a thing of POSIX")
def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.gguf")
    with pytest.raises(ModelFileError, match="not a regular file"):
        read_header(tmp_path / "m.gguf")


def test_paths_that_cannot_be_opened(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", Path("a\0b")):
        with pytest.raises(ModelFileError):
            read_header(path)


@pytest.fixture(scope="module")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[bytes, int]]:
    """Small models and the lengths of their headers."""
    directory = tmp_path_factory.mktemp("corpus")
    small = {"vocabulary_size": 270, "layers": 1, "embedding": 32, "heads": 2}
    paths = [
        write_tiny_model(directory / "a.gguf", **small),
        write_tiny_model(directory / "b.gguf", tokenizer="llama", **small),
        write_tiny_model(directory / "c.gguf", tokenizer=False, architecture="qwen2", dtype="q8_0", **small),
    ]
    return [(path.read_bytes(), read_header(path).data_offset) for path in paths]


EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.one_of(
            st.binary(min_size=1, max_size=8),
            st.sampled_from([0, 1, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]).map(
                lambda number: struct.pack("<Q", number)
            ),
        ),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300, deadline=1000)
@given(which=st.integers(0, 2), edits=EDITS, length=st.one_of(st.none(), st.floats(0, 1)))
def test_a_changed_header_is_read_or_refused(
    small_models: list[tuple[bytes, int]],
    tmp_path_factory: pytest.TempPathFactory,
    which: int,
    edits: list[tuple[float, bytes]],
    length: float | None,
) -> None:
    original, header_bytes = small_models[which]
    data = bytearray(original)
    for place, replacement in edits:
        start = int(place * header_bytes)
        data[start : start + len(replacement)] = replacement
    if length is not None:
        del data[int(length * header_bytes) :]
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with contextlib.suppress(AbcliError):
            header = read_header(path)
            # Whatever was read can be asked for.
            assert isinstance(header.native_base, float)
            assert header.vocabulary_size >= 0
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 16 * 2**20
