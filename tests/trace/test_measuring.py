"""Attention by distance on text, and what it has to do with the wave."""

from __future__ import annotations

import json

import numpy as np
import pytest

from abcli.config import ContextConfig
from abcli.errors import UsageError
from abcli.native.llama import CancelFlag
from abcli.trace.attention import read_attention
from abcli.trace.measuring import common_text, measurer, ripple_correlation
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
    found, chance = ripple_correlation(wave, follows)
    assert found > 0.8
    assert chance <= 0.01
    alone, by_chance = ripple_correlation(wave, np.exp(-distances / 300 + random.normal(size=800)))
    assert abs(alone) < 0.3
    assert by_chance > 0.01
    assert ripple_correlation(np.ones(10), np.ones(10)) == (0.0, 1.0)


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
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert call(arguments) == 0
    assert "upper quartile" in capsys.readouterr().out
    for wrong in (["--measure", "--search", "2"], ["--texts", "2"], ["--measure", "-c", "8"]):
        assert call(["waves", str(tiny_model), *wrong]) == 2
