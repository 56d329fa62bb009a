"""Attention by distance on text, and what it has to do with the wave."""

from __future__ import annotations

import json

import numpy as np
import pytest

from abcli.config import ContextConfig
from abcli.errors import UsageError
from abcli.native.llama import CancelFlag
from abcli.trace.attention import read_attention
from abcli.trace.measuring import (
    common_text,
    measured,
    measurer,
    ripple_chance,
    ripple_correlation,
    trough_meeting,
)
from tests.support.models import open_model

WAVES = np.ones((1, 64))


def test_a_measurement_is_that_of_each_row(tiny_model):
    text = "the house on the hill " * 40
    with measurer(tiny_model) as model:
        found = model.measure(text, 64, 2, (10000.0,), WAVES)
        with pytest.raises(UsageError, match="tokens, but 99 parts"):
            model.measure(text, 64, 99, (10000.0,), WAVES)
    assert (found.texts, found.rows) == (2, 16)
    with open_model(tiny_model) as model:
        tokens = model.tokenize(text, add_special=False, parse_special=False)
        before = model.tokenize("", add_special=True, parse_special=False)
        length = 64 - len(before)
        weights = []
        heads = ()
        for start in (0, len(tokens) - length):
            part = [*before, *tokens[start : start + length]]
            reading = read_attention(
                model, ContextConfig(context_size=64), (10000.0,), part, 48, heads=heads, cancel=CancelFlag()
            )
            heads = reading.heads
            weights += [reading.weights[0, row, 48 + row - 10] for row in range(16)]
    assert found.heads == heads
    (base,) = found.bases
    assert len(base.mean) == 47
    assert base.mean[9] == pytest.approx(np.mean(weights), rel=1e-4)
    assert base.upper[9] == pytest.approx(np.quantile(weights, 0.75), rel=1e-4)


def test_ripples_that_go_together_are_told_from_those_that_do_not():
    distances = np.arange(800)
    random = np.random.default_rng(3)
    wave = 1 / (1 + distances / 100) + 0.1 * np.convolve(random.normal(size=810), np.ones(11) / 11, "valid")[:800]
    follows = np.exp(-distances / 300 + 3 * wave + 0.05 * random.normal(size=800))
    assert ripple_correlation(wave, follows) > 0.8
    assert ripple_chance(wave, follows) <= 0.01
    alone = np.exp(-distances / 300 + random.normal(size=800))
    assert abs(ripple_correlation(wave, alone)) < 0.3
    assert ripple_chance(wave, alone) > 0.01
    assert ripple_correlation(np.ones(10), np.ones(10)) == 0.0
    assert ripple_chance(np.ones(800), follows) == 1.0


def test_troughs_that_meet_are_told_from_those_that_do_not():
    distances = np.arange(800)
    wave = 1 + np.cos(2 * np.pi * distances / 80)
    met = trough_meeting(wave, np.exp(-distances / 300 + 0.1 * np.roll(wave, 2)))
    assert met.together == met.count >= 8
    assert 0.05 < met.by_chance < 0.15
    missed = trough_meeting(wave, np.exp(-distances / 300 + 0.1 * np.roll(wave, 40)))
    assert (missed.together, missed.count) == (0, met.count)


def test_errors_are_the_jackknifes():
    random = np.random.default_rng(1)
    wave = np.convolve(random.normal(size=310), np.ones(11) / 11, "valid")
    weights = np.exp(2 * wave + random.normal(size=(3, 20, 300))).astype(np.float32)
    waves = np.stack([wave, -wave])
    found = measured(10000.0, weights, waves, 0)
    without = [
        ripple_correlation(
            wave, np.median(weights[[text for text in range(3) if text != out]].reshape(-1, 300), axis=0)
        )
        for out in range(3)
    ]
    assert found.ripples[0].error == pytest.approx(np.sqrt(2 / 3 * ((without - np.mean(without)) ** 2).sum()), rel=1e-3)
    assert found.ripples[0].correlation == pytest.approx(-found.ripples[1].correlation)
    assert found.median == pytest.approx(np.median(weights.reshape(-1, 300), axis=0), rel=1e-5)
    assert measured(10000.0, weights[:1], waves, 0).ripples[0].error is None


def test_there_is_real_text_to_measure_on():
    assert len(common_text()) > 200_000
    assert common_text() == common_text()


def test_the_command_measures(tiny_model, tmp_path, capsys):
    from abcli.cli.main import call

    text = tmp_path / "text.txt"
    text.write_text("the house on the hill " * 40)
    arguments = ["waves", str(tiny_model), "--measure", "-c", "64", "--texts", "1", "--text", str(text), "-k", "2"]
    assert call([*arguments, "--json", "--png", str(tmp_path / "a.png")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [len(base["mean"]) for base in told["bases"]] == [47, 47]
    bases = [base["base"] for base in told["bases"]]
    assert [[one["wave"] for one in base["ripples"]] for base in told["bases"]] == [bases, bases]
    assert set(told["bases"][0]["troughs"]) == {"together", "count", "by_chance"}
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert call(arguments) == 0
    shown = capsys.readouterr().out
    assert "upper quartile" in shown
    assert "wave of 2" in shown
    assert "█" not in shown
    assert call([*arguments, "--plot"]) == 0
    plotted = capsys.readouterr().out
    assert plotted.startswith(shown)
    # Theory above measurement, along the same axis.
    first, second = plotted[len(shown) :].split("attention (median)")
    assert "█" in first
    assert "█" in second
    assert first.splitlines()[-2].split() == second.splitlines()[-1].split() == ["1", "24", "47"]
    for wrong in (["--measure", "--search", "2"], ["--texts", "2"], ["--measure", "-c", "8"]):
        assert call(["waves", str(tiny_model), *wrong]) == 2
