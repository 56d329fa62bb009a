"""How sure a distribution is of its next token, after all that moves logits, against numpy."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from abcli.errors import NativeError
from abcli.native.sampler import SamplerChain
from abcli.sampling import SamplingConfig
from tests.native.common import GREEDY, PLAIN, random_logits


def likeliest(logits):
    shifted = np.exp(logits.astype(np.float64) - logits.max())
    return shifted.max() / shifted.sum()


def token_of(model, letter):
    return model.tokenize(letter, add_special=False, parse_special=False)[-1]


@pytest.mark.parametrize("changes", [{}, {"top_k": 1, "top_p": 0.1, "min_p": 0.5, "temperature": 9.0}, {"mirostat": 2}])
def test_truncation_and_temperature_have_no_say(model, changes):
    logits = random_logits(model, 1)
    with SamplerChain(model, replace(PLAIN, **changes)) as chain:
        assert chain.confidence(logits) == pytest.approx(likeliest(logits), rel=1e-4)


def test_biases_and_penalties_have(model):
    logits = random_logits(model, 2)
    first, second = np.argsort(logits)[[-1, -2]]
    moved = logits.copy()
    moved[first] = -np.inf
    with SamplerChain(model, replace(PLAIN, logit_bias=((int(first), -math.inf),))) as chain:
        assert chain.confidence(logits) == pytest.approx(likeliest(moved), rel=1e-4)
    moved = logits.copy()
    moved[second] -= 3.0
    with SamplerChain(model, replace(PLAIN, presence_penalty=3.0)) as chain:
        chain.accept_prompt([int(second)])
        assert chain.confidence(logits) == pytest.approx(likeliest(moved), rel=1e-4)


@pytest.mark.parametrize("way", ["grammar", "regex"])
def test_what_may_not_come_does_not_count(model, way):
    logits = random_logits(model, 3, scale=1.0)
    yes, no, forbidden = (token_of(model, letter) for letter in "yxz")
    logits[[yes, no, forbidden]] = 20.0, 19.0, 30.0
    config = replace(GREEDY, **({"grammar": 'root ::= "y" | "x"'} if way == "grammar" else {"regex": "y|x"}))
    with SamplerChain(model, config) as chain:
        assert chain.confidence(logits) == pytest.approx(1 / (1 + math.exp(-1.0)), abs=1e-3)
        assert chain.sample(logits) == yes


def test_a_single_possible_token_is_certain(model):
    schema = json.dumps({"const": {"a": 1}})
    with SamplerChain(model, SamplingConfig(json_schema=schema)) as chain:
        assert chain.confidence(random_logits(model, 4)) > 0
    with SamplerChain(model, replace(PLAIN, regex="y")) as chain:
        assert chain.confidence(random_logits(model, 4)) == 1.0


def test_nothing_left_is_not_certain(model):
    everything = tuple((token, -math.inf) for token in range(model.vocabulary_size))
    with SamplerChain(model, replace(PLAIN, logit_bias=everything)) as chain:
        assert chain.confidence(random_logits(model, 5)) == 0.0


def test_it_changes_nothing(model):
    config = SamplingConfig(seed=5, repeat_penalty=1.3)
    with SamplerChain(model, config) as plain, SamplerChain(model, config) as asked:
        for step in range(20):
            logits = random_logits(model, step)
            asked.confidence(logits)
            assert plain.sample(logits) == asked.sample(logits)


def test_numbers_that_are_none_are_refused(model):
    logits = random_logits(model, 6)
    logits[3] = np.nan
    with SamplerChain(model, PLAIN) as chain, pytest.raises(NativeError, match="largest logit"):
        chain.confidence(logits)
