"""Bases of heads give what an independent implementation gives, in every engine, and nothing where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from abcli.config import HeadNumbers, LoraConfig, Tuning
from abcli.engine.choose import verify_fused
from abcli.errors import UnsupportedModelError
from abcli.gguf.checked import CheckedModel
from abcli.native import ggml_api as api
from abcli.native.model import Model
from abcli.native.rotating import hook
from abcli.native.rotating.context import FusedContext
from abcli.native.rotating.hook import rope_hook
from tests.support.engines import computed, contexts_engine, fused_engine
from tests.support.lora import random_lora, write_lora
from tests.support.models import checked_model, set_up
from tests.support.reference import reference_logits
from tests.support.tiny_gguf import Architecture, write_tiny_model

NATIVE = 10_000.0
MULTIPLIERS: HeadNumbers = ((0.4, 1.0), (1.5, 3.0))
TUNING = Tuning(multipliers=MULTIPLIERS)
TOKENS = [*range(40, 75), *range(60, 80)]
ENGINES = {"contexts": contexts_engine, "fused": fused_engine}
# Half precision in the cache or in flash attention would turn last digits into visible ones.
EXACT = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off", "prefill": "exact"}


def logits(
    checked: CheckedModel, engine: str = "contexts", bases: Sequence[float] = (NATIVE,), **context: object
) -> NDArray[np.float32]:
    """The logits [2, buckets, vocabulary] after a prompt and after one more token."""
    config, buckets = set_up(bases, context_size=256, **{**EXACT, **context})
    with Model(checked) as model, ENGINES[engine](model, config, buckets) as opened:
        first = opened.prefill(0, TOKENS).copy()
        return np.stack([first, opened.step({0: 50})[0]])


def under(base: float, multipliers: HeadNumbers = MULTIPLIERS) -> HeadNumbers:
    return tuple(tuple(base * multiplier for multiplier in layer) for layer in multipliers)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("architecture", "neox"), [("llama", False), ("qwen2", True)])
@pytest.mark.parametrize("engine", ENGINES)
def test_it_is_what_an_independent_implementation_computes(
    tmp_path: Path, architecture: Architecture, neox: bool, engine: str, kv_heads: int
) -> None:
    """In both kinds of pairs, however many queries meet the same keys."""
    path = write_tiny_model(tmp_path / "model.gguf", architecture=architecture, kv_heads=kv_heads)
    multipliers = tuple(layer[:1] if kv_heads == 1 else (layer * 2)[:kv_heads] for layer in MULTIPLIERS)
    found = logits(checked_model(path).with_tuning(Tuning(multipliers=multipliers)), engine)[:, 0]
    bases = under(NATIVE, multipliers)
    for row, tokens in zip(found, (TOKENS, [*TOKENS, 50]), strict=True):
        wanted = reference_logits(path, tokens, bases, neox=neox)
        assert np.abs(row - wanted).max() < 1e-4
        assert row.argmax() == wanted.argmax()
    assert np.abs(found - logits(checked_model(path), engine)[:, 0]).max() > 0.1


@pytest.mark.parametrize(("architecture", "neox"), [("llama", False), ("qwen2", True)])
@pytest.mark.parametrize("engine", ENGINES)
def test_several_buckets_have_multiples_of_their_own_bases(
    tmp_path: Path, architecture: Architecture, neox: bool, engine: str
) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", architecture=architecture)
    bases = (NATIVE, 14_000.0, 20_000.0)
    found = logits(checked_model(path).with_tuning(TUNING), engine, bases)
    for rows, tokens in zip(found, (TOKENS, [*TOKENS, 50]), strict=True):
        for row, base in zip(rows, bases, strict=True):
            assert np.abs(row - reference_logits(path, tokens, under(base), neox=neox)).max() < 1e-4


CASES: dict[str, dict[str, object]] = {
    "pairs": {},
    "halves": {"architecture": "qwen3"},
    "a part of each head": {"architecture": "stablelm"},
    "factors": {"rope_factors": [1.0 + 0.5 * pair for pair in range(8)]},
    "a scale": {"metadata": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}},
    "YaRN": {
        "metadata": {
            "llama.rope.scaling.type": "yarn",
            "llama.rope.scaling.factor": 4.0,
            "llama.rope.scaling.original_context_length": 64,
        }
    },
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_multiplier_for_all_is_another_base(tmp_path: Path, case: str) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "model.gguf", **CASES[case]))  # type: ignore[arg-type]
    found = logits(checked.with_tuning(Tuning(multipliers=((1.4, 1.4),) * 2)))
    assert np.abs(found - logits(checked, bases=(1.4 * NATIVE,))).max() < 2e-5
    assert np.abs(found - logits(checked)).max() > 0.05


@settings(max_examples=10, deadline=None)
@given(multiplier=st.floats(0.1, 10), kv_heads=st.sampled_from([1, 2, 4]))
def test_any_multiplier_for_all_is_another_base(
    tmp_path_factory: pytest.TempPathFactory, multiplier: float, kv_heads: int
) -> None:
    path = write_tiny_model(tmp_path_factory.mktemp("model") / "model.gguf", kv_heads=kv_heads)
    found = logits(checked_model(path).with_tuning(Tuning(multipliers=((multiplier,) * kv_heads,) * 2)))
    assert np.abs(found - logits(checked_model(path), bases=(multiplier * NATIVE,))).max() < 2e-5


def test_layers_with_a_base_of_their_own_have_multiples_of_that(tmp_path: Path) -> None:
    """Five of gemma3's six layers do."""
    path = write_tiny_model(tmp_path / "model.gguf", architecture="gemma3", layers=6)
    metadata = {"gemma3.rope.freq_base_swa": 15_000.0}
    other = write_tiny_model(tmp_path / "other.gguf", architecture="gemma3", layers=6, metadata=metadata)
    tuning = Tuning(multipliers=((1.5, 1.5),) * 5 + ((1.0, 1.0),))
    found = logits(checked_model(path).with_tuning(tuning))
    assert np.abs(found - logits(checked_model(other))).max() < 2e-5
    assert np.abs(found - logits(checked_model(path))).max() > 0.01


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("engine", "cache"),
    [("contexts", "f16"), ("contexts", "bf16"), ("contexts", "f32"), ("fused", "f16"), ("fused", "f32")],
)
def test_shared_prompts_are_turned_head_by_head(
    tmp_path: Path, architecture: Architecture, engine: str, cache: str
) -> None:
    """Where one layer follows the base, its keys depend on nothing else: what is shared is exact."""
    layers = 6 if architecture == "gemma3" else 1
    path = write_tiny_model(tmp_path / "model.gguf", architecture=architecture, layers=layers)
    checked = checked_model(path).with_tuning(Tuning(multipliers=(MULTIPLIERS * 3)[-layers:]))
    tokens = [*TOKENS * 3]
    config, buckets = set_up((NATIVE, 14_000.0), context_size=512, prefill="shared", cache_type_k=cache)
    with Model(checked) as model, ENGINES[engine](model, config, buckets) as opened:
        assert opened.sharing.shared, opened.sharing.reason
        shared = opened.prefill(0, tokens).copy()
    with Model(checked) as model, ENGINES[engine](model, replace(config, prefill="exact"), buckets) as opened:
        exact = opened.prefill(0, tokens)
    apart = np.abs(exact[0] - exact[1]).max()
    assert np.abs(shared - exact).max() < apart / 20


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_the_fused_engine_proves_itself_with_them(tmp_path: Path, architecture: Architecture) -> None:
    layers = 6 if architecture == "gemma3" else 2
    path = write_tiny_model(tmp_path / "model.gguf", architecture=architecture, layers=layers)
    checked = checked_model(path).with_tuning(Tuning(multipliers=MULTIPLIERS * (layers // 2)))
    config, _ = set_up((NATIVE,), context_size=512)
    with Model(checked) as model:
        verdict = verify_fused(model, config, (NATIVE, 14_000.0, 20_000.0))
    assert verdict.sound, verdict.reason


@pytest.mark.parametrize("engine", ENGINES)
def test_multipliers_of_one_are_llama_cpp_bit_for_bit(tmp_path: Path, engine: str) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "model.gguf"))
    ones = checked.with_tuning(Tuning(multipliers=((1.0, 1.0),) * 2))
    assert ones == checked
    np.testing.assert_array_equal(logits(ones, engine), logits(checked, engine))


def test_a_stored_prompt_is_that_of_its_bases(tmp_path: Path) -> None:
    """Neither the model's own nor other bases read it."""
    checked = checked_model(write_tiny_model(tmp_path / "model.gguf"))
    tokens = TOKENS * 4
    lefts = []
    for multipliers in (MULTIPLIERS, MULTIPLIERS[::-1], (), MULTIPLIERS):
        config, buckets = set_up((NATIVE,), context_size=512, prompt_cache=tmp_path / "cache")
        tuned = checked.with_tuning(Tuning(multipliers=multipliers))
        with Model(tuned) as model, contexts_engine(model, config, buckets) as engine:
            lefts.append(computed(engine, 0, tokens)[1])
    assert lefts[:3] == [len(tokens)] * 3
    assert lefts[3] < len(tokens)


def test_an_adapter_of_queries_and_keys_is_turned_with_them(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf")
    lora = random_lora(path, wanted=lambda name: "attn_q" in name or "attn_k" in name)
    checked = checked_model(path, lora=[LoraConfig(write_lora(tmp_path / "lora.gguf", lora))])
    found = logits(checked.with_tuning(Tuning(multipliers=((1.4, 1.4),) * 2)))
    assert np.abs(found - logits(checked, bases=(1.4 * NATIVE,))).max() < 2e-5


def test_another_model_computes_without_them_meanwhile(tmp_path: Path) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "model.gguf"))
    alone = logits(checked)
    with Model(checked.with_tuning(TUNING)):
        assert rope_hook().installed
        np.testing.assert_array_equal(logits(checked), alone)
    assert not rope_hook().installed


def test_they_count_as_another_model(tmp_path: Path) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "model.gguf", kv_heads=4))
    numbers: HeadNumbers = ((0.5, 1.0, 1.75, 2.0),) * 2
    others = [Tuning(numbers), Tuning(multipliers=numbers), Tuning(numbers, numbers), Tuning(multipliers=numbers[::-1])]
    prints = [one.fingerprint for one in (checked, *map(checked.with_tuning, others))]
    assert len(set(prints)) == 4


def test_those_of_another_shape_are_refused(tmp_path: Path) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "model.gguf"))
    for multipliers in (MULTIPLIERS[:1], tuple(layer * 2 for layer in MULTIPLIERS)):
        with pytest.raises(UnsupportedModelError, match="2 layers of 2 heads of keys"):
            checked.with_tuning(Tuning(multipliers=multipliers))


def test_a_model_whose_heads_share_their_rotation_is_refused(tmp_path: Path) -> None:
    metadata = {"llama.attention.kv_lora_rank": 8}
    checked = checked_model(write_tiny_model(tmp_path / "model.gguf", metadata=metadata))
    with pytest.raises(UnsupportedModelError, match="MLA"):
        checked.with_tuning(TUNING)


def test_where_rows_cannot_be_turned_inside_the_graph_several_buckets_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "model.gguf")).with_tuning(TUNING)
    monkeypatch.setattr(FusedContext, "_wrong_turn", lambda _self: "the keys of layer 1 came out wrong")
    with pytest.raises(UnsupportedModelError, match="the keys of layer 1 came out wrong") as caught:
        logits(checked, "fused", (NATIVE, 14_000.0))
    assert "engine=contexts" in caught.value.hint


def test_a_layer_without_rotation_is_refused(tmp_path: Path) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "model.gguf"))
    with pytest.raises(UnsupportedModelError, match="no rotation of heads in layer 2"):
        logits(replace(checked, tuning=Tuning(multipliers=(*MULTIPLIERS, (2.0, 2.0)))))


def test_a_graph_without_room_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ggml would end the process."""
    checked = checked_model(write_tiny_model(tmp_path / "model.gguf"))
    monkeypatch.setattr(api, "memory_size", lambda context: api.used_memory(context) + 60 * api.tensor_overhead())
    with pytest.raises(UnsupportedModelError, match="no room for bases of heads"):
        logits(checked.with_tuning(TUNING))


def test_where_functions_cannot_be_replaced_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "model.gguf"))
    monkeypatch.setattr(hook, "_obstacle", lambda _hooks: "the system does not allow to write there")
    with pytest.raises(UnsupportedModelError, match="bases of heads need a hook"):
        Model(checked.with_tuning(TUNING))
