"""Which sampler settings are refused before llama.cpp sees them."""

import math
from dataclasses import replace

import pytest

from abcli.errors import UsageError
from abcli.native.sampler import SamplerChain
from abcli.sampling import SETTINGS, SamplingConfig, check_sampling
from tests.native.common import PLAIN, random_logits, sample_many

BAD_SETTINGS = [
    *({name: math.nan} for name in SETTINGS),
    *({name: value} for name in ("temperature", "mirostat_tau", "dry_base") for value in (math.inf, -math.inf)),
    *({name: value} for name in ("top_p", "min_p", "typical_p", "xtc_probability") for value in (-0.1, 1.1)),
    {"temperature": 1e-9},
    {"top_k": 2**31},
    {"top_k": -2},
    {"xtc_threshold": -1},
    {"dry_multiplier": -0.1},
    {"dry_base": 0.9},
    {"dry_allowed_length": -1},
    {"dry_penalty_last_n": -2},
    {"repeat_last_n": 2**31 - 1},
    {"repeat_penalty": 0},
    {"repeat_penalty": -1.0},
    {"frequency_penalty": 1e30},
    {"presence_penalty": -math.inf},
    {"mirostat": 1},
    {"mirostat": 3},
    {"mirostat_eta": -1},
    {"seed": 0xFFFFFFFF},
    {"seed": -5},
    {"logit_bias": ((-1, 0.0),)},
    {"logit_bias": ((320, 0.0),)},
    {"logit_bias": ((0, math.nan),)},
    {"logit_bias": ((0, math.inf),)},
    {"dry_breakers": ("",)},
    {"dry_breakers": ("a\0b",)},
    {"dry_breakers": ("\ud800",)},
    {"dry_breakers": ("é" * 21,)},
    {"dry_breakers": ("x",) * 65},
    {"grammar": "root ::= [a]", "json_schema": "{}"},
]


@pytest.mark.parametrize("change", BAD_SETTINGS, ids=str)
def test_settings_that_make_no_sense(model, change):
    with pytest.raises(UsageError) as caught:
        SamplerChain(model, replace(SamplingConfig(), **change))
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_settings_at_their_limits_are_valid(model):
    for side in ("least", "largest"):
        limits = {name: type(getattr(PLAIN, name))(getattr(one, side)) for name, one in SETTINGS.items()}
        config = replace(PLAIN, **limits)
        check_sampling(config, 320)
        logits = random_logits(model, 0)
        # Penalties over 2^24 tokens would only take memory here.
        small = replace(config, repeat_last_n=min(64, config.repeat_last_n), dry_penalty_last_n=0)
        assert all(0 <= token < 320 for token in sample_many(model, small, logits, 5))
