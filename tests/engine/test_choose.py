from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abcli.config import Buckets, ContextConfig, engines_directory
from abcli.engine import choose as choose_module
from abcli.engine import opening
from abcli.engine.choose import Speeds, Verdict, choose, measure_engines, verify_fused
from abcli.engine.contexts import ContextsBackend
from abcli.engine.fused import FusedBackend
from abcli.engine.opening import open_engine
from abcli.engine.patience import OutOfTimeError, Patience
from abcli.errors import CancelledError, NativeError, UnsupportedModelError
from abcli.native.ggml_api import TensorStruct
from abcli.native.model import Model
from abcli.native.rotating.tables import Tables
from tests.support.models import checked_model, open_model, set_up
from tests.support.tiny_gguf import write_tiny_mamba, write_tiny_model

pytestmark = pytest.mark.usefixtures("nothing_found_out")

BASES = (5_000.0, 10_000.0, 20_000.0)
SOUND = Verdict((1e-6,) * 3, 1e-6, "")


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[Model]:
    with open_model(tiny_model) as model:
        yield model


def config(**changes: Any) -> tuple[ContextConfig, Buckets]:
    return set_up(**{"bases": BASES, "context_size": 512, "threads": 2, "engine": "auto", **changes})


class Counted:
    """Stands for the probe and the measurement, and counts how often they are asked."""

    def __init__(self, verdict: Verdict = SOUND, speeds: Speeds | None = None) -> None:
        self.verdict, self.speeds = verdict, speeds or Speeds(2.0, 1.0)
        self.verified = self.measured = 0

    def verify(self, _model: Model, _context: ContextConfig, _bases: Sequence[float]) -> Verdict:
        self.verified += 1
        return self.verdict

    def measure(self, _model: Model, _context: ContextConfig, _buckets: Buckets) -> Speeds:
        self.measured += 1
        return self.speeds


@pytest.mark.parametrize(
    "shape", [{}, {"architecture": "qwen2"}, {"architecture": "gemma3", "layers": 7}, {"dtype": "q8_0"}], ids=str
)
def test_the_probe_finds_the_engine_right(tmp_path: Path, shape: Any) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", **shape)
    with open_model(path) as model:
        verdict = verify_fused(model, config()[0], BASES)
    assert verdict.sound
    assert len(verdict.divergences) == 3
    assert max(verdict.divergences) < 1e-3


@pytest.mark.parametrize("wrong", ["angles of keys and queries", "queries alone", "nothing turned"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_probe_notices_wrong_rotations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str, architecture: Any
) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", architecture=architecture, layers=7)
    turn, angles = Tables.turn, Tables._angles

    def other_angles(self: Tables, *arguments: Any) -> Any:
        return 1.1 * angles(self, *arguments)

    def other_rows(self: Tables, context: int, rows: int, *arguments: Any) -> int:
        # There are four heads of queries and two of keys.
        keys = TensorStruct.from_address(rows).ne[1] == 2
        return turn(self, context, rows, *arguments) if keys and wrong == "queries alone" else rows

    if wrong == "angles of keys and queries":
        monkeypatch.setattr(Tables, "_angles", other_angles)
    else:
        monkeypatch.setattr(Tables, "turn", other_rows)
    with open_model(path) as model:
        verdict = verify_fused(model, config()[0], BASES)
        assert not verdict.sound
        with pytest.raises(UnsupportedModelError, match="refuses itself"):
            choose(model, *config(engine="fused"))
        choice = choose(model, *config())
    assert choice.kind == "contexts"
    assert "refuses itself" in choice.reason


def test_auto_takes_the_faster_engine_and_asks_once(tiny: Model) -> None:
    counted = Counted()
    for _ in range(3):
        choice = choose(tiny, *config(), counted.verify, counted.measure)
        assert (choice.kind, choice.reason) == ("fused", "measured: 2 steps/s fused, 1 in contexts")
    assert (counted.verified, counted.measured) == (1, 1)


@pytest.mark.parametrize(
    ("changes", "verified", "measured"),
    [
        ({"bases": (5_000.0, 10_000.0)}, 1, 2),
        ({"threads": 1}, 1, 2),
        ({"slots": 2}, 1, 2),
        ({"cache_type_k": "f32"}, 2, 2),
        ({"gpu_layers": -1}, 2, 2),
        ({"context_size": 1024}, 1, 1),
    ],
    ids=str,
)
def test_other_circumstances_are_found_out_anew(tiny: Model, changes: Any, verified: int, measured: int) -> None:
    counted = Counted()
    settings = {**changes}
    with open_model(tiny.path, settings.pop("gpu_layers", 0)) as other:
        choose(tiny, *config(), counted.verify, counted.measure)
        choose(other, *config(**settings), counted.verify, counted.measure)
    assert (counted.verified, counted.measured) == (verified, measured)


def test_the_slower_or_refused_engine_is_not_taken(tiny: Model) -> None:
    slower = Counted(speeds=Speeds(1.0, 2.0))
    assert choose(tiny, *config(), slower.verify, slower.measure).kind == "contexts"
    assert choose(tiny, *config(engine="fused"), slower.verify, slower.measure).kind == "fused"
    for file in engines_directory().iterdir():
        file.unlink()
    refused = Counted(Verdict((0.5,), 0.1, "it is wrong"))
    choice = choose(tiny, *config(), refused.verify, refused.measure)
    assert (choice.kind, choice.reason) == ("contexts", "the fused engine refuses itself: it is wrong")
    assert refused.measured == 0


def test_contexts_and_single_buckets_need_no_probe(tiny: Model) -> None:
    counted = Counted()
    for changes in ({"engine": "contexts"}, {"bases": (10_000.0,)}, {"bases": (10_000.0, 10_000.0)}):
        assert choose(tiny, *config(**changes), counted.verify, counted.measure).kind == "contexts"
    assert (counted.verified, counted.measured) == (0, 0)


def test_a_model_that_cannot_be_fused_is_decoded_in_contexts(tmp_path: Path) -> None:
    for path in (
        write_tiny_model(tmp_path / "mrope.gguf", architecture="qwen2vl"),
        write_tiny_mamba(tmp_path / "mamba.gguf"),
    ):
        with open_model(path) as model:
            choice = choose(model, *config())
            with pytest.raises(UnsupportedModelError):
                choose(model, *config(engine="fused"))
        assert choice.kind == "contexts"
        assert "M-RoPE" in choice.reason or "recurrent" in choice.reason


def test_a_measurement_that_fails_means_contexts(tiny: Model) -> None:
    def failing(_model: Model, _context: ContextConfig, _buckets: Buckets) -> Speeds:
        raise NativeError("no memory")

    choice = choose(tiny, *config(), Counted().verify, failing)
    assert (choice.kind, choice.reason) == ("contexts", "no memory")


def test_a_trial_that_takes_too_long_is_put_off_to_another_day(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = choose(tiny, *config(), seconds=0.0)
    assert (choice.kind, choice.reason) == ("contexts", "trying the fused engine takes more than 0 s here")
    counted = Counted()
    said: list[str] = []
    assert choose(tiny, *config(), counted.verify, counted.measure, said.append).kind == "contexts"
    # Who measures anyway, or asks for the engine, is not put off.
    assert choose(tiny, *config(), counted.verify, counted.measure, seconds=math.inf).kind == "fused"
    assert (counted.verified, counted.measured, said) == (1, 1, [])
    choose(tiny, *config(threads=1), seconds=0.0)
    later = time.time() + 25 * 3600
    monkeypatch.setattr(choose_module, "time", lambda: later)
    assert choose(tiny, *config(threads=1), counted.verify, counted.measure, said.append).kind == "fused"
    assert said == ["measuring which engine is faster (once for this model and number of buckets); Ctrl-C skips it"]


@pytest.mark.parametrize("seconds", [0.05, 0.3])
def test_a_trial_ends_in_time(tiny: Model, seconds: float) -> None:
    # The measurement alone would take longer.
    choice = choose(tiny, *config(), Counted().verify, seconds=seconds)
    assert (choice.kind, choice.reason) == ("contexts", f"trying the fused engine takes more than {seconds} s here")


def test_what_is_being_computed_is_cancelled_when_the_time_is_over() -> None:
    cancelled = threading.Event()

    def compute(patience: Patience, *, wait: bool) -> None:
        with patience.cancelling(cancelled.set):
            assert not wait or cancelled.wait(60)
            raise CancelledError

    with pytest.raises(OutOfTimeError, match="work takes more than"):
        compute(Patience("work", 0.05), wait=True)
    # Cancelled by somebody else.
    with pytest.raises(CancelledError):
        compute(Patience("work", 60.0), wait=False)


def test_ctrl_c_skips_the_trial(tiny: Model) -> None:
    def interrupted(*_: object) -> Speeds:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        raise AssertionError

    choice = choose(tiny, *config(), Counted().verify, interrupted)
    assert (choice.kind, choice.reason) == ("contexts", "the trial was skipped")
    counted = Counted()
    assert choose(tiny, *config(), counted.verify, counted.measure).kind == "contexts"
    assert counted.measured == 0
    for file in engines_directory().iterdir():
        file.unlink()
    with pytest.raises(KeyboardInterrupt):
        choose(tiny, *config(engine="fused"), interrupted)


def test_damaged_files_are_written_again(tiny: Model) -> None:
    counted = Counted()
    for content in ("", "[]", "{}", '{"fused": "x", "floor": [], "divergences": 3}', "\x00" * 50, "[" * 100_000):
        choose(tiny, *config(), counted.verify, counted.measure)
        for file in engines_directory().iterdir():
            file.write_text(content)
    choose(tiny, *config(), counted.verify, counted.measure)
    assert (counted.verified, counted.measured) == (7, 7)
    for file in engines_directory().iterdir():
        assert json.loads(file.read_text())


def test_an_unwritable_home_costs_nothing_but_the_measurement(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ABCLI_HOME", str(tmp_path / "file"))
    counted = Counted()
    for _ in range(2):
        assert choose(tiny, *config(), counted.verify, counted.measure).kind == "fused"
    assert counted.measured == 2


def test_the_measurement_decodes_with_both(tiny: Model) -> None:
    speeds = measure_engines(tiny, *config(slots=2))
    assert np.isfinite([speeds.fused, speeds.contexts]).all()
    assert min(speeds.fused, speeds.contexts) > 0


@pytest.mark.parametrize(("kind", "wanted"), [("fused", FusedBackend), ("contexts", ContextsBackend)])
def test_opening_makes_the_chosen_engine(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, wanted: type
) -> None:
    warnings: list[str] = []
    with open_engine(checked_model(tiny_model), *config(engine=kind), warnings.append) as opened:
        assert isinstance(opened.engine._backend, wanted)
        assert opened.engine_choice.kind == kind
        opened.engine.prefill(0, [1, 2, 3])
    chosen = replace(opened.engine_choice, reason="measured")
    monkeypatch.setattr(opening, "choose", lambda *_, **__: chosen)
    with open_engine(checked_model(tiny_model), *config(), warnings.append) as opened:
        assert isinstance(opened.engine._backend, wanted)
        assert opened.engine_choice.reason == "measured"
    assert warnings == []
