"""Leaving out tokens that cannot be chosen changes no choice."""

from __future__ import annotations

import math
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.native import sampler as sampler_module
from abcli.native.candidates import enough_candidates, likeliest
from abcli.native.sampler import SamplerChain
from abcli.sampling import SamplingConfig
from tests.support.models import open_model
from tests.support.tiny_gguf import write_tiny_model

VOCABULARY = 60_000
NEEDS_ALL = [
    SamplingConfig(mirostat=2),
    SamplingConfig(dry_multiplier=0.5),
    SamplingConfig(top_n_sigma=1.0),
    SamplingConfig(repeat_penalty=0.9),
    SamplingConfig(presence_penalty=-1.0),
    SamplingConfig(top_k=0),
    SamplingConfig(top_k=0, temperature=0.0, typical_p=0.5),
    SamplingConfig(top_k=0, temperature=0.0, xtc_probability=0.5),
    SamplingConfig(top_k=5_000),
    SamplingConfig(repeat_penalty=1.1, repeat_last_n=4096),
]


@pytest.mark.parametrize("config", NEEDS_ALL)
def test_settings_that_may_choose_any_token_see_all(config: SamplingConfig) -> None:
    assert enough_candidates(config, max(0, config.repeat_last_n), 0, VOCABULARY) == 0


def test_penalties_and_biases_need_as_many_more() -> None:
    config = SamplingConfig(top_k=7)
    assert enough_candidates(config, 30, 2, VOCABULARY) == 9
    assert enough_candidates(SamplingConfig(top_k=7, repeat_penalty=1.1), 20, 2, VOCABULARY) == 29
    assert enough_candidates(SamplingConfig(top_k=0, temperature=0.0), 30, 0, VOCABULARY) == 1


@given(st.integers(1, 30), st.integers(4_000, 5_000), st.integers(0, 10_000), st.booleans())
@settings(max_examples=50, deadline=None)
def test_the_likeliest_are_all_there(count: int, size: int, seed: int, tied: bool) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=size).astype(np.float32)
    if tied:
        logits = np.round(logits)
    logits[random.integers(0, size, 100)] = -np.inf
    smallest = np.sort(logits)[-count]
    tokens = likeliest(logits, count)
    assert set(np.flatnonzero(logits >= smallest)) <= set(tokens)
    assert np.array_equal(tokens, np.unique(tokens))
    # It is of no use if it leaves out next to nothing.
    assert tied or len(tokens) < size / 8


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(seed=3),
        SamplingConfig(temperature=0.0),
        SamplingConfig(temperature=0.0, top_k=0),
        SamplingConfig(seed=3, top_k=5, repeat_penalty=1.5, repeat_last_n=20, frequency_penalty=0.3),
        SamplingConfig(seed=3, top_k=4, logit_bias=((77, 30.0), (78, -math.inf), (5, -3.0))),
        SamplingConfig(seed=3, typical_p=0.6, xtc_probability=0.5, min_p=0.01),
    ],
    ids=repr,
)
def test_the_chain_chooses_as_from_all(config: SamplingConfig, tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    steps = [random.normal(0, 3, VOCABULARY).astype(np.float32) for _ in range(20)]
    # The same few tokens lead each time, so that penalties have something to lower.
    for logits in steps:
        logits[100:130] += 9
    with open_model(write_tiny_model(tmp_path / "tiny.gguf", vocabulary_size=VOCABULARY, layers=1)) as model:
        with SamplerChain(model, config) as chain:
            assert chain._enough
            found = [chain.sample(logits) for logits in steps]
        with (
            patch.object(sampler_module, "enough_candidates", lambda *_: 0),
            SamplerChain(model, config) as chain,
        ):
            assert found == [chain.sample(logits) for logits in steps]
