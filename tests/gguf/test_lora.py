"""The checks of a LoRA file: what fits is taken, everything else is refused with words that name what is wrong."""

from __future__ import annotations

import contextlib
import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.config import LoraConfig
from abcli.errors import AbcliError, ModelFileError, UnsupportedModelError
from abcli.gguf.check import check_file
from abcli.gguf.description import inspect_adapter
from abcli.gguf.fingerprint import fingerprint
from abcli.gguf.header import read_header
from tests.support.lora import Matrices, is_projection, random_lora, write_lora
from tests.support.models import checked_model
from tests.support.tiny_gguf import write_tiny_experts, write_tiny_model

TARGET = "blk.0.attn_q.weight"
A, B = TARGET + ".lora_a", TARGET + ".lora_b"


def ones(*shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.ones(shape, np.float32)


def test_what_fits_is_described(tmp_path: Path, tiny_model: Path) -> None:
    names = {"general.base_model.0.name": "Tiny", "adapter.lora.task_name": "rhymes", "general.name": "Rhymes"}
    norm = {"output_norm.weight": ones(64)}
    path = write_lora(
        tmp_path / "a.gguf", random_lora(tiny_model, rank=8), alpha=4.0, metadata=names, tensors=norm, dtype="f16"
    )
    model = checked_model(tiny_model, lora=[LoraConfig(path, -0.5)])
    (adapter,) = model.adapters
    assert (adapter.label, model.name) == ("a.gguf:-0.5", "tiny.gguf + a.gguf:-0.5")
    assert adapter.ignored == ("output_norm.weight",)
    assert adapter.weight_bytes == sum(t.size_bytes for t in adapter.header.tensors if "lora" in t.name)
    found = inspect_adapter(adapter)
    assert (found.name, found.base_model, found.task, found.left_out) == ("Rhymes", "Tiny", "rhymes", 1)
    assert (found.ranks, found.factors, found.scale) == ((8,), (-0.25,), -0.5)
    assert dict(found.changes) == dict.fromkeys(
        ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), 2
    )
    assert [share.type_name for share in found.types] == ["f16"]


def test_without_adapters_nothing_is_different(tmp_path: Path, tiny_model: Path) -> None:
    plain = checked_model(tiny_model)
    assert (plain.files, plain.adapters) == (check_file(tiny_model), ())
    path = write_lora(tmp_path / "a.gguf", random_lora(tiny_model))
    none = checked_model(tiny_model, lora=[LoraConfig(path, 0.0)])
    assert (none.files, none.adapters) == (plain.files, ())
    assert none.name == plain.name == tiny_model.name


def test_a_split_model_is_taken_as_a_whole(tmp_path: Path) -> None:
    whole = write_tiny_model(tmp_path / "whole.gguf")
    lora = write_lora(tmp_path / "a.gguf", random_lora(whole))
    parts = {name: None for name in (t.name for t in read_header(whole).tensors) if name.startswith("blk.1.")}
    split = {"split.count": np.uint16(2), "split.no": np.uint16(0)}
    first = write_tiny_model(tmp_path / "m-00001-of-00002.gguf", metadata=split, tensors=parts)
    others = {t.name: None for t in read_header(whole).tensors if not t.name.startswith("blk.1.")}
    write_tiny_model(tmp_path / "m-00002-of-00002.gguf", metadata={**split, "split.no": np.uint16(1)}, tensors=others)
    assert len(checked_model(first, lora=[LoraConfig(lora)]).adapters) == 1


def test_experts_and_embeddings_can_be_changed(tmp_path: Path) -> None:
    model = write_tiny_experts(tmp_path / "m.gguf", experts=4)
    changed = (
        "blk.0.ffn_down_exps.weight",
        "blk.1.ffn_up_exps.weight",
        "blk.0.ffn_gate_inp.weight",
        "token_embd.weight",
    )
    lora = random_lora(model, rank=3, wanted=lambda name: name in changed)
    (adapter,) = checked_model(model, lora=[LoraConfig(write_lora(tmp_path / "a.gguf", lora))]).adapters
    assert (adapter.ranks, len(adapter.pairs)) == ((3,), 4)
    # llama.cpp reads beyond matrices of too few experts.
    lora["blk.0.ffn_down_exps.weight"] = Matrices(ones(2, 3, 128), ones(2, 64, 3))
    assert "128 x 64 x 4" in refused(write_lora(tmp_path / "b.gguf", lora), model, UnsupportedModelError)


def refused(path: Path, model: Path, kind: type[AbcliError] = ModelFileError) -> str:
    """The message with which `path` is refused; it and its hint are one line each."""
    with pytest.raises(kind) as caught:
        checked_model(model, lora=[LoraConfig(path)])
    assert caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint
    return caught.value.message


@dataclass(frozen=True)
class Bad:
    """What is changed in a sound adapter, and words of the message."""

    words: str
    metadata: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Any] = field(default_factory=dict)
    kind: type[AbcliError] = ModelFileError


BAD: dict[str, Bad] = {
    "no type": Bad("no LoRA adapter (architecture llama)", {"general.type": None}, kind=UnsupportedModelError),
    "a model": Bad("no LoRA adapter", {"general.type": "model"}, kind=UnsupportedModelError),
    "a type that is a number": Bad("general.type is u32, not text", {"general.type": 1}),
    "no kind of adapter": Bad("of the type None", {"adapter.type": None}, kind=UnsupportedModelError),
    "another kind": Bad("of the type 'ia3'", {"adapter.type": "ia3"}, kind=UnsupportedModelError),
    "a kind that is a number": Bad("adapter.type is f32, not text", {"adapter.type": 1.0}),
    "no architecture": Bad("which architecture", {"general.architecture": None}),
    "another architecture": Bad(
        "is a LoRA adapter for qwen2, but tiny.gguf is llama",
        {"general.architecture": "qwen2"},
        kind=UnsupportedModelError,
    ),
    "an escape sequence": Bad("which architecture", {"general.architecture": "\x1b[31mllama"}),
    "alpha as a whole number": Bad("adapter.lora.alpha is u32, not f32", {"adapter.lora.alpha": 16}),
    "alpha as text": Bad("adapter.lora.alpha is string, not f32", {"adapter.lora.alpha": "16"}),
    "alpha as f64": Bad("adapter.lora.alpha is f64, not f32", {"adapter.lora.alpha": np.float64(16)}),
    "alpha is no number": Bad("adapter.lora.alpha is nan", {"adapter.lora.alpha": float("nan")}),
    "infinite alpha": Bad("adapter.lora.alpha is -inf", {"adapter.lora.alpha": float("-inf")}),
    "an activated LoRA": Bad(
        "an activated LoRA (aLoRA)", {"adapter.alora.invocation_tokens": [1, 2, 3]}, kind=UnsupportedModelError
    ),
    "a damaged activated LoRA": Bad(
        "an activated LoRA (aLoRA)", {"adapter.alora.invocation_tokens": 7}, kind=UnsupportedModelError
    ),
    "several files": Bad("one of several files", {"split.count": np.uint16(2)}, kind=UnsupportedModelError),
    "no B": Bad(f"lacks the tensor {B!r}", tensors={B: None}),
    "no A": Bad(f"lacks the tensor {A!r}", tensors={A: None}),
    "another tensor": Bad("no part of a LoRA", tensors={TARGET: ones(64, 64)}),
    "a bias": Bad("no part of a LoRA", tensors={"blk.0.attn_q.bias": ones(64)}),
    "a name of nothing": Bad("impossible name '.lora_a'", tensors={".lora_a": ones(4, 64)}),
    "a suffix within": Bad("impossible name", tensors={"x.lora_b.y.lora_a": ones(4, 64)}),
    "whole numbers": Bad("has the type i8", tensors={A: np.ones((4, 64), np.int8)}, kind=UnsupportedModelError),
    "double precision": Bad("has the type f64", tensors={B: np.ones((64, 4))}, kind=UnsupportedModelError),
    "two ranks": Bad("the ranks 4 and 5", tensors={B: ones(64, 5)}),
    "A not transposed": Bad("the ranks 64 and 4", tensors={A: ones(64, 4)}),
    "A as a vector": Bad("the ranks 1 and 4", tensors={A: ones(64)}),
    "too narrow an A": Bad(
        f"changes the tensor {TARGET!r}, but that is 64 x 64, and the adapter's A 32 x 4 and B 4 x 64",
        tensors={A: ones(4, 32)},
        kind=UnsupportedModelError,
    ),
    "too wide a B": Bad("A 64 x 4 and B 4 x 96", tensors={B: ones(96, 4)}, kind=UnsupportedModelError),
    "a third dimension": Bad("B 4 x 64 x 2", tensors={B: ones(2, 64, 4)}, kind=UnsupportedModelError),
    "a layer too many": Bad(
        "does not fit tiny.gguf: it changes the tensor 'blk.2.attn_q.weight', but the model does not have it",
        tensors={"blk.2.attn_q.weight.lora_a": ones(4, 64), "blk.2.attn_q.weight.lora_b": ones(64, 4)},
        kind=UnsupportedModelError,
    ),
    "a vector of the model": Bad(
        "that is a vector",
        tensors={"blk.0.attn_norm.weight.lora_a": ones(4, 64), "blk.0.attn_norm.weight.lora_b": ones(1, 4)},
        kind=UnsupportedModelError,
    ),
    "embeddings the other way round": Bad(
        "token_embd.weight",
        tensors={"token_embd.weight.lora_a": ones(4, 64), "token_embd.weight.lora_b": ones(320, 4)},
    ),
    "embeddings of two ranks": Bad(
        "the ranks 4 and 3",
        tensors={"token_embd.weight.lora_a": ones(320, 4), "token_embd.weight.lora_b": ones(64, 3)},
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_adapters_are_refused(tmp_path: Path, tiny_model: Path, what: str) -> None:
    bad = BAD[what]
    lora = random_lora(tiny_model, wanted=lambda name: name == TARGET)
    path = write_lora(tmp_path / "a.gguf", lora, metadata=bad.metadata, tensors=bad.tensors)
    assert bad.words in refused(path, tiny_model, bad.kind)


def test_the_hint_names_the_model_it_was_made_for(tmp_path: Path, tiny_model: Path) -> None:
    other = write_tiny_model(tmp_path / "other.gguf", embedding=128)
    made_for = {"general.base_model.0.name": "Other\x1b[31m"}
    path = write_lora(tmp_path / "a.gguf", random_lora(other), metadata=made_for)
    with pytest.raises(UnsupportedModelError) as caught:
        checked_model(tiny_model, lora=[LoraConfig(path)])
    assert "'Other\\x1b[31m'" in caught.value.hint


def test_one_matrix_for_embeddings_and_output(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", tensors={"output.weight": None})
    lora = random_lora(model, wanted=lambda name: name == "token_embd.weight")
    message = refused(write_lora(tmp_path / "a.gguf", lora), model, UnsupportedModelError)
    assert "no other output matrix" in message


def test_no_tensors_at_all(tmp_path: Path, tiny_model: Path) -> None:
    assert "no weights, only metadata" in refused(write_lora(tmp_path / "a.gguf", {}), tiny_model)


def test_other_kinds_of_files(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(struct.pack("<Q", 100) + b'{"__metadata__":{}}')
    with pytest.raises(ModelFileError, match="is a safetensors file") as caught:
        checked_model(tiny_model, lora=[LoraConfig(path)])
    assert "convert_lora_to_gguf.py" in caught.value.hint
    assert "is a directory" in refused(tmp_path, tiny_model)
    assert "there is no file" in refused(tmp_path / "missing.gguf", tiny_model)
    assert "no LoRA adapter (architecture llama)" in refused(tiny_model, tiny_model, UnsupportedModelError)
    adapter = write_lora(tmp_path / "a.gguf", random_lora(tiny_model))
    with pytest.raises(UnsupportedModelError, match="is a LoRA adapter, not a model") as caught_model:
        checked_model(adapter)
    assert "`lora`" in caught_model.value.hint


def test_truncated_and_shifted_files(tmp_path: Path, tiny_model: Path) -> None:
    path = write_lora(tmp_path / "a.gguf", random_lora(tiny_model))
    data, second = path.read_bytes(), read_header(path).tensors[1]
    entry = data.index(second.name.encode()) + len(second.name) + 4 + 8 * len(second.shape) + 4
    path.write_bytes(data[:entry] + struct.pack("<Q", 2**40) + data[entry + 8 :])
    assert "leaves a gap" in refused(path, tiny_model)
    path.write_bytes(data)
    os.truncate(path, len(data) - 100)
    assert "truncated" in refused(path, tiny_model)
    os.truncate(path, 200)
    assert "ends in the middle of its header" in refused(path, tiny_model)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_mutated_adapter_is_taken_or_refused(
    data: st.DataObject, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    write_lora(path, random_lora(tiny_model, wanted=lambda name: name == TARGET))
    content = bytearray(path.read_bytes())
    size = read_header(path).data_offset
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, size - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with contextlib.suppress(AbcliError):
        checked_model(tiny_model, lora=[LoraConfig(path)])


def test_the_fingerprint_tells_sets_and_scales_apart(tmp_path: Path, tiny_model: Path) -> None:
    def lora(name: str, **changes: Any) -> Path:
        return write_lora(tmp_path / name, random_lora(tiny_model, wanted=is_projection, **changes))

    first, second = lora("a.gguf"), lora("b.gguf", seed=1)
    same = tmp_path / "copy.gguf"
    same.write_bytes(first.read_bytes())

    def key(*loras: tuple[Path, float]) -> str:
        return checked_model(tiny_model, lora=[LoraConfig(path, scale) for path, scale in loras]).fingerprint

    different = [
        key(),
        key((first, 1.0)),
        key((first, 0.5)),
        key((first, -1.0)),
        key((second, 1.0)),
        key((first, 1.0), (second, 1.0)),
        key((first, 0.5), (second, 1.0)),
        key((first, 1.0), (second, 0.5)),
    ]
    assert len(set(different)) == len(different)
    assert all(len(one) == 64 for one in different)
    assert key() == fingerprint(check_file(tiny_model))
    assert key((first, 0.0)) == key()
    assert key((second, 1.0), (first, 0.0)) == key((second, 1.0))
    assert key((second, 1.0), (first, 1.0)) == key((first, 1.0), (second, 1.0))
    assert key((same, 1.0)) == key((first, 1.0))


def test_the_fingerprint_sees_every_matrix(tmp_path: Path, tiny_model: Path) -> None:
    path = write_lora(tmp_path / "a.gguf", random_lora(tiny_model))
    original = checked_model(tiny_model, lora=[LoraConfig(path)]).fingerprint
    header, data = read_header(path), path.read_bytes()
    for tensor in header.tensors:
        changed = bytearray(data)
        start = header.data_offset + tensor.offset
        changed[start : start + tensor.size_bytes] = bytes(tensor.size_bytes)
        path.write_bytes(changed)
        assert checked_model(tiny_model, lora=[LoraConfig(path)]).fingerprint != original, tensor.name
