"""Whether a gate saves time is measured once, and what the gate "auto" stands for follows from it."""

from __future__ import annotations

from pathlib import Path
from time import sleep

import pytest

import abcli
from abcli.engine.engine import Engine
from abcli.engine.gating import GateCosts, measure_gate, paying_gate
from abcli.engine.patience import OutOfTimeError, Patience
from abcli.generate import Generator
from abcli.sampling import GateSetting, GenerationConfig, check_gate
from tests.support.fakes import ByteTokenizer, FakeEngine, GreedySampler
from tests.support.models import checked_model, set_up

SECONDS = {"native": 0.002, "others": 0.010, "rows": 0.020}


def slow(seconds: dict[str, float] = SECONDS, size: int = 64) -> FakeEngine:
    """An engine whose steps take their time."""
    engine = FakeEngine(lambda tokens, _bucket: tokens[-1], bases=(1e4, 2e4, 3e4), context_size=size)
    engine.backend.fail = lambda _verb: sleep(seconds.get(engine.backend.calls[-1][0], 0))
    return engine


def test_the_costs_are_those_of_each_kind_of_step() -> None:
    with slow() as engine:
        costs = measure_gate(engine, Patience("it"))
        assert list(engine.tokens(0)) == []
    assert 0.002 <= costs.sure < costs.unsure
    assert 0.012 <= costs.unsure < 0.03
    assert costs.ungated >= 0.020
    assert costs.pays
    assert not GateCosts(sure=0.002, unsure=0.030, ungated=0.015).pays
    with slow(size=12) as short:
        assert measure_gate(short, Patience("it")).ungated >= 0.020
    with slow() as engine, pytest.raises(OutOfTimeError):
        measure_gate(engine, Patience("it", 0.01))


@pytest.mark.parametrize(("ungated", "wanted"), [(0.020, 0.8), (0.001, None)])
def test_it_is_measured_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ungated: float, wanted: float | None
) -> None:
    monkeypatch.setenv("ABCLI_HOME", str(tmp_path))
    said: list[str] = []
    model, (config, _) = checked_model(tiny_model), set_up(bases=(1e4, 2e4, 3e4), context_size=64)
    found = []
    for _ in range(2):
        with slow({**SECONDS, "rows": ungated}) as engine:
            found.append(paying_gate(model, engine, "fused", config, 0.8, said.append))
    assert found == [wanted, wanted]
    assert len(said) == 1
    with slow() as engine:
        paying_gate(model, engine, "contexts", config, 0.8, said.append)
    assert len(said) == 2
    with FakeEngine(lambda _tokens, _bucket: 97) as single:
        assert paying_gate(model, single, "fused", config, 0.8, said.append) is None


def test_a_measurement_that_is_skipped_is_made_another_time(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ABCLI_HOME", str(tmp_path))
    model, (config, _) = checked_model(tiny_model), set_up(bases=(1e4, 2e4, 3e4), context_size=64)

    def interrupted(_engine: Engine, _patience: Patience) -> GateCosts:
        raise KeyboardInterrupt

    said: list[str] = []
    with slow() as engine:
        with monkeypatch.context() as patch:
            patch.setattr("abcli.engine.gating.measure_gate", interrupted)
            assert paying_gate(model, engine, "fused", config, 0.8, said.append) is None
        assert paying_gate(model, engine, "fused", config, 0.8, said.append) == 0.8
    assert len(said) == 2


@pytest.mark.parametrize(
    ("gate", "usual", "asked"), [("auto", 0.0, 0), ("auto", None, 1), ("auto", 1.0, 1), (0.0, 1, 0)]
)
def test_auto_stands_for_what_was_found(gate: GateSetting, usual: float | None, asked: float) -> None:
    engine = FakeEngine(lambda _tokens, _bucket: 97, bases=(1e4, 2e4))
    with Generator(engine, ByteTokenizer(), GreedySampler, usual_gate=usual) as generator:
        *_, piece = generator.stream(0, [1, 2], GenerationConfig(max_tokens=4, gate=gate))
    assert piece.answer.statistics.asked == asked


def test_a_model_with_the_gate_auto(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCLI_HOME", str(tmp_path))
    assert check_gate("auto") == "auto"
    with abcli.load(tiny_model, buckets=2, ctx_size=128, threads=1, gate="auto") as llm:
        assert llm.generate("Hello", max_tokens=3, ignore_eos=True).usage.completion_tokens == 3
        chat = llm.chat(max_tokens=2, ignore_eos=True)
        chat.set("gate", "auto")
        assert chat.settings()["gate"] == "auto"
        chat.send("Hello")
    assert list((tmp_path / "engines").glob("gate-*.json"))
