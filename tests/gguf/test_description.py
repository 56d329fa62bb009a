"""What an inspection says of models with known shapes, and that damaged headers lead to errors of ours at most."""

from __future__ import annotations

import contextlib
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.config import ContextConfig
from abcli.engine.memory import Room, predict
from abcli.errors import AbcliError, ModelFileError
from abcli.gguf import architectures, weights
from abcli.gguf.architectures import ROTATIONS, window_layers, window_tokens
from abcli.gguf.check import ENCODERS, FOREIGN_ARCHITECTURES, OTHER_WRITERS, check_file
from abcli.gguf.cursor import ArrayValue
from abcli.gguf.description import inspect
from abcli.gguf.header import TENSOR_TYPES, Header
from abcli.gguf.verification import Verification, file_sha256
from abcli.gguf.weights import scan_weights
from scripts.fuzz_headers import mutate, seed_of
from tests.support.models import buckets_at, checked_model
from tests.support.tiny_gguf import write_tiny_mamba, write_tiny_model


def test_everything_in_a_header_is_told(tmp_path: Path) -> None:
    path = write_tiny_model(
        tmp_path / "m.gguf",
        layers=3,
        heads=4,
        kv_heads=2,
        embedding=64,
        rope_base=5e5,
        rope_factors=[2.0] * 8,
        dtype="q8_0",
        metadata={
            "general.name": "A model",
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 1024,
            "tokenizer.chat_template": "{% if tools %}{{ tools }}{% endif %}<think>",
        },
    )
    found = inspect(check_file(path))
    assert (found.architecture, found.name, found.layers) == ("llama", "A model", 3)
    assert (found.heads, found.kv_heads, found.key_length) == ((4,) * 3, (2,) * 3, 16)
    assert (found.rope.rotation, found.rope.base, found.rope.factors) == ("pairs", 5e5, ("rope_freqs.weight",))
    assert (found.rope.scaling, found.rope.factor, found.rope.original_context) == ("yarn", 4.0, 1024)
    assert found.tokenizer.tokens == 320
    assert {token.role: token.text for token in found.tokenizer.special}["bos"] == "<|endoftext|>"
    assert found.template is not None
    assert (found.template.tools, found.template.thinking) == (True, True)
    assert found.window is None
    kinds = {kind.name: kind for kind in found.tensor_kinds}
    assert kinds["attn_q.weight"].types == {"q8_0": 3}
    assert kinds["output_norm.weight"].types == {"f32": 1}
    assert sum(kind.size_bytes for kind in kinds.values()) == sum(share.size_bytes for share in found.types)
    reference = gguf.GGUFReader(path)
    assert found.parameters == sum(int(tensor.n_elements) for tensor in reference.tensors)
    for share in found.types:
        same = [tensor for tensor in reference.tensors if tensor.tensor_type.name.lower() == share.type_name]
        assert (share.tensors, share.size_bytes) == (len(same), sum(int(tensor.n_bytes) for tensor in same))
    assert math.isclose(sum(share.share for share in found.types), 1.0)
    sizes = sum(share.size_bytes for share in found.types)
    assert found.bits_per_weight == pytest.approx(8 * sizes / found.parameters)


def test_a_template_without_tools_and_no_template(tmp_path: Path) -> None:
    plain = inspect(check_file(write_tiny_model(tmp_path / "a.gguf"))).template
    assert plain is not None
    assert (plain.tools, plain.thinking) == (False, False)
    assert inspect(check_file(write_tiny_model(tmp_path / "b.gguf", chat_template=None))).template is None


@pytest.mark.parametrize(
    ("architecture", "rotation"),
    [("llama", "pairs"), ("qwen2", "halves"), ("qwen2vl", "sections"), ("gpt2", "none"), ("gemma3", "halves")],
)
def test_rotations_are_llama_cpps(tmp_path: Path, architecture: Any, rotation: str) -> None:
    assert (
        inspect(check_file(write_tiny_model(tmp_path / "m.gguf", architecture=architecture))).rope.rotation == rotation
    )


def test_no_architecture_has_two_rotations() -> None:
    names = [name for _, listed in architectures._KINDS for name in listed.split()]
    assert len(names) == len(set(names)) == len(ROTATIONS)


def test_windows_come_from_the_file_or_the_architecture(tmp_path: Path) -> None:
    known = check_file(write_tiny_model(tmp_path / "a.gguf", architecture="gemma3", layers=7))
    assert window_layers(known[0]) == (True,) * 5 + (False, True)
    found = inspect(known)
    assert found.window is not None
    assert (found.window.tokens, found.window.layers) == (64, (0, 1, 2, 3, 4, 6))
    assert (found.rope.base, found.rope.window_base) == (10000.0, 10000.0)
    key = "gemma3.attention.sliding_window_pattern"
    (period,) = check_file(write_tiny_model(tmp_path / "b.gguf", architecture="gemma3", layers=4, metadata={key: 2}))
    assert window_layers(period) == (True, False, True, False)
    listed = write_tiny_model(tmp_path / "c.gguf", architecture="gemma3", layers=3, metadata={key: [False, True, True]})
    assert window_layers(check_file(listed)[0]) == (False, True, True)
    # llama.cpp does not ask a file of this architecture for a window.
    without = write_tiny_model(tmp_path / "d.gguf", metadata={"llama.attention.sliding_window": 64})
    assert window_layers(check_file(without)[0]) == (False,) * 2


def header_of(architecture: str, layers: int, window: int | None, **values: Any) -> Header:
    """A header of an architecture, with and without the key of a window."""
    keys = {"block_count": layers, "attention.head_count": 4, **values}
    if window is not None:
        keys["attention.sliding_window"] = window
    metadata = {"general.architecture": architecture, **{f"{architecture}.{key}": keys[key] for key in keys}}
    return Header(Path("m.gguf"), 0, 3, metadata, {}, (), 32, 0)


ARRAY = ArrayValue("i32", 3, np.array([1, 0, 1], np.int32).tobytes())
FULL_LAST, FULL_FIRST = "1110111011", "0111011101"
# What load_arch_hparams in llama.cpp's src/models/*.cpp makes of 10 layers: the window, and the layers that have it.
WINDOWS = {
    "afmoe": (64, 64, FULL_LAST),
    "cohere2": (64, 64, FULL_LAST),
    "cohere2moe": (64, 64, FULL_FIRST),
    "deepseek4": (64, 64, "1" * 10),
    "exaone-moe": (64, 64, FULL_LAST),
    "exaone4": (64, 0, "0" * 10),
    "gemma2": (None, 4096, "10" * 5),
    "gemma3": (64, 64, "1111101111"),
    "gemma3n": (64, 64, "1111011110"),
    "gemma4": (64, 64, None),
    "gpt-oss": (64, 64, "10" * 5),
    "laguna": (64, 64, FULL_FIRST),
    "lfm2": (64, 64, "1" * 10),
    "lfm2moe": (64, 0, "0" * 10),
    "llama": (64, 0, "0" * 10),
    "llama4": (None, 8192, FULL_LAST),
    "mellum": (64, 64, FULL_LAST),
    "muse-glimmer": (64, 64, FULL_LAST),
    "olmo2": (64, 64, FULL_LAST),
    "phi3": (64, 0, "0" * 10),
    "plamo3": (64, 64, "1111111011"),
    "smallthinker": (64, 4096, FULL_FIRST),
    "nobody-knows": (64, 64, None),
}


@pytest.mark.parametrize("architecture", WINDOWS)
def test_windows_are_those_of_llama_cpps_loaders(architecture: str) -> None:
    said, tokens, layers = WINDOWS[architecture]
    header = header_of(architecture, 10, said)
    assert window_tokens(header) == tokens
    found = window_layers(header)
    assert (found if found is None else "".join(str(int(windowed)) for windowed in found)) == layers
    if architecture not in ("lfm2", "deepseek4"):
        # What the file says of its layers wins, where a window is read at all.
        pattern = header_of(architecture, 3, said, **{"attention.sliding_window_pattern": ARRAY})
        assert window_layers(pattern) == ((True, False, True) if tokens else (False,) * 3)
    assert not any(window_layers(header_of(architecture, 10, 0)) or ())


def test_windows_that_depend_on_more_than_the_architecture() -> None:
    exaone = window_layers(header_of("exaone4", 64, None))
    assert exaone == (True, True, True, False) * 16
    assert window_tokens(header_of("exaone4", 64, None)) == 4096
    assert window_tokens(header_of("llama4", 8, 64)) == 8192
    assert window_tokens(header_of("smallthinker", 8, None)) == 0
    # A layer without keys is recurrent.
    lfm2 = header_of(
        "lfm2", 3, 64, **{"attention.head_count_kv": replace(ARRAY, data=np.array([0, 2, 0], np.int32).tobytes())}
    )
    assert window_layers(lfm2) == (False, True, False)
    # The last layer predicts the token after the next.
    assert window_layers(header_of("exaone-moe", 3, 64, nextn_predict_layers=1)) == (True, True, False)


# llama.cpp's classes of models that are called otherwise than the architecture in the file.
CLASSES = {
    "deepseek2-ocr": "deepseek2ocr",
    "glm4moe": "glm4_moe",
    "gpt-oss": "openai_moe",
    "granitehybrid": "granite_hybrid",
    "granitemoe": "granite_moe",
    "graniteswitch": "granite_switch",
    "pangu-embedded": "pangu_embed",
}
# They share the class of another architecture, or are no models of llama.cpp's at all.
WITHOUT_CLASS = {"gptj", "controlvector", "imatrix"}


NO_MODELS = {"base", "params", "quantize_params"}


def test_every_architecture_of_llama_cpp_is_known_here() -> None:
    """A new one has to be looked up in src/models/*.cpp: its rotation, its windows, or why it is none of ours."""
    libraries = [
        path for path in Path(llama_cpp.__file__).parent.rglob("libllama.*") if path.suffix in (".so", ".dylib")
    ]
    if not libraries:
        pytest.skip("other compilers spell the names of types in another way")
    # The names of types in the library, as the compiler spells them: their length, then the name.
    found = re.findall(rb"(\d+)(llama_model_(\w+))\0", libraries[0].read_bytes())
    classes = {name.decode() for length, whole, name in found if int(length) == len(whole)} - NO_MODELS
    assert len(classes) > 100
    ours = {*ROTATIONS, *ENCODERS, *FOREIGN_ARCHITECTURES, *OTHER_WRITERS} - WITHOUT_CLASS
    assert {CLASSES.get(name, name.replace("-", "_").replace(".", "_")) for name in ours} == classes
    assert set(architectures._WINDOWS) <= set(ROTATIONS)


@pytest.mark.parametrize("dtype", ["f32", "f16", "q8_0"])
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_found(tmp_path: Path, dtype: Any, number: float) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", dtype=dtype)
    (header,) = check_file(path)
    assert scan_weights(header).bad == ()
    tensor = next(tensor for tensor in header.tensors if tensor.name == "blk.1.ffn_up.weight")
    data = bytearray(path.read_bytes())
    kind, step = (np.float32, 4) if dtype == "f32" else (np.float16, 34 if dtype == "q8_0" else 2)
    for place in (0, 3):
        at = header.data_offset + tensor.offset + place * step
        data[at : at + np.dtype(kind).itemsize] = kind(number).tobytes()
    path.write_bytes(data)
    scan = scan_weights(header)
    assert scan.bad == (("blk.1.ffn_up.weight", 2),)
    assert scan.scanned == header.weight_bytes


@pytest.mark.parametrize(
    "kind",
    [kind for kind in gguf.quants._type_traits if kind.name.lower() in {name.lower() for name in weights._HALF_SCALES}],
    ids=lambda kind: kind.name,
)
def test_scales_lie_where_the_reference_reads_them(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """One f16 of a block at a time is made infinite; where the reference then gives no finite numbers, so must we."""
    name, elements, size = TENSOR_TYPES[int(kind)]
    assert weights._count(bytes(size), name, size) == 0
    for place in range(0, size - 1, 2):
        block = bytearray(b"\x11" * size)
        for scale in range(0, size - 1, 2):
            if weights._count(bytes(block[:scale]) + b"\x00\x7c" + bytes(block[scale + 2 :]), name, size):
                block[scale : scale + 2] = b"\x00\x3c"
        block[place : place + 2] = b"\x00\x7c"
        with np.errstate(all="ignore"):
            numbers = gguf.quants.dequantize(np.frombuffer(bytes(block), np.uint8).reshape(1, -1), kind)
        assert numbers.size == elements
        assert bool(weights._count(bytes(block), name, size)) == (not np.isfinite(numbers).all())


def outcomes(path: Path) -> dict[str, str]:
    """The status of each check."""
    return {check.name: check.status for check in Verification(path).structure()}


def test_a_sound_file_passes_every_check(tmp_path: Path) -> None:
    assert set(outcomes(write_tiny_model(tmp_path / "m.gguf")).values()) == {"ok"}
    assert set(outcomes(write_tiny_mamba(tmp_path / "n.gguf")).values()) == {"ok"}


def test_a_failed_check_is_named_and_others_go_on(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", metadata={"llama.attention.head_count": 3})
    found = outcomes(path)
    assert found["hyperparameters"] == "failed"
    assert found["tokenizer"] == "ok"
    path.write_bytes(b"GGUF")
    found = outcomes(path)
    assert (found["file"], found["header"], found["tokenizer"]) == ("ok", "failed", "skipped")


def test_embeddings_must_have_a_row_for_each_token(tmp_path: Path) -> None:
    rows = np.zeros((300, 64), np.float32)
    path = write_tiny_model(tmp_path / "m.gguf", tensors={"token_embd.weight": rows})
    with pytest.raises(ModelFileError, match="320 tokens of 64 numbers, but embeddings of 64 x 300"):
        check_file(path)
    assert outcomes(path)["embeddings"] == "failed"


def test_a_token_outside_the_vocabulary_is_told(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", metadata={"tokenizer.ggml.padding_token_id": 999})
    details = {check.name: check.detail for check in Verification(path).structure()}
    assert "padding 999" in details["tokenizer"]


def test_the_checksum_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="cannot read"):
        file_sha256(tmp_path / "missing.gguf")


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_mutated_headers_lead_to_errors_of_ours_at_most(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """The short form of scripts/fuzz_headers.py."""
    folder = tmp_path_factory.getbasetemp() / "mutations"
    folder.mkdir(exist_ok=True)
    sources = []
    for name in ("llama", "gemma3"):
        path = folder / f"{name}.gguf"
        if not path.exists():
            write_tiny_model(path, architecture=name, embedding=32, heads=2, kv_heads=1, feed_forward=32)  # type: ignore[arg-type]
        sources.append(seed_of(path))
    source = random.Random(seed)
    _, data = mutate(source, source.choice(sources), source.choice(sources).data)
    path = folder / "mutated.gguf"
    path.write_bytes(data)
    list(Verification(path).structure())
    with contextlib.suppress(AbcliError):
        checked = checked_model(path, 0)
        inspect(checked.files)
        predict(checked, ContextConfig(), buckets_at(1e4, 2e4)).advice(Room(2**20))
        scan_weights(checked.header)
