"""Sampling under a grammar or a JSON schema."""

import json
import math
from dataclasses import replace

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest

from abcli.errors import GrammarError
from abcli.native import sampler as sampler_module
from abcli.native.sampler import SamplerChain
from abcli.sampling import SamplingConfig
from tests.native.common import GREEDY, PLAIN, random_logits, sample_many
from tests.support.models import open_model


def generate(model, config, count=80, seed=0):
    """The text of an answer to random logits, and whether it ended by itself."""
    text = b""
    with SamplerChain(model, config) as chain:
        for step in range(count):
            token = chain.sample(random_logits(model, 1000 * seed + step))
            if model.is_end(token):
                return text.decode(), True
            text += model.piece(token)
    return text.decode(), False


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_grammar_is_followed_and_then_only_the_end_is_allowed(model, temperature):
    config = SamplingConfig(seed=1, temperature=temperature, grammar='root ::= "yes" | "no" " way"?')
    answers = {generate(model, config, seed=seed) for seed in range(10)}
    assert answers <= {("yes", True), ("no", True), ("no way", True)}
    assert len(answers) > 1


def test_grammar_changes_nothing_where_it_allows_everything(model):
    logits = random_logits(model, 3)
    for letter in "bcdfghjk":
        logits[model.tokenize(letter, add_special=False, parse_special=False)[-1]] = 50
    free = sample_many(model, SamplingConfig(seed=2), logits, 30)
    assert sample_many(model, SamplingConfig(seed=2, grammar="root ::= .*"), logits, 30) == free
    assert len(set(free)) > 3


def test_grammar_finds_the_only_token_however_improbable(model):
    logits = np.full(model.vocabulary_size, 100.0, np.float32)
    token = model.tokenize("z", add_special=False, parse_special=False)[-1]
    logits[token] = -1e30
    assert sample_many(model, SamplingConfig(grammar='root ::= "z"'), logits, 1) == [token]


def test_grammar_ignores_the_prompt(model):
    with SamplerChain(model, replace(GREEDY, repeat_penalty=1.1, grammar='root ::= "ab"')) as chain:
        chain.accept_prompt([1, 2, 3])
        first = chain.sample(random_logits(model, 0))
        assert model.piece(first) in (b"a", b"ab")


def test_grammar_without_a_possible_token(model):
    end = tuple((token, -math.inf) for token in range(model.vocabulary_size) if model.is_end(token))
    config = replace(GREEDY, grammar='root ::= "a"', logit_bias=end)
    with SamplerChain(model, config) as chain:
        chain.sample(random_logits(model, 0))
        with pytest.raises(GrammarError, match="no token"):
            chain.sample(random_logits(model, 1))


def test_grammar_whose_tokens_have_no_logit_left(model):
    logits = np.full(model.vocabulary_size, -np.inf, np.float32)
    logits[model.tokenize("b", add_special=False, parse_special=False)[-1]] = 0
    with SamplerChain(model, replace(GREEDY, grammar='root ::= "a"')) as chain:
        with pytest.raises(GrammarError, match="no token"):
            chain.sample(logits)
        assert model.piece(chain.sample(random_logits(model, 0))) == b"a"


def test_grammar_that_is_too_ambiguous_is_given_up(model, monkeypatch):
    monkeypatch.setattr(sampler_module, "MAX_GRAMMAR_SECONDS", -1.0)
    with (
        SamplerChain(model, replace(GREEDY, grammar='root ::= "a"')) as chain,
        pytest.raises(GrammarError, match="too many ways"),
    ):
        chain.sample(random_logits(model, 0))


def test_grammar_llama_cpp_alone_refuses(model):
    with pytest.raises(GrammarError, match="refuses"):
        SamplerChain(model, replace(PLAIN, grammar='root ::= ("x"?)?*'))


@pytest.mark.parametrize(
    ("text", "name"), [('root ::= root | "x"', "root"), ('root ::= "y" a\na ::= b | "x"\nb ::= a', "a")]
)
def test_left_recursion_is_told_by_the_name_of_a_rule(model, text, name):
    with pytest.raises(GrammarError) as caught:
        SamplerChain(model, SamplingConfig(grammar=text))
    assert f"the rule {name!r} begins with itself" in caught.value.message
    assert "index" not in caught.value.message


SCHEMA = {
    "type": "object",
    "properties": {
        'the "name"\n\\ é': {"type": "string", "maxLength": 8},
        "kind": {"enum": ['a"b', "c\\d", "é\n", 1.5, None]},
        "tags": {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 3},
        "any": {"type": "array", "items": {"type": "string", "pattern": "^[a-c]{2,3}.?$"}, "maxItems": 2},
    },
    "required": ['the "name"\n\\ é', "kind", "tags", "any"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("seed", range(5))
def test_json_schema_makes_json(model, seed):
    config = SamplingConfig(seed=seed, json_schema=json.dumps(SCHEMA))
    text, ended = generate(model, config, count=400, seed=seed)
    answer = json.loads(text)
    assert ended
    assert set(answer) == set(SCHEMA["required"])
    assert len(answer['the "name"\n\\ é']) <= 8
    assert answer["kind"] in SCHEMA["properties"]["kind"]["enum"]
    assert all(isinstance(tag, int) for tag in answer["tags"])
    assert 1 <= len(answer["tags"]) <= 3


def test_json_schema_on_the_real_model(real_model):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}, "people": {"type": "integer"}},
        "required": ["city", "people"],
    }
    config = SamplingConfig(seed=1, temperature=0.5, json_schema=json.dumps(schema))
    with open_model(real_model) as model:
        parameters = llama.llama_context_default_params()
        parameters.n_ctx, parameters.n_threads, parameters.n_threads_batch = 256, 1, 1
        context = llama.llama_init_from_model(model.handle, parameters)
        tokens = model.tokenize("A large city as JSON: ", add_special=True, parse_special=False)
        text = b""
        with SamplerChain(model, config, context_size=256) as chain:
            chain.accept_prompt(tokens)
            for _ in range(100):
                array = (llama.llama_token * len(tokens))(*tokens)
                assert llama.llama_decode(context, llama.llama_batch_get_one(array, len(tokens))) == 0
                pointer = llama.llama_get_logits_ith(context, -1)
                token = chain.sample(np.ctypeslib.as_array(pointer, (model.vocabulary_size,)))
                if model.is_end(token):
                    break
                text += model.piece(token)
                tokens = [token]
        llama.llama_free(context)
    answer = json.loads(text)
    assert isinstance(answer["city"], str)
    assert isinstance(answer["people"], int)
