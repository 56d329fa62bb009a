"""Gains of heads give what the same factors in the weights give, in every engine, and nothing where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from abcli.config import HeadNumbers, LoraConfig, Tuning
from abcli.errors import UnsupportedModelError
from abcli.gguf.checked import CheckedModel
from abcli.native.model import Model
from abcli.native.rotating import hook
from abcli.native.rotating.hook import product_hook
from tests.support.engines import contexts_engine, fused_engine
from tests.support.lora import is_projection, random_lora, write_lora
from tests.support.models import checked_model, set_up
from tests.support.tiny_gguf import Architecture, write_tiny_model

HEADS = 4
GAINS: HeadNumbers = ((0.5, 1.0, 1.75, 0.0), (1.25, 0.8, 1.0, 2.0))
ONES: HeadNumbers = ((1.0,) * HEADS,) * 2
TOKENS = [*range(40, 75), *range(60, 80)]
ENGINES = {"contexts": contexts_engine, "fused": fused_engine}
BASES = [(10_000.0,), (10_000.0, 14_000.0, 20_000.0)]


def scaled_weights(path: Path) -> dict[str, NDArray[np.float32]]:
    """The output weights of a model, each head's columns multiplied by its gain; every other layer has the same."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if tensor.name.endswith("attn_output.weight"):
            gains = GAINS[int(tensor.name.split(".")[1]) % 2]
            found[tensor.name] = tensor.data * np.repeat(np.float32(gains), tensor.data.shape[1] // HEADS)
    return found


def logits(
    checked: CheckedModel, engine: str, bases: Sequence[float] = (10_000.0,), **context: object
) -> NDArray[np.float32]:
    """The logits [2, buckets, vocabulary] after a prompt and after one more token."""
    config, buckets = set_up(bases, context_size=256, **context)
    with Model(checked) as model, ENGINES[engine](model, config, buckets) as opened:
        first = opened.prefill(0, TOKENS).copy()
        return np.stack([first, opened.step({0: 50})[0]])


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bases", BASES, ids=["one bucket", "three buckets"])
def test_gains_are_factors_in_the_output_weights(
    tmp_path: Path, architecture: Architecture, engine: str, bases: tuple[float, ...]
) -> None:
    # Every sixth layer of gemma3 follows the base.
    layers = 6 if architecture == "gemma3" else 2
    path = write_tiny_model(tmp_path / "plain.gguf", architecture=architecture, layers=layers)
    tensors = scaled_weights(path)
    scaled = write_tiny_model(tmp_path / "scaled.gguf", architecture=architecture, layers=layers, tensors=tensors)
    # Half precision in the cache or in flash attention would turn last digits into visible ones.
    exact = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off", "prefill": "exact"}
    found = logits(checked_model(path).with_tuning(Tuning(GAINS * (layers // 2))), engine, bases, **exact)
    wanted = logits(checked_model(scaled), engine, bases, **exact)
    plain = logits(checked_model(path), engine, bases, **exact)
    assert np.abs(found - wanted).max() < 1e-4
    assert np.abs(found - plain).max() > 0.1


@pytest.mark.parametrize("engine", ENGINES)
def test_shared_prompts_have_the_gains(tmp_path: Path, engine: str) -> None:
    path = write_tiny_model(tmp_path / "plain.gguf")
    scaled = write_tiny_model(tmp_path / "scaled.gguf", tensors=scaled_weights(path))
    found = logits(checked_model(path).with_tuning(Tuning(GAINS)), engine, BASES[1], prefill="shared")
    assert np.abs(found - logits(checked_model(scaled), engine, BASES[1], prefill="shared")).max() < 5e-3


@pytest.mark.parametrize("engine", ENGINES)
def test_gains_of_one_are_llama_cpp_bit_for_bit(tmp_path: Path, engine: str) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "plain.gguf"))
    assert checked.with_tuning(Tuning(ONES)) == checked
    np.testing.assert_array_equal(logits(checked.with_tuning(Tuning(ONES)), engine), logits(checked, engine))


def test_an_adapter_of_the_output_weights_gets_the_same_outputs(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "plain.gguf")
    scaled = write_tiny_model(tmp_path / "scaled.gguf", tensors=scaled_weights(path))
    lora = random_lora(path, wanted=lambda name: is_projection(name) and "attn_output" in name)
    scaled_lora = {
        name: replace(pair, a=pair.a * np.repeat(np.float32(GAINS[int(name.split(".")[1])]), 64 // HEADS))
        for name, pair in lora.items()
    }
    plain_file, scaled_file = (
        write_lora(tmp_path / f"{number}.gguf", matrices) for number, matrices in enumerate((lora, scaled_lora))
    )
    found = logits(checked_model(path, lora=[LoraConfig(plain_file)]).with_tuning(Tuning(GAINS)), "fused")
    wanted = logits(checked_model(scaled, lora=[LoraConfig(scaled_file)]), "fused")
    assert np.abs(found - wanted).max() < 5e-3


def test_another_model_computes_without_them_meanwhile(tmp_path: Path) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "plain.gguf"))
    alone = logits(checked, "contexts")
    with Model(checked.with_tuning(Tuning(GAINS))):
        assert product_hook().installed
        np.testing.assert_array_equal(logits(checked, "contexts"), alone)
    assert not product_hook().installed


def test_gains_count_as_another_model(tmp_path: Path) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "plain.gguf"))
    others = [checked.with_tuning(Tuning(GAINS)), checked.with_tuning(Tuning(GAINS[::-1]))]
    assert len({one.fingerprint for one in (checked, *others)}) == 3


def test_gains_of_another_shape_are_refused(tmp_path: Path) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "plain.gguf"))
    for gains in (GAINS[:1], tuple(layer[1:] for layer in GAINS)):
        with pytest.raises(UnsupportedModelError, match="2 layers of 4 heads"):
            checked.with_tuning(Tuning(gains))


def test_a_model_without_such_outputs_is_refused(tmp_path: Path) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "plain.gguf"))
    config, buckets = set_up([10_000.0], context_size=256)
    with (
        Model(replace(checked, tuning=Tuning((*GAINS, GAINS[0])))) as model,
        pytest.raises(UnsupportedModelError, match="in layer 2"),
        contexts_engine(model, config, buckets),
    ):
        pass


def test_where_functions_cannot_be_replaced_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = checked_model(write_tiny_model(tmp_path / "plain.gguf"))
    monkeypatch.setattr(hook, "_obstacle", lambda _hooks: "the system does not allow to write there")
    with pytest.raises(UnsupportedModelError, match="does not allow"):
        Model(checked.with_tuning(Tuning(GAINS)))
