"""What concerns devices with memory of their own: `make test ARGS="-m device"` on a machine that has one.

All other tests compute on the CPU, whose arithmetic does not depend on the machine. A device's is coarser: results may
differ by as much as llama.cpp's own do there, when it computes the same tokens in another batch. Where there is no
device, tests/engine/test_rpc.py runs these tests over llama.cpp's RPC backend.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from numpy.typing import NDArray

from abcli.config import LoraConfig, MergeRule, Tuning
from abcli.engine import memory
from abcli.engine.choose import verify_fused
from abcli.engine.engine import Engine
from abcli.engine.memory import free_room, predict
from abcli.merge import Merger
from abcli.native.llama import devices, initialise, supports_offload
from abcli.native.model import Model
from tests.support.engines import contexts_engine, fused_engine
from tests.support.lora import random_lora, write_lora
from tests.support.models import checked_model, open_model, set_up
from tests.support.tiny_gguf import write_tiny_model

SERVER = "ABCLI_TEST_RPC_SERVER"
BASES = (5e3, 1e4, 2e4)
TOKENS = [index * 7 % 250 for index in range(90)]
MODELS: dict[str, dict[str, Any]] = {
    "pairs": {"layers": 7},
    "halves": {"layers": 7, "architecture": "qwen2"},
    "sliding window": {"layers": 7, "architecture": "gemma3"},
}


TUNING = Tuning(((0.5, 1.0, 1.75, 0.8),) * 7, ((0.5, 1.0), (1.5, 0.7), (1.0, 1.0), (2.0, 0.5), *((1.2, 0.6),) * 3))


def has_device() -> bool:
    initialise()
    if address := os.environ.get(SERVER):
        library = llama._lib
        library.ggml_backend_rpc_add_server.restype = ctypes.c_void_p
        library.ggml_backend_register.argtypes = [ctypes.c_void_p]
        library.ggml_backend_register(library.ggml_backend_rpc_add_server(address.encode()))
    return supports_offload() and any(not one.name.startswith(("CPU", "BLAS", "ACCEL")) for one in devices())


pytestmark = [
    pytest.mark.device,
    pytest.mark.skipif(not has_device(), reason="there is no device with memory of its own"),
]


@pytest.fixture(scope="module", params=[-1, 4], ids=["whole", "in part"])
def layers(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module", params=[*MODELS, *(f"{kind}, tuned" for kind in MODELS)])
def model(request: pytest.FixtureRequest, layers: int, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("device") / "model.gguf"
    kind, _, tuned = request.param.partition(", ")
    checked = checked_model(write_tiny_model(path, **MODELS[kind]), gpu_layers=layers)
    with Model(checked.with_tuning(TUNING) if tuned else checked) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with open_model(write_tiny_model(tmp_path_factory.mktemp("device") / "model.gguf"), gpu_layers=-1) as loaded:
        yield loaded


def config(**changes: Any) -> Any:
    return set_up(**{"bases": BASES, "context_size": 256, "threads": 2, "slots": 3, "prefill": "exact", **changes})


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def divergence(left: NDArray[np.float32], right: NDArray[np.float32]) -> float:
    """The largest KL(left || right) of a row."""
    first, second = log_softmax(left), log_softmax(right)
    return float((np.exp(first) * (first - second)).sum(axis=-1).max())


def coarseness(model: Model) -> float:
    """The largest KL divergence between llama.cpp's own results for the same tokens in batches of other shapes."""
    with contexts_engine(model, *config(bases=(1e4,))) as engine:
        found = []
        for size in (len(TOKENS), 40, 17):
            engine.truncate(0, 0)
            for start in range(0, len(TOKENS), size):
                logits = engine.prefill(0, TOKENS[start : start + size]).copy()
            found.append(logits)
        return max(divergence(found[0], other) for other in found[1:])


def steps(engine: Engine, slot: int, count: int = 4) -> list[NDArray[np.float32]]:
    return [engine.prefill(slot, TOKENS).copy(), *(engine.step({slot: token})[slot].copy() for token in range(count))]


@pytest.mark.parametrize("prefill", ["exact", "shared"])
def test_fused_differs_from_contexts_by_no_more_than_batches_do(model: Model, layers: int, prefill: str) -> None:
    limit = 1e-5 + 4 * coarseness(model)
    chosen = config(prefill=prefill)
    with contexts_engine(model, *chosen) as reference, fused_engine(model, *chosen) as engine:
        assert engine.turning == "rows are turned inside llama.cpp's graph"
        assert engine.sharing.shared == reference.sharing.shared == (prefill == "shared")
        for wanted, found in zip(steps(reference, 1), steps(engine, 1), strict=True):
            assert divergence(wanted, found) < limit
        for each in (reference, engine):
            each.copy(1, 0)
            each.truncate(0, 60)
        wanted, found = (each.step({0: 3, 1: 4}) for each in (reference, engine))
        assert max(divergence(wanted[slot], found[slot]) for slot in (0, 1)) < limit
        kinds = {device.is_cpu for device in engine._backend._context.devices.opened}
        assert False in kinds
        assert all(device.prefers_few_operations != device.is_cpu for device in engine._backend._context.devices.opened)
        assert layers > 0 or True not in kinds


def test_automatic_prefill_leaves_contexts_exact(whole: Model) -> None:
    with (
        contexts_engine(whole, *config(prefill="auto")) as engine,
        fused_engine(whole, *config(prefill="auto")) as fused,
    ):
        assert not engine.sharing.shared
        assert "no faster" in engine.sharing.reason
        assert fused.sharing.shared


def test_the_fused_engine_is_found_sound(whole: Model) -> None:
    settings, buckets = config(slots=1)
    assert verify_fused(whole, settings, buckets.bases).sound


@pytest.mark.parametrize("rule", ["confidence", "mean"])
def test_what_is_merged_there_is_what_would_be_merged_here(whole: Model, rule: MergeRule) -> None:
    with fused_engine(whole, *config()) as engine:
        for slot in (0, 2):
            engine.prefill(slot, TOKENS)
        # The second time the buckets' own logits stay there.
        for _ in range(2):
            found = {slot: logits.copy() for slot, logits in engine.step({0: 5, 2: 6}, rule).items()}
            agreements = {slot: engine.agreement(slot) for slot in found}
            for slot in found:
                engine.truncate(slot, len(TOKENS))
        for slot, logits in engine.step({0: 5, 2: 6}).items():
            merged = Merger(len(BASES), whole.vocabulary_size).merge(logits, rule)
            assert found[slot].shape == (1, whole.vocabulary_size)
            assert np.abs(found[slot][0] - merged.logits).max() < 1e-4
            assert agreements[slot] == pytest.approx(merged.agreement, abs=1e-4)


def test_buckets_that_were_not_asked_catch_up(whole: Model) -> None:
    settings, buckets = config(prefill="shared")
    settings = replace(settings, gated=True)
    found = []
    for make in (contexts_engine, fused_engine):
        with make(whole, settings, buckets) as engine:
            engine.prefill(0, TOKENS)
            for token in range(5):
                assert len(engine.step({0: token}, gates={0: lambda _row: True})[0]) == 1
            found.append(engine.step({0: 9}, gates={0: lambda _row: False})[0].copy())
    assert divergence(*found) < 1e-5 + 4 * coarseness(whole)


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_an_adapter_changes_the_same_as_on_the_cpu(tmp_path: Path, architecture: Any) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", architecture=architecture)
    adapter = write_lora(tmp_path / "adapter.gguf", random_lora(path), architecture=architecture)
    found = []
    for gpu_layers in (0, -1):
        with open_model(path, gpu_layers, [LoraConfig(adapter)]) as model, fused_engine(model, *config()) as engine:
            found.append(engine.prefill(0, TOKENS).copy())
            limit = 1e-5 + 4 * coarseness(model)
    assert divergence(*found) < limit


@pytest.mark.skipif(SERVER in os.environ, reason="a server tells of the machine's memory, whatever is taken there")
def test_memory_is_predicted(tmp_path: Path) -> None:
    path = write_tiny_model(
        tmp_path / "model.gguf", layers=6, embedding=512, heads=8, kv_heads=8, feed_forward=2048, vocabulary_size=20_000
    )
    with open_model(path, gpu_layers=-1) as model:
        settings, buckets = config(context_size=8192, slots=1, prefill="shared")
        with fused_engine(model, *config(slots=1)) as small:
            small.prefill(0, TOKENS)  # what the device's libraries keep is there from now on
        before = free_room(-1).device
        with fused_engine(model, settings, buckets) as engine:
            engine.prefill(0, TOKENS)
            engine.step({0: 1})
            used = before - free_room(-1).device
    prediction = predict(model.checked, replace(settings, engine="fused"), buckets)
    first = memory._CUDA_BYTES if prediction.item("device").device else 0
    assert used == pytest.approx(prediction.device - prediction.item("weights").device - first, rel=0.1)
