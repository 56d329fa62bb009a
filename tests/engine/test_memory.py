"""Predicted memory against llama.cpp's own numbers, and the advice for set-ups that do not fit."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.config import CONTEXT_STEP, Buckets, ContextConfig, LoraConfig, Tuning
from abcli.engine import memory
from abcli.engine.memory import Prediction, Room, available_memory, check_memory, predict
from abcli.errors import OutOfMemoryError
from abcli.gguf.checked import CheckedModel
from abcli.native.llama import Device, echo_log
from abcli.native.model import Model
from abcli.native.rotating.devices import Device as TableDevice
from abcli.text import gibibytes
from tests.support.engines import contexts_engine, fused_engine
from tests.support.lora import is_projection, random_lora, write_lora
from tests.support.models import checked_model, set_up
from tests.support.tiny_gguf import write_tiny_experts, write_tiny_mamba, write_tiny_model

BASES = (10000.0, 15000.0, 20000.0)
Asked: TypeAlias = tuple[CheckedModel, ContextConfig, Buckets]


def asked(
    path: Path, bases: Sequence[float] = BASES, gpu_layers: int = 0, lora: Sequence[LoraConfig] = (), **changes: Any
) -> Asked:
    """A set-up of three buckets on the CPU, which shares nothing, with changes."""
    values = {"context_size": 4096, "prefill": "exact", **changes}
    return checked_model(path, gpu_layers, lora), *set_up(bases, **values)


@pytest.fixture
def log() -> Iterator[list[str]]:
    """What llama.cpp logs during the test."""
    lines: list[str] = []
    echo_log(lines.append)
    yield lines
    echo_log(None)


def sizes(log: list[str], kind: str) -> list[float]:
    """MiB of each buffer of one kind in llama.cpp's log."""
    return [float(size) for size in re.findall(rf"{kind} buffer size = +([\d.]+) MiB", "".join(log))]


def buffers(log: list[str], kind: str) -> float:
    """MiB of all buffers of one kind in llama.cpp's log."""
    return sum(sizes(log, kind))


def measured(setup: Asked, log: list[str]) -> tuple[Prediction, dict[str, float]]:
    """The prediction and llama.cpp's own sizes in MiB of an engine with a context for each bucket."""
    checked, context, buckets = setup
    with Model(checked) as model, contexts_engine(model, context, buckets):
        found = {"caches": buffers(log, "KV") + buffers(log, "RS"), "outputs": buffers(log, "output")}
        found |= {"compute": buffers(log, "compute")}
    return predict(*setup), found


SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"embedding": 128, "heads": 4, "kv_heads": 2, "feed_forward": 384},
    "wide": {"embedding": 256, "heads": 4, "kv_heads": 4, "feed_forward": 1024, "layers": 3},
    "narrow network": {"embedding": 256, "heads": 8, "kv_heads": 1, "feed_forward": 128},
    "qwen2": {"architecture": "qwen2", "embedding": 128, "heads": 2, "kv_heads": 1, "feed_forward": 512},
    "gemma3": {"architecture": "gemma3", "embedding": 128, "heads": 2, "kv_heads": 1, "layers": 7},
    "stablelm": {"architecture": "stablelm", "embedding": 256, "heads": 4, "kv_heads": 4, "layers": 4},
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("slots", [1, 3])
def test_predictions_are_llama_cpps_numbers(tmp_path: Path, log: list[str], name: str, slots: int) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", **SHAPES[name])
    prediction, found = measured(asked(path, BASES[:2], context_size=1000, slots=slots), log)
    assert prediction.contexts == 2
    predicted = {part: prediction.item(part).host / 2**20 for part in found}
    # The log has two digits after the point.
    assert predicted["caches"] == pytest.approx(found["caches"], abs=0.02)
    assert predicted["outputs"] == pytest.approx(found["outputs"], abs=0.02)
    # An upper bound, and where the layers are ordinary ones a close one.
    assert 0.99 * found["compute"] - 0.03 <= predicted["compute"] <= 1.25 * found["compute"]
    assert sum(predicted.values()) == pytest.approx(sum(found.values()), rel=0.1)


def test_one_context_for_all_buckets(tmp_path: Path, log: list[str]) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", **SHAPES["wide"])
    checked, context, buckets = asked(path, context_size=1000, slots=2, engine="fused")
    prediction = predict(checked, context, buckets)
    with Model(checked) as model, fused_engine(model, context, buckets):
        pass
    # The smaller one, which finds out what follows the base, has gone.
    largest = {kind: max(sizes(log, kind)) for kind in ("KV", "compute", "output")}
    for part, kind in (("caches", "KV"), ("compute", "compute"), ("outputs", "output")):
        assert prediction.item(part).host / 2**20 == pytest.approx(largest[kind], rel=0.1, abs=0.02)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The bytes of each buffer that tables take, as they take them."""
    taken: list[int] = []
    own = TableDevice.memory

    def counted(device: TableDevice, size: int, stack: ExitStack | None = None) -> int:
        taken.append(size)
        return own(device, size, stack)

    monkeypatch.setattr(TableDevice, "memory", counted)
    return taken


def test_tables_of_heads_with_bases_of_their_own_are_counted(tmp_path: Path, taken: list[int]) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", layers=3)
    checked, context, buckets = asked(path, BASES[:2], context_size=1000, engine="fused")
    # The last layer has one base, and shares the table of all such layers.
    tuned = checked.with_tuning(Tuning(multipliers=((0.5, 2.0), (1.5, 1.0), (1.0, 1.0))))
    with Model(tuned) as model, fused_engine(model, context, buckets):
        pass
    assert predict(checked, context, buckets).item("tables").total == 0
    assert predict(tuned, context, buckets).item("tables").total / 2 == pytest.approx(2 * max(taken), rel=0.02)
    assert sorted(taken)[-2] == max(taken)


def test_divisors_of_angles_on_a_device_are_counted(
    tiny_model: Path, taken: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = asked(tiny_model, BASES[:2], context_size=1000, engine="fused", gpu_layers=-1)
    sums = []
    for few in (False, True):
        monkeypatch.setattr(TableDevice, "prefers_few_operations", few)
        taken.clear()
        with Model(asked(tiny_model)[0]) as model, fused_engine(model, *setup[1:]):
            sums.append(sum(taken))
    monkeypatch.setattr(memory, "_offload_devices", lambda _layers: [Device("GPU0", "stands for one", 0, 0)])
    assert predict(*setup).item("tables").device == sums[1] - sums[0] > 0


def test_the_engine_that_is_still_to_be_chosen_may_be_the_larger_one(tiny_model: Path) -> None:
    totals = [predict(*asked(tiny_model, engine=kind)).total for kind in ("contexts", "fused", "auto")]
    assert totals[2] == max(totals[:2])
    assert totals[0] != totals[1]


@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "experts", "logits"])
def test_adapters_are_counted(tmp_path: Path, log: list[str], kind: str, rank: int) -> None:
    path = tmp_path / "m.gguf"
    if kind == "experts":
        write_tiny_experts(path)
    else:
        widths = {"embedding": 256, "heads": 8, "kv_heads": 8, "feed_forward": 256}
        write_tiny_model(path, architecture="gpt2" if kind == "gpt2" else "llama", context_length=1024, **widths)  # type: ignore[arg-type]
    wanted = (lambda name: name == "output.weight") if kind == "logits" else is_projection
    adapter = write_lora(
        tmp_path / "a.gguf",
        random_lora(path, rank=rank, wanted=wanted),
        architecture="gpt2" if kind == "gpt2" else "llama",
    )
    checked, context, buckets = asked(path, BASES[:1], lora=[LoraConfig(adapter)], context_size=600)
    prediction = predict(checked, context, buckets)
    without = predict(checked_model(path, 0), context, buckets)
    assert without.item("adapters").total == 0
    with Model(checked) as model, contexts_engine(model, context, buckets) as engine:
        # llama.cpp plans its buffers anew at the first batch.
        engine.prefill(0, [1, 2, 3])
    assert prediction.item("adapters").total / 2**20 == pytest.approx(buffers(log, "LoRA"), abs=0.02)
    ratio = prediction.item("compute").total / 2**20 / sizes(log, "compute")[-1]
    assert 0.99 < ratio < 1.4
    assert prediction.item("working").total > without.item("working").total


@pytest.mark.parametrize("types", [("f32", "f16"), ("q8_0", "q8_0"), ("f16", "q4_0")])
def test_caches_of_other_types(tmp_path: Path, log: list[str], types: tuple[Any, Any]) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", **SHAPES["wide"])
    config = asked(path, BASES[:1], context_size=2048, cache_type_k=types[0], cache_type_v=types[1])
    prediction, found = measured(config, log)
    assert prediction.item("caches").host / 2**20 == pytest.approx(found["caches"], abs=0.01)
    assert prediction.item("compute").host / 2**20 >= 0.98 * found["compute"]


def test_attention_that_is_no_flash_attention(tmp_path: Path, log: list[str]) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", **SHAPES["wide"])
    prediction, found = measured(asked(path, BASES[:1], context_size=2048, flash_attention="off"), log)
    assert prediction.item("compute").host / 2**20 == pytest.approx(found["compute"], rel=0.1)


def test_a_recurrent_state(tmp_path: Path, log: list[str]) -> None:
    path = write_tiny_mamba(tmp_path / "m.gguf", embedding=128)
    prediction, found = measured(asked(path, BASES[:1], context_size=512, slots=2), log)
    assert prediction.item("caches").host / 2**20 == pytest.approx(found["caches"], abs=0.02)
    assert prediction.kv_bytes_per_token == 0


def test_widths_of_caches_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", metadata={"llama.attention.head_count_kv": [2, 1]})
    assert predict(*asked(path)).kv_bytes_per_token == (2 + 1) * 16 * 2 * 2


def test_layers_that_share_a_cache_are_counted_once(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", metadata={"llama.attention.shared_kv_layers": 1})
    found = predict(*asked(path, cache_type_k="f32", cache_type_v="f32"))
    assert found.kv_bytes_per_token == 2 * 16 * 2 * 4


def test_the_caches_of_the_real_model(real_model: Path) -> None:
    assert predict(*asked(real_model)).kv_bytes_per_token == 30 * 2 * 3 * 64 * 2
    quantised = predict(*asked(real_model, cache_type_k="q8_0"))
    assert quantised.kv_bytes_per_token == 30 * 3 * (64 // 32 * 34 + 64 * 2)


def test_a_prefill_base_that_is_no_bucket_is_one_context_more(tiny_model: Path) -> None:
    elsewhere = {"prefill_base": 12345.0}
    assert predict(*asked(tiny_model, prefill="shared")).contexts == 3
    assert predict(*asked(tiny_model, prefill="shared", **elsewhere)).contexts == 4
    assert predict(*asked(tiny_model, **elsewhere)).contexts == 3
    assert predict(*asked(tiny_model, BASES[:1], prefill="shared", **elsewhere)).contexts == 1


def test_one_context_for_all_buckets_pads_each_sequence(tiny_model: Path) -> None:
    fused = predict(*asked(tiny_model, context_size=300, slots=2, engine="fused"))
    assert (fused.contexts, fused.cells) == (1, 512 * 6)
    assert fused.item("caches").total == 512 * 6 * fused.kv_bytes_per_token


@settings(max_examples=60, deadline=None)
@given(room=st.integers(0, 2**31), context=st.integers(1, 100_000), buckets=st.integers(1, 3))
def test_what_is_advised_fits_and_a_step_more_does_not(tiny_model: Path, room: int, context: int, buckets: int) -> None:
    prediction, free = predict(*asked(tiny_model, BASES[:buckets], context_size=context)), Room(room)

    def fits(**changes: Any) -> bool:
        return predict(*asked(tiny_model, **{"bases": BASES[:buckets], "context_size": context, **changes})).fits(free)

    longest, most = prediction.longest_context(free), prediction.most_buckets(free)
    assert longest % CONTEXT_STEP == 0
    assert not longest or fits(context_size=longest)
    assert not fits(context_size=longest + CONTEXT_STEP)
    assert not most or fits(bases=BASES[:most])
    assert (most == buckets) == prediction.fits(free) == (prediction.advice(free) == "")


def test_a_set_up_that_does_not_fit_is_refused_with_what_would(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = asked(tiny_model)
    needed = predict(*config).host
    monkeypatch.setattr(memory, "available_memory", lambda: needed - 1)
    with pytest.raises(OutOfMemoryError) as caught:
        check_memory(*config)
    assert "3 buckets of 4,096 tokens need" in caught.value.message
    assert "`buckets=2`" in caught.value.hint
    assert "`cache_type_k=q8_0`" not in caught.value.hint  # its heads have 16 numbers, half a block
    assert check_memory(*asked(tiny_model, force=True)).total == needed
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    assert check_memory(*config).total == needed


def test_nothing_to_advise(tiny_model: Path) -> None:
    assert "smaller model" in predict(*asked(tiny_model)).advice(Room(0))


def test_layers_on_a_device(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "supports_offload", lambda: True)
    monkeypatch.setattr(memory, "devices", lambda: [Device("CPU", "", 5, 9)])
    # A build for devices on a machine without one.
    assert (
        predict(*asked(tiny_model, gpu_layers=-1)).device
        == memory.free_room(0).device
        == memory.free_room(-1).device
        == 0
    )
    monkeypatch.setattr(memory, "devices", lambda: [Device("CPU", "", 5, 9), Device("Metal", "", 7, 9)])
    assert (memory.free_room(-1).device, memory.free_room(0).device) == (7, 0)
    host, half, full = (predict(*asked(tiny_model, gpu_layers=layers)) for layers in (0, 1, -1))
    assert host.device == 0
    assert 0 < half.item("caches").device < full.item("caches").device == full.item("caches").total
    (embedding,) = [t for t in checked_model(tiny_model).header.tensors if t.name == "token_embd.weight"]
    assert full.item("weights").host == embedding.size_bytes
    assert not full.fits(Room(full.host, full.device - 1))
    assert full.fits(Room(full.host, full.device))


def test_limits_of_control_groups_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    group = tmp_path / "user" / "app"
    group.mkdir(parents=True)
    own = tmp_path / "self"
    own.write_text("0::/user/app\n")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_CGROUP", own)
    assert available_memory() > 10_000
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text("5000\n")
    (group.parent / "memory.max").write_text("9000\n")
    (group.parent / "memory.current").write_text("6000\n")
    (group.parent / "memory.stat").write_text("anon 4000\ninactive_file 2000\n")
    assert available_memory() == 5000
    (group / "memory.max").write_text("100\n")
    assert available_memory() == 0


def test_sizes_for_people() -> None:
    assert [gibibytes(size) for size in (0, 2**20, 20 * 2**20, 3 * 2**29, 2**44)] == [
        *("0.0 MiB", "1.0 MiB", "20 MiB", "1.5 GiB", "16,384 GiB")
    ]
