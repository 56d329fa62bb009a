"""The twin computes what llama.cpp computes, tuned and untuned, and its gradients are right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray

from abcli.config import UNTUNED, HeadNumbers, Tuning
from abcli.errors import UsageError
from abcli.gguf.checked import CheckedModel
from abcli.native.model import Model
from abcli.tune.architecture import ARCHITECTURES
from tests.support.engines import contexts_engine
from tests.support.models import checked_model, set_up
from tests.support.tiny_gguf import Architecture, write_tiny_model

torch = pytest.importorskip("torch", reason="abcli[tune] is not installed")
from abcli.tune.batches import text_rows  # noqa: E402
from abcli.tune.devices import free_bytes, torch_device  # noqa: E402
from abcli.tune.twin import Heads, Rows, Twin  # noqa: E402

CPU = torch.device("cpu")
HEADS, KEY_HEADS = 4, 2
# Nats; ggml looks GELU up in a table of half-precision numbers.
AGREES = {"gemma3": 1e-6}
TOKENS = [int(token) for token in np.random.default_rng(7).integers(40, 300, 100)]


def varied(path: Path) -> dict[str, NDArray[np.float32]]:
    """The norms of a model with numbers that are not all 1, so that each has to stand where it does."""
    random = np.random.default_rng(5)
    return {
        tensor.name: random.uniform(0.5, 1.5, tensor.data.shape).astype(np.float32)
        for tensor in gguf.GGUFReader(path).tensors
        if "_norm." in tensor.name
    }


def tiny(folder: Path, architecture: Architecture = "llama", **settings: Any) -> CheckedModel:
    # Every sixth layer of gemma3 sees everything.
    settings.setdefault("layers", 6 if architecture == "gemma3" else 2)
    plain = write_tiny_model(folder / "plain.gguf", architecture=architecture, **settings)
    settings["tensors"] = {**varied(plain), **settings.get("tensors", {})}
    return checked_model(write_tiny_model(folder / "model.gguf", architecture=architecture, **settings))


def tuning_for(checked: CheckedModel) -> Tuning:
    random = np.random.default_rng(3)

    def numbers(heads: int) -> HeadNumbers:
        return tuple(tuple(random.uniform(0.3, 2.0, heads).round(3).tolist()) for _ in range(checked.header.layers))

    return Tuning(numbers(HEADS), numbers(KEY_HEADS))


def as_tensors(tuning: Tuning, **options: Any) -> Heads:
    gains, multipliers = (
        torch.tensor(numbers, **options) if numbers else None for numbers in (tuning.gains, tuning.multipliers)
    )
    return Heads(gains, multipliers)


def by_llama_cpp(checked: CheckedModel) -> NDArray[np.float64]:
    """Log-probabilities after TOKENS."""
    exact = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off", "prefill": "exact"}
    config, buckets = set_up((checked.header.native_base,), context_size=256, **exact)
    with Model(checked) as model, contexts_engine(model, config, buckets) as engine:
        logits = engine.prefill(0, TOKENS)[0].astype(np.float64)
    return logits - np.logaddexp.reduce(logits)


def by_torch(checked: CheckedModel, tuning: Tuning = UNTUNED) -> NDArray[np.float64]:
    rows, wanted = text_rows([[*TOKENS, 0]], [len(TOKENS)])
    with torch.no_grad():
        logits = Twin(checked, CPU).logits(rows, as_tensors(tuning), wanted)
    found: NDArray[np.float64] = logits[0].double().log_softmax(-1).numpy()
    return found


def divergence(known: NDArray[np.float64], found: NDArray[np.float64]) -> float:
    return float((np.exp(known) * (known - found)).sum())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_it_agrees_with_llama_cpp(tmp_path: Path, architecture: Architecture) -> None:
    checked = tiny(tmp_path, architecture)
    whole = tuning_for(checked)
    plain, bound = by_llama_cpp(checked), AGREES.get(architecture, 1e-8)
    assert divergence(plain, by_torch(checked)) < bound
    for tuning in (Tuning(whole.gains), Tuning((), whole.multipliers), whole):
        tuned = by_llama_cpp(checked.with_tuning(tuning))
        assert divergence(tuned, by_torch(checked, tuning)) < bound
        assert divergence(plain, tuned) > 1e-3


CASES: dict[str, tuple[Architecture, dict[str, Any]]] = {
    "a scale of positions": (
        "llama",
        {"metadata": {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}},
    ),
    "one that windows do not have": (
        "gemma3",
        {"metadata": {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0}},
    ),
    "windows of another pattern and base": (
        "gemma3",
        {"metadata": {"gemma3.attention.sliding_window_pattern": 3, "gemma3.rope.freq_base_swa": 5000.0}},
    ),
    "factors of frequencies": ("llama", {"rope_factors": [1.0 + 0.5 * pair for pair in range(8)]}),
    "heads wider than their share": ("qwen3", {"metadata": {"qwen3.attention.key_length": 16}}),
    "another base": ("qwen2", {"rope_base": 1_000_000.0}),
    "a shared embedding": ("llama", {"tensors": {"output.weight": None}}),
    "biases": ("llama", {"tensors": {"blk.1.attn_output.bias": np.linspace(-1, 1, 64, dtype=np.float32)}}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_agrees_where_a_model_is_special(tmp_path: Path, case: str) -> None:
    architecture, settings = CASES[case]
    checked = tiny(tmp_path, architecture, **settings)
    known = by_llama_cpp(checked)
    assert divergence(known, by_torch(checked)) < AGREES.get(architecture, 1e-8)
    if case not in ("heads wider than their share", "another base"):
        other = by_llama_cpp(tiny(tmp_path, architecture))
        assert divergence(known, other) > 1e-4, "the case makes no difference"


def test_quantised_weights_are_read(tmp_path: Path) -> None:
    checked = tiny(tmp_path, dtype="q8_0")
    # llama.cpp rounds what it multiplies with them, too.
    assert divergence(by_llama_cpp(checked), by_torch(checked)) < 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_answers_in_one_row_do_not_see_each_other(tmp_path: Path, architecture: Architecture) -> None:
    """Two answers after one context, in one row that is filled up, are what each is alone."""
    twin = Twin(tiny(tmp_path, architecture), CPU)
    context, answers = TOKENS[:70], (TOKENS[70:80], TOKENS[80:95])
    tokens, positions, segments = list(context), [*range(70)], [0] * 70
    for number, answer in enumerate(answers, 1):
        tokens += answer
        positions += range(70, 70 + len(answer))
        segments += [number] * len(answer)
    fill = ([0] * 5, [0] * 5, [-1] * 5)
    rows = Rows(*(torch.tensor([part + more]) for part, more in zip((tokens, positions, segments), fill, strict=True)))
    ends = torch.tensor([[0, 79], [0, 94]])
    with torch.no_grad():
        together = twin.logits(rows, Heads(), ends)
        for found, answer in zip(together, answers, strict=True):
            alone, wanted = text_rows([[*context, *answer, 0]], [70 + len(answer)])
            assert (twin.logits(alone, Heads(), wanted)[0] - found).abs().max() < 1e-4


@pytest.mark.parametrize("frugal", [False, True])
def test_the_gradient_is_that_of_finite_differences(tmp_path: Path, frugal: bool) -> None:
    checked = tiny(tmp_path, "gemma3")
    twin = Twin(checked, CPU)
    rows, wanted = text_rows([[*TOKENS[:30], 0]], [20])
    heads = as_tensors(tuning_for(checked), requires_grad=True)

    def loss(at: Heads) -> Any:
        return twin.logits(rows, at, wanted, frugal=frugal).log_softmax(-1)[:, 99].mean()

    loss(heads).backward()
    for kind, places in {"gains": ((0, 1), (3, 2), (5, 0)), "multipliers": ((0, 1), (5, 0))}.items():
        numbers = getattr(heads, kind)
        for layer, head in places:
            step = torch.zeros_like(numbers)
            step[layer, head] = 1e-2
            with torch.no_grad():
                more, less = (replace(heads, **{kind: numbers + sign * step}) for sign in (1, -1))
                slope = (loss(more) - loss(less)) / 2e-2
            assert numbers.grad[layer, head] == pytest.approx(float(slope), rel=0.02, abs=1e-4)


def test_a_device_that_is_not_there_is_a_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert torch_device("auto") == torch_device("cpu") == CPU
    assert free_bytes(CPU) > 2**20
    for name in ("cuda", "mps"):
        with pytest.raises(UsageError, match=f"torch has no device {name} here"):
            torch_device(name)
