"""`abcli waves`: the table, the JSON, the figures, the searches and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abcli.rope.frequencies import RopeParameters, angular_frequencies
from abcli.rope.waveform import waveform
from tests.cli.conftest import Command
from tests.cli.pseudo_terminal import PseudoTerminal
from tests.support.tiny_gguf import write_tiny_mamba, write_tiny_model

SIZE = ("-c", 512)


def report(abcli: Command, *arguments: object) -> dict[str, Any]:
    """What --json prints."""
    outcome = abcli("waves", "--json", *arguments)
    assert (outcome.code, outcome.errors) == (0, b"")
    assert outcome.output.count(b"\n") == 1
    found: dict[str, Any] = json.loads(outcome.output)
    return found


def shares(parameters: RopeParameters, base: float, length: int) -> np.ndarray:
    """The wave of one base, divided by its value at distance 0."""
    wave = waveform(angular_frequencies(parameters, base), np.arange(length))
    return wave / wave[0]


def test_json_has_the_documented_keys_and_the_right_numbers(tiny_model: Path, abcli: Command) -> None:
    found = report(abcli, tiny_model, *SIZE, "--multipliers", "0.5,1,2")
    assert set(found) == {
        *("model", "native_base", "context", "pairs", "value_at_zero", "extrema_radius", "search", "native"),
        *("buckets", "envelope", "deepest_trough"),
    }
    assert (found["model"], found["native_base"], found["context"]) == (str(tiny_model), 10000.0, 512)
    assert found["search"] is None
    parameters = RopeParameters(2 * found["pairs"], neox=False)
    waves = np.array([shares(parameters, base, 512) for base in (5000.0, 10000.0, 20000.0)])
    assert found["value_at_zero"] == (found["pairs"] + 1) / 2
    for bucket, wave, multiplier in zip(found["buckets"], waves, (0.5, 1.0, 2.0), strict=True):
        assert (bucket["multiplier"], bucket["base"]) == (multiplier, 10000.0 * multiplier)
        assert bucket["lowest"] == pytest.approx(wave.min())
        assert bucket["lowest_at"] == wave.argmin()
        assert bucket["mean"] == pytest.approx(wave.mean())
        assert all(wave[at] < wave[at - 1] and wave[at] <= wave[at + 1] for at in bucket["troughs"])
        assert all(wave[at] > wave[at - 1] and wave[at] >= wave[at + 1] for at in bucket["peaks"])
        assert bucket["troughs"]
    assert found["native"] == {key: found["buckets"][1][key] for key in found["native"]}
    assert found["envelope"]["lowest"] == pytest.approx(waves.max(axis=0).min())
    assert found["deepest_trough"] == {"before": found["native"]["lowest"], "after": found["envelope"]["lowest"]}


def test_one_bucket_changes_nothing(tiny_model: Path, abcli: Command) -> None:
    found = report(abcli, tiny_model, *SIZE, "-k", 1)
    assert found["envelope"] == found["native"]


def test_the_trained_length_is_the_default(tmp_path: Path, abcli: Command) -> None:
    model = write_tiny_model(tmp_path / "short.gguf", context_length=333)
    assert report(abcli, model)["context"] == 333
    assert report(abcli, model, "-c", 0)["context"] == 333


def test_scaling_and_factors_enter_the_wave(tmp_path: Path, abcli: Command) -> None:
    plain = write_tiny_model(tmp_path / "plain.gguf")
    pairs = report(abcli, plain, *SIZE)["pairs"]
    factors = tuple(1.0 + pair for pair in range(pairs))
    longer = write_tiny_model(tmp_path / "factors.gguf", rope_factors=factors)
    scaled = write_tiny_model(
        tmp_path / "scaled.gguf",
        metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
    )
    for model, parameters in (
        (longer, RopeParameters(2 * pairs, neox=False, factors=factors)),
        (scaled, RopeParameters(2 * pairs, neox=False, frequency_scale=0.25)),
    ):
        wave = shares(parameters, 10000.0, 512)
        assert report(abcli, model, *SIZE)["native"]["lowest"] == pytest.approx(wave.min())


def test_the_table_has_a_row_for_each_bucket_and_the_envelope(tiny_model: Path, abcli: Command) -> None:
    found = report(abcli, tiny_model, *SIZE, "--multipliers", "0.5,1,2")
    outcome = abcli("waves", tiny_model, *SIZE, "--multipliers", "0.5,1,2")
    assert (outcome.code, outcome.errors) == (0, b"")
    lines = outcome.text.splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("multiple "))
    rows = lines[head + 1 : head + 5]
    assert [row.split()[0] for row in rows] == ["0.5", "1", "2", "envelope"]
    assert [row.split()[-1] for row in rows[:3]] == [f"{bucket['mean']:.1%}" for bucket in found["buckets"]]
    assert "(native)" in rows[1]
    before, after = found["deepest_trough"]["before"], found["deepest_trough"]["after"]
    assert lines[head + 5 :] == [f"deepest trough: {before:.1%} (native base alone) -> {after:.1%} (3 buckets)"]


def test_a_native_base_outside_the_set_is_shown_and_not_in_the_envelope(tiny_model: Path, abcli: Command) -> None:
    bases = ("--bases", "10500,15000")
    outcome = abcli("waves", tiny_model, *SIZE, *bases)
    assert "native, unused" in outcome.text
    found = report(abcli, tiny_model, *SIZE, *bases)
    assert found["native"] == report(abcli, tiny_model, *SIZE, "-k", 1)["native"]
    waves = np.array([shares(RopeParameters(2 * found["pairs"], neox=False), base, 512) for base in (10500, 15000)])
    assert found["envelope"]["lowest"] == pytest.approx(waves.max(axis=0).min())


@pytest.mark.parametrize("objective", ["paper", "envelope"])
def test_a_search_finds_bases_with_the_native_one_among_them(tiny_model: Path, abcli: Command, objective: str) -> None:
    search = ("--search", 4, "--objective", objective, "--range", "0.8,1.6", "--candidates", 17)
    found = report(abcli, tiny_model, *SIZE, *search)
    multipliers = [bucket["multiplier"] for bucket in found["buckets"]]
    assert len(multipliers) == 4
    assert multipliers == sorted(multipliers)
    assert 1.0 in multipliers
    assert all(0.8 - 1e-6 <= multiplier <= 1.6 + 1e-6 for multiplier in multipliers)
    assert found["search"] == {"count": 4, "objective": objective, "low": 0.8, "high": 1.6, "candidates": 17}
    # What the table says to use gives the same set.
    line = abcli("waves", tiny_model, *SIZE, *search).text.splitlines()[-1]
    again = report(abcli, tiny_model, *SIZE, *line.partition("use it with: ")[2].split())
    assert again["buckets"] == found["buckets"]


def test_the_envelope_objective_lifts_the_deepest_trough_more(tiny_model: Path, abcli: Command) -> None:
    after = {
        objective: report(abcli, tiny_model, *SIZE, "--search", 3, "--objective", objective)["deepest_trough"]["after"]
        for objective in ("paper", "envelope")
    }
    before = report(abcli, tiny_model, *SIZE)["deepest_trough"]["before"]
    assert before < after["paper"] <= after["envelope"]


def test_plots_only_where_asked_for_or_on_a_terminal(
    tiny_model: Path, abcli: Command, terminal: Callable[..., PseudoTerminal]
) -> None:
    assert "█" not in abcli("waves", tiny_model, *SIZE).text
    assert "█" in abcli("waves", tiny_model, *SIZE, "--plot").text
    shown, code = terminal("waves", tiny_model, *SIZE).until_end()
    assert code == 0
    assert "█" in shown
    # The last line of the plot is the horizontal axis, as wide as the terminal at most.
    assert max(map(len, shown.splitlines())) <= 120
    assert shown.rstrip().endswith("511")
    hidden, code = terminal("waves", tiny_model, *SIZE, "--no-plot").until_end()
    assert (code, "█" in hidden) == (0, False)


def test_figures_are_written(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    png, svg = tmp_path / "waves.png", tmp_path / "waves.svg"
    outcome = abcli("waves", tiny_model, *SIZE, "--png", png, "--svg", svg)
    assert (outcome.code, outcome.errors) == (0, b"")
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    assert b"<svg" in svg.read_bytes()


@pytest.mark.parametrize("flag", ["--png", "--svg"])
def test_a_figure_without_matplotlib_is_refused(
    tiny_model: Path, abcli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    # What Python itself stores for a module that must not be imported.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = abcli("waves", tiny_model, flag, tmp_path / "figure")
    assert outcome.code == 2
    assert outcome.problem() == (f"{flag} needs matplotlib, which is not installed", "pip install 'abcli[plot]'")
    assert outcome.output == b""
    assert not (tmp_path / "figure").exists()


def test_a_figure_that_cannot_be_written(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    outcome = abcli("waves", tiny_model, *SIZE, "--png", tmp_path / "nowhere" / "waves.png")
    assert (outcome.code, outcome.output) == (1, b"")
    assert "waves.png" in outcome.problem()[0]


@pytest.mark.parametrize("architecture", ["gpt2", "bloom", "mamba"])
def test_a_model_without_rope_is_refused(abcli: Command, tmp_path: Path, architecture: Any) -> None:
    path = tmp_path / "model.gguf"
    if architecture == "mamba":
        write_tiny_mamba(path)
    else:
        write_tiny_model(path, architecture=architecture)
    outcome = abcli("waves", path)
    assert outcome.code == 1
    assert outcome.problem()[0] == f"{path} ({architecture}) does not use RoPE"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--search", 1), "--search 1"),
        (("--search", 17), "--search 17"),
        (("--search", 4, "--range", "1"), "--range 1"),
        (("--search", 4, "--range", "2,1"), "--range 2,1"),
        (("--search", 4, "--range", "0,1"), "--range 0,1"),
        (("--search", 4, "--range", "a,b"), "--range"),
        (("--search", 4, "--range", "1,1e36"), "1e+40"),
        (("--search", 4, "--range", "1e-5,1"), "0.1"),
        (("--search", 4, "--candidates", 3), "--candidates 3"),
        (("--search", 4, "--candidates", 10**6), "1000001 bases over 4096 tokens"),
        (("--search", 4, "--objective", "luck"), "--objective"),
        (("--objective", "paper"), "--objective paper"),
        (("--range", "1,2"), "--range 1,2"),
        (("--candidates", 9), "--candidates 9"),
        (("--search", 4, "-k", 4), "--buckets 4"),
        (("--search", 4, "--bases", "10000"), "--bases 10000"),
        (("--search", 4, "--multipliers", "1,2"), "--multipliers 1,2"),
        (("--search", 4, "--spread", "paper"), "--spread paper"),
        (("--merge", "mean"), "--merge mean"),
        (("-k", 0), "0 buckets"),
        (("--bases", "0.5"), "0.5"),
        (("-c", 1), "--ctx-size 1"),
        (("-c", -1), "--ctx-size -1"),
        (("-c", 2**31), f"--ctx-size {2**31}"),
        (("-c", 2**30), "7 bases over 1073741824 tokens"),
        (("-m", "other.gguf"), "two models"),
    ],
)
def test_wrong_usage(tiny_model: Path, abcli: Command, arguments: tuple[object, ...], message: str) -> None:
    outcome = abcli("waves", tiny_model, *arguments)
    assert (outcome.code, outcome.output) == (2, b"")
    problem, hint = outcome.problem()
    assert message in problem
    assert hint


def test_a_missing_model(abcli: Command, tmp_path: Path) -> None:
    outcome = abcli("waves", tmp_path / "none.gguf")
    assert (outcome.code, outcome.output) == (1, b"")
    assert "none.gguf" in outcome.problem()[0]


def test_the_default_model(real_model: Path, abcli: Command) -> None:
    found = report(abcli)
    assert (Path(found["model"]).name, found["context"]) == (real_model.name, 8192)
    assert found["deepest_trough"]["before"] == pytest.approx(0.10004, abs=1e-5)
    assert found["deepest_trough"]["after"] > 1.5 * found["deepest_trough"]["before"]
