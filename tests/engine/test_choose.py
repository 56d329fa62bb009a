from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abcli.config import BucketConfig, EngineConfig, engines_directory
from abcli.engine import opening
from abcli.engine.choose import Speeds, Verdict, choose, measure_engines, verify_fused
from abcli.engine.contexts import ContextsEngine
from abcli.engine.fused import FusedEngine
from abcli.engine.opening import open_engine
from abcli.errors import NativeError, UnsupportedModelError
from abcli.gguf.header import Header, read_header
from abcli.native.ggml_api import TensorStruct
from abcli.native.model import Model
from abcli.native.rotating.tables import Tables
from tests.support.tiny_gguf import write_tiny_mamba, write_tiny_model

BASES = (5_000.0, 10_000.0, 20_000.0)
SOUND = Verdict((1e-6,) * 3, 1e-6, "")


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[Model]:
    with Model(tiny_model) as model:
        yield model


@pytest.fixture(scope="module")
def header(tiny_model: Path) -> Header:
    return read_header(tiny_model)


def config(path: Path, **changes: Any) -> EngineConfig:
    return EngineConfig(path, **{"bases": BASES, "context_size": 512, "threads": 2, "engine": "auto", **changes})


class Counted:
    """Stands for the probe and the measurement, and counts how often they are asked."""

    def __init__(self, verdict: Verdict = SOUND, speeds: Speeds | None = None) -> None:
        self.verdict, self.speeds = verdict, speeds or Speeds(2.0, 1.0)
        self.verified = self.measured = 0

    def verify(self, _model: Model, _config: EngineConfig) -> Verdict:
        self.verified += 1
        return self.verdict

    def measure(self, _model: Model, _config: EngineConfig, _header: Header) -> Speeds:
        self.measured += 1
        return self.speeds


@pytest.mark.parametrize(
    "shape", [{}, {"architecture": "qwen2"}, {"architecture": "gemma3", "layers": 7}, {"dtype": "q8_0"}], ids=str
)
def test_the_probe_finds_the_engine_right(tmp_path: Path, shape: Any) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", **shape)
    with Model(path) as model:
        verdict = verify_fused(model, config(path))
    assert verdict.sound
    assert len(verdict.divergences) == 3
    assert max(verdict.divergences) < 1e-3


@pytest.mark.parametrize("wrong", ["angles of keys and queries", "queries alone", "nothing turned"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_probe_notices_wrong_rotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, architecture: Any
) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", architecture=architecture, layers=7)
    turn, delta = Tables.turn, Tables._delta

    def other_angles(self: Tables, parameters: Any, base: float) -> Any:
        return 1.1 * delta(self, parameters, base)

    def other_rows(self: Tables, context: int, rows: int, *arguments: Any) -> int:
        # There are four heads of queries and two of keys.
        keys = TensorStruct.from_address(rows).ne[1] == 2
        return turn(self, context, rows, *arguments) if keys and wrong == "queries alone" else rows

    if wrong == "angles of keys and queries":
        monkeypatch.setattr(Tables, "_delta", other_angles)
    else:
        monkeypatch.setattr(Tables, "turn", other_rows)
    with Model(path) as model:
        verdict = verify_fused(model, config(path))
        assert not verdict.sound
        with pytest.raises(UnsupportedModelError, match="refuses itself"):
            choose(model, config(path, engine="fused"), read_header(path))
        choice = choose(model, config(path), read_header(path))
    assert choice.kind == "contexts"
    assert "refuses itself" in choice.reason


def test_auto_takes_the_faster_engine_and_asks_once(tiny: Model, header: Header) -> None:
    counted = Counted()
    for _ in range(3):
        choice = choose(tiny, config(tiny.path), header, counted.verify, counted.measure)
        assert (choice.kind, choice.reason) == ("fused", "measured: 2 steps/s fused, 1 in contexts")
    assert (counted.verified, counted.measured) == (1, 1)


@pytest.mark.parametrize(
    ("changes", "verified", "measured"),
    [
        ({"bases": (5_000.0, 10_000.0)}, 1, 2),
        ({"threads": 1}, 1, 2),
        ({"slots": 2}, 1, 2),
        ({"cache_type_k": "f32"}, 2, 2),
        ({"gpu_layers": 0}, 2, 2),
        ({"context_size": 1024}, 1, 1),
    ],
    ids=str,
)
def test_other_circumstances_are_found_out_anew(
    tiny: Model, header: Header, changes: Any, verified: int, measured: int
) -> None:
    counted = Counted()
    for settings in (config(tiny.path), config(tiny.path, **changes)):
        choose(tiny, settings, header, counted.verify, counted.measure)
    assert (counted.verified, counted.measured) == (verified, measured)


def test_the_slower_or_refused_engine_is_not_taken(tiny: Model, header: Header) -> None:
    slower = Counted(speeds=Speeds(1.0, 2.0))
    assert choose(tiny, config(tiny.path), header, slower.verify, slower.measure).kind == "contexts"
    assert choose(tiny, config(tiny.path, engine="fused"), header, slower.verify, slower.measure).kind == "fused"
    for file in engines_directory().iterdir():
        file.unlink()
    refused = Counted(Verdict((0.5,), 0.1, "it is wrong"))
    choice = choose(tiny, config(tiny.path), header, refused.verify, refused.measure)
    assert (choice.kind, choice.reason) == ("contexts", "the fused engine refuses itself: it is wrong")
    assert refused.measured == 0


def test_contexts_and_single_buckets_need_no_probe(tiny: Model, header: Header) -> None:
    counted = Counted()
    for changes in ({"engine": "contexts"}, {"bases": (10_000.0,)}, {"bases": (10_000.0, 10_000.0)}):
        settings = config(tiny.path, **changes)
        assert choose(tiny, settings, header, counted.verify, counted.measure).kind == "contexts"
    assert (counted.verified, counted.measured) == (0, 0)


def test_a_model_that_cannot_be_fused_is_decoded_in_contexts(tmp_path: Path) -> None:
    for path in (
        write_tiny_model(tmp_path / "mrope.gguf", architecture="qwen2vl"),
        write_tiny_mamba(tmp_path / "mamba.gguf"),
    ):
        with Model(path) as model:
            choice = choose(model, config(path), read_header(path))
            with pytest.raises(UnsupportedModelError):
                choose(model, config(path, engine="fused"), read_header(path))
        assert choice.kind == "contexts"
        assert "M-RoPE" in choice.reason or "recurrent" in choice.reason


def test_a_measurement_that_fails_means_contexts(tiny: Model, header: Header) -> None:
    def failing(_model: Model, _config: EngineConfig, _header: Header) -> Speeds:
        raise NativeError("no memory")

    choice = choose(tiny, config(tiny.path), header, Counted().verify, failing)
    assert (choice.kind, choice.reason) == ("contexts", "no memory")


def test_damaged_files_are_written_again(tiny: Model, header: Header) -> None:
    counted = Counted()
    for content in ("", "[]", "{}", '{"fused": "x", "floor": [], "divergences": 3}', "\x00" * 50, "[" * 100_000):
        choose(tiny, config(tiny.path), header, counted.verify, counted.measure)
        for file in engines_directory().iterdir():
            file.write_text(content)
    choose(tiny, config(tiny.path), header, counted.verify, counted.measure)
    assert (counted.verified, counted.measured) == (7, 7)
    for file in engines_directory().iterdir():
        assert json.loads(file.read_text())


def test_an_unwritable_home_costs_nothing_but_the_measurement(
    tiny: Model, header: Header, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ABCLI_HOME", str(tmp_path / "file"))
    counted = Counted()
    for _ in range(2):
        assert choose(tiny, config(tiny.path), header, counted.verify, counted.measure).kind == "fused"
    assert counted.measured == 2


def test_the_measurement_decodes_with_both(tiny: Model, header: Header) -> None:
    speeds = measure_engines(tiny, config(tiny.path, slots=2), header)
    assert np.isfinite([speeds.fused, speeds.contexts]).all()
    assert min(speeds.fused, speeds.contexts) > 0


@pytest.mark.parametrize(("kind", "wanted"), [("fused", FusedEngine), ("contexts", ContextsEngine)])
def test_opening_makes_the_chosen_engine(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, wanted: type
) -> None:
    with open_engine(config(tiny_model, engine=kind), BucketConfig(count=2)) as opened:
        assert isinstance(opened.engine, wanted)
        assert opened.engine_choice.kind == kind
        opened.engine.prefill(0, [1, 2, 3])
    chosen = replace(opened.engine_choice, reason="measured")
    monkeypatch.setattr(opening, "choose", lambda *_, **__: chosen)
    with open_engine(config(tiny_model), BucketConfig(count=2)) as opened:
        assert isinstance(opened.engine, wanted)
        assert opened.engine_choice.reason == "measured"
