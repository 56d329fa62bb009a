"""Adapters in the engines, against models into which numpy has merged the same matrices."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from abcli.config import Buckets, ContextConfig, EngineChoice, LoraConfig
from abcli.engine.choose import verify_fused
from abcli.engine.engine import Engine
from abcli.engine.opening import open_engine
from abcli.gguf.checked import CheckedModel
from abcli.native.model import Model
from tests.support.engines import contexts_engine, fused_engine, stepped
from tests.support.lora import random_lora, write_lora, write_merged
from tests.support.models import checked_model, set_up
from tests.support.tiny_gguf import write_tiny_experts, write_tiny_mamba, write_tiny_model

BASES = (5_000.0, 10_000.0, 20_000.0)
TOKENS = [index * 7 % 250 for index in range(150)]
# With half-precision caches the order of sums shows; these leave only float32 rounding.
EXACT: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off"}
MODELS: dict[str, dict[str, Any]] = {
    "pairs": {},
    "halves": {"architecture": "qwen2"},
    "partial": {"architecture": "stablelm"},
    "sliding window": {"architecture": "gemma3", "layers": 7},
}
ENGINES: dict[EngineChoice, Any] = {"contexts": contexts_engine, "fused": fused_engine}
Settings: TypeAlias = tuple[CheckedModel, ContextConfig, Buckets]
# How far rounding takes logits apart whose deviation is 2.
TOLERANCE = 2e-3


def config(path: Path, *loras: LoraConfig, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "engine": "contexts",
        "bases": BASES,
        "context_size": 256,
        "threads": 2,
        **EXACT,
        **changes,
    }
    context, buckets = set_up(**values)
    return checked_model(path, lora=loras), context, buckets


@contextmanager
def engine_of(settings: Settings) -> Iterator[Engine]:
    checked, context, buckets = settings
    with Model(checked) as model, ENGINES[context.engine](model, context, buckets) as engine:
        yield engine


def logits(settings: Settings) -> NDArray[np.float32]:
    """The logits [steps, buckets, vocabulary] after a prompt, and after two more tokens."""
    exact = settings[1].prefill == "exact"
    with engine_of(settings) as engine:
        assert engine.sharing.shared != exact
        found = [engine.prefill(0, TOKENS).copy()]
        found += [stepped(engine, {0: token})[0] for token in (3, 5)]
    return np.array(found)


@pytest.mark.parametrize("prefill", ["exact", "shared"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", MODELS)
def test_an_adapter_is_what_numpy_merges(tmp_path: Path, kind: str, engine: EngineChoice, prefill: Any) -> None:
    model = write_tiny_model(tmp_path / "m.gguf", **MODELS[kind])
    lora = random_lora(model)
    adapter = write_lora(tmp_path / "a.gguf", lora, architecture=MODELS[kind].get("architecture", "llama"), alpha=6.0)
    merged = write_merged(tmp_path / "merged.gguf", model, [(lora, 0.5 * 6.0 / 4)])
    ways = {"engine": engine, "prefill": prefill}
    ours = logits(config(model, LoraConfig(adapter, 0.5), **ways))
    np.testing.assert_allclose(ours, logits(config(merged, **ways)), atol=TOLERANCE)
    # Far more than the tolerance: the test would see a bucket without the adapter.
    assert np.abs(ours - logits(config(model, **ways))).max(axis=-1).min() > 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_adapters_add_up_with_their_scales(tmp_path: Path, tiny_model: Path, engine: EngineChoice) -> None:
    few = random_lora(tiny_model, rank=2, seed=1, wanted=lambda name: name.endswith(("attn_q.weight", "attn_v.weight")))
    many = random_lora(tiny_model, rank=8, seed=2)
    files = [write_lora(tmp_path / "few.gguf", few, alpha=4.0), write_lora(tmp_path / "many.gguf", many, alpha=0.0)]
    merged = write_merged(tmp_path / "merged.gguf", tiny_model, [(few, -0.7 * 4 / 2), (many, 0.2)])
    ours = logits(config(tiny_model, LoraConfig(files[0], -0.7), LoraConfig(files[1], 0.2), engine=engine))
    np.testing.assert_allclose(ours, logits(config(merged, engine=engine)), atol=TOLERANCE)
    other_order = logits(config(tiny_model, LoraConfig(files[1], 0.2), LoraConfig(files[0], -0.7), engine=engine))
    np.testing.assert_allclose(other_order, ours, atol=TOLERANCE)


def test_embeddings_and_output_can_be_changed(tmp_path: Path, tiny_model: Path) -> None:
    lora = random_lora(tiny_model, wanted=lambda name: name in ("token_embd.weight", "output.weight"))
    adapter = write_lora(tmp_path / "a.gguf", lora)
    merged = write_merged(tmp_path / "merged.gguf", tiny_model, [(lora, 1.0)])
    ours = logits(config(tiny_model, LoraConfig(adapter), prefill="exact"))
    np.testing.assert_allclose(ours, logits(config(merged, prefill="exact")), atol=TOLERANCE)


@pytest.mark.parametrize("dtype", ["f16", "q8_0"])
def test_adapters_of_other_types(tmp_path: Path, tiny_model: Path, dtype: Any) -> None:
    lora = random_lora(tiny_model, rank=32)
    adapter = write_lora(tmp_path / "a.gguf", lora, dtype=dtype, alpha=32.0)
    merged = write_merged(tmp_path / "merged.gguf", tiny_model, [(lora, 1.0)])
    ours, theirs, plain = (
        logits(config(path, *loras, prefill="exact"))
        for path, loras in ((tiny_model, [LoraConfig(adapter)]), (merged, []), (tiny_model, []))
    )
    assert np.abs(ours - theirs).mean() < 0.1 * np.abs(plain - theirs).mean()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_scale_of_0_is_no_adapter(tmp_path: Path, tiny_model: Path, engine: EngineChoice) -> None:
    adapter = write_lora(tmp_path / "a.gguf", random_lora(tiny_model))
    without = logits(config(tiny_model, engine=engine))
    np.testing.assert_array_equal(logits(config(tiny_model, LoraConfig(adapter, 0.0), engine=engine)), without)


def test_experts_can_be_changed(tmp_path: Path) -> None:
    model = write_tiny_experts(tmp_path / "m.gguf")
    lora = random_lora(model)
    adapter = write_lora(tmp_path / "a.gguf", lora)
    merged = write_merged(tmp_path / "merged.gguf", model, [(lora, 1.0)])
    ours = logits(config(model, LoraConfig(adapter), prefill="exact"))
    np.testing.assert_allclose(ours, logits(config(merged, prefill="exact")), atol=TOLERANCE)


def test_a_recurrent_model_with_an_adapter(tmp_path: Path) -> None:
    model = write_tiny_mamba(tmp_path / "m.gguf")
    lora = random_lora(model, wanted=lambda name: name.endswith(("ssm_in.weight", "ssm_out.weight")))
    adapter = write_lora(tmp_path / "a.gguf", lora, architecture="mamba")
    merged = write_merged(tmp_path / "merged.gguf", model, [(lora, 1.0)])
    one = {"bases": (10_000.0,), "prefill": "exact"}
    ours = logits(config(model, LoraConfig(adapter), **one))
    np.testing.assert_allclose(ours, logits(config(merged, **one)), atol=TOLERANCE)


def test_the_probe_of_the_fused_engine_sees_the_adapter(tmp_path: Path, tiny_model: Path) -> None:
    lora = LoraConfig(write_lora(tmp_path / "a.gguf", random_lora(tiny_model)))
    checked, context, buckets = config(tiny_model, lora)
    with Model(checked) as model:
        assert verify_fused(model, context, buckets.bases).sound


@pytest.mark.parametrize("engine", ["contexts", "fused", "auto"])
def test_opening_takes_the_adapters_along(tmp_path: Path, tiny_model: Path, engine: EngineChoice) -> None:
    lora = random_lora(tiny_model)
    norm = {"blk.0.attn_norm.weight": np.ones(64, np.float32)}
    adapter = write_lora(tmp_path / "a.gguf", lora, tensors=norm)
    merged = write_merged(tmp_path / "merged.gguf", tiny_model, [(lora, 1.0)])
    warnings: list[str] = []
    found = []
    for path, loras in ((tiny_model, (LoraConfig(adapter),)), (merged, ())):
        with open_engine(*config(path, *loras, engine=engine), warnings.append) as opened:
            found.append(opened.engine.prefill(0, TOKENS).copy())
    np.testing.assert_allclose(*found, atol=TOLERANCE)
    assert warnings == ["a.gguf: llama.cpp leaves out its 1 norm"]


def test_the_prompt_cache_tells_adapters_apart(tmp_path: Path, tiny_model: Path) -> None:
    adapter = write_lora(tmp_path / "a.gguf", random_lora(tiny_model))
    kept = {"prompt_cache": tmp_path / "prompts", "prefill": "shared"}
    variants = [(), (LoraConfig(adapter),), (LoraConfig(adapter, 0.5),)]
    for engine in ENGINES:
        for loras in variants:
            fresh = logits(config(tiny_model, *loras, engine=engine, prefill="shared"))
            # Written by the first, read by the second: whatever another adapter left there is not taken.
            for _ in range(2):
                stored = logits(config(tiny_model, *loras, engine=engine, **kept))
                np.testing.assert_allclose(stored, fresh, atol=TOLERANCE)
    assert len(list((tmp_path / "prompts").glob("*.prefix"))) == len(ENGINES) * len(variants)


def test_memory_stays_flat(tmp_path: Path, tiny_model: Path) -> None:
    lora = random_lora(tiny_model, rank=64)
    files = [write_lora(tmp_path / f"{name}.gguf", lora, alpha=1.0) for name in "ab"]
    loras = [LoraConfig(path, 0.1) for path in files]

    def once(engine: EngineChoice) -> None:
        with engine_of(config(tiny_model, *loras, engine=engine, prefill="shared")) as made:
            made.prefill(0, TOKENS)

    def resident(rounds: int) -> int:
        for _ in range(rounds):
            for engine in ENGINES:
                once(engine)
        gc.collect()
        return int(psutil.Process().memory_info().rss)

    before = resident(3)
    # Each adapter has 600 KB: one that is not freed in each of 40 loads would show as 24 MB.
    assert resident(10) - before < 8 * 2**20


def test_real_weights_with_an_adapter_and_merged(tmp_path: Path, real_model: Path) -> None:
    # All 30 layers in f32 would be files of 540 MB; two say as much.
    base = write_merged(tmp_path / "base.gguf", real_model, [], layers=2)
    lora = random_lora(base, rank=8, strength=0.2)
    adapter = write_lora(tmp_path / "a.gguf", lora, alpha=16.0)
    merged = write_merged(tmp_path / "merged.gguf", real_model, [(lora, 0.5 * 16 / 8)], layers=2)
    ways: dict[str, Any] = {"bases": (100_000.0, 200_000.0), "prefill": "shared"}
    theirs = logits(config(merged, **ways))
    for engine in ENGINES:
        ours = logits(config(base, LoraConfig(adapter, 0.5), engine=engine, **ways))
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)
    assert np.abs(logits(config(base, **ways)) - theirs).max() > 1
