"""The sampler chain against llama.cpp's own samplers, and against numpy where that is easy."""

import ctypes
import math
import subprocess
import sys
from dataclasses import replace

import llama_cpp.llama_cpp as llama
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.errors import NativeError
from abcli.native.sampler import SamplerChain
from abcli.sampling import SamplingConfig
from tests.conftest import REPOSITORY
from tests.native.common import GREEDY, PLAIN, random_logits, sample_many


class Reference:
    """llama.cpp's samplers one after another over an array of C structs, without the chain."""

    def __init__(self, *samplers):
        self.samplers = samplers

    def sample(self, logits):
        entries = [llama.llama_token_data(i, float(logit), 0.0) for i, logit in enumerate(logits)]
        data = (llama.llama_token_data * len(entries))(*entries)
        array = llama.llama_token_data_array(data, len(entries), -1, False)
        for sampler in self.samplers:
            llama.llama_sampler_apply(sampler, ctypes.byref(array))
        token = array.data[array.selected].id
        self.accept([token])
        return token

    def accept(self, tokens):
        for token in tokens:
            for sampler in self.samplers:
                llama.llama_sampler_accept(sampler, token)

    def close(self):
        for sampler in self.samplers:
            llama.llama_sampler_free(sampler)


def breakers(*texts):
    return (ctypes.c_char_p * len(texts))(*(text.encode() for text in texts)), len(texts)


def default_tail(seed, temperature=0.8):
    return (
        llama.llama_sampler_init_top_k(40),
        llama.llama_sampler_init_top_p(0.95, 0),
        llama.llama_sampler_init_min_p(0.05, 0),
        llama.llama_sampler_init_temp(temperature),
        llama.llama_sampler_init_dist(seed),
    )


REFERENCES = {
    "defaults": (SamplingConfig(seed=7), lambda m: default_tail(7)),
    "penalties": (
        SamplingConfig(seed=7, repeat_penalty=1.3, repeat_last_n=5, frequency_penalty=0.2, presence_penalty=1),
        lambda m: (
            llama.llama_sampler_init_penalties(m.vocabulary_size, 5, 1.3, 0.2, 1.0),
            *default_tail(7),
        ),
    ),
    "penalties over the whole context": (
        SamplingConfig(seed=7, repeat_penalty=1.3, repeat_last_n=-1),
        lambda m: (
            llama.llama_sampler_init_penalties(m.vocabulary_size, m.trained_context, 1.3, 0.0, 0.0),
            *default_tail(7),
        ),
    ),
    "dry": (
        SamplingConfig(seed=7, dry_multiplier=0.8, dry_base=1.5, dry_allowed_length=1, dry_breakers=("\n", "é")),
        lambda m: (
            llama.llama_sampler_init_dry(m.vocabulary, 0.8, 1.5, 1, m.trained_context, *breakers("\n", "é")),
            *default_tail(7),
        ),
    ),
    "everything, in llama.cpp's order": (
        SamplingConfig(
            seed=7,
            repeat_penalty=1.1,
            dry_multiplier=0.5,
            dry_penalty_last_n=30,
            top_n_sigma=2.0,
            typical_p=0.9,
            xtc_probability=0.5,
            xtc_threshold=0.05,
            temperature=1.3,
            logit_bias=((5, 3.0), (9, -math.inf)),
        ),
        lambda m: (
            llama.llama_sampler_init_logit_bias(
                m.vocabulary_size,
                2,
                (llama.llama_logit_bias * 2)(llama.llama_logit_bias(5, 3.0), llama.llama_logit_bias(9, -math.inf)),
            ),
            llama.llama_sampler_init_penalties(m.vocabulary_size, 64, 1.1, 0.0, 0.0),
            llama.llama_sampler_init_dry(m.vocabulary, 0.5, 1.75, 2, 30, *breakers("\n", ":", '"', "*")),
            llama.llama_sampler_init_top_n_sigma(2.0),
            llama.llama_sampler_init_top_k(40),
            llama.llama_sampler_init_typical(0.9, 0),
            llama.llama_sampler_init_top_p(0.95, 0),
            llama.llama_sampler_init_min_p(0.05, 0),
            llama.llama_sampler_init_xtc(0.5, 0.05, 0, 7),
            llama.llama_sampler_init_temp(1.3),
            llama.llama_sampler_init_dist(7),
        ),
    ),
    "mirostat, which leaves out the rest": (
        SamplingConfig(seed=7, mirostat=2, mirostat_tau=3.0, mirostat_eta=0.2, repeat_penalty=2.0, top_k=1),
        lambda m: (
            llama.llama_sampler_init_temp(0.8),
            llama.llama_sampler_init_mirostat_v2(7, 3.0, 0.2),
        ),
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_same_tokens_as_llama_cpps_samplers(model, name):
    config, make = REFERENCES[name]
    prompt = [3, 4, 5, 3, 4, 5, 3, 4] * 20
    steps = [random_logits(model, seed % 7) for seed in range(60)]
    reference = Reference(*make(model))
    reference.accept(prompt)
    expected = [reference.sample(logits) for logits in steps]
    reference.close()
    with SamplerChain(model, config) as chain:
        chain.accept_prompt(prompt)
        assert [chain.sample(logits) for logits in steps] == expected
    assert len(set(expected)) > 5


def draw(generator):
    """std::uniform_real_distribution<double> over std::mt19937."""
    low, high = (int(generator.random_raw()) for _ in range(2))
    return (low + high * 2**32) / 2**64


@pytest.mark.parametrize("seed", [0, 1, 12345, 0xFFFFFFFE])
def test_default_settings_against_numpy(model, seed):
    generator = np.random.MT19937()
    generator._legacy_seeding(seed)
    config = SamplingConfig(seed=seed, temperature=0.7, top_k=30, top_p=0.9, min_p=0.02)
    with SamplerChain(model, config) as chain:
        for step in range(50):
            logits = random_logits(model, step)
            kept = np.argsort(-logits)[:30]
            p = np.exp(logits[kept] - logits[kept[0]], dtype=np.float64)
            kept = kept[: 1 + np.argmax(np.cumsum(p / p.sum()) >= 0.9)]
            kept = kept[logits[kept] >= logits[kept[0]] + math.log(0.02)]
            p = np.exp((logits[kept] - logits[kept[0]]) / 0.7, dtype=np.float64)
            token = kept[np.searchsorted(np.cumsum(p), draw(generator) * p.sum())]
            assert chain.sample(logits) == token


@given(seed=st.integers(0, 2**32 - 2), temperature=st.sampled_from([0.0, -1.0]))
@settings(max_examples=30, deadline=None)
def test_no_temperature_is_greedy(model, seed, temperature):
    logits = random_logits(model, seed)
    config = SamplingConfig(seed=seed, temperature=temperature)
    assert sample_many(model, config, logits, 2) == [int(logits.argmax())] * 2


def test_a_seed_repeats_itself_and_another_does_not(model):
    logits = random_logits(model, 0, scale=1.0)
    first, same, other = (sample_many(model, replace(PLAIN, seed=seed), logits, 20) for seed in (3, 3, 4))
    assert first == same != other


def test_seed_zero_is_a_seed_and_a_drawn_one_is_told(model):
    logits = random_logits(model, 0, scale=1.0)
    with SamplerChain(model, replace(PLAIN, seed=0)) as chain:
        assert chain.seed == 0
    with SamplerChain(model, replace(PLAIN, seed=-1)) as chain, SamplerChain(model, replace(PLAIN, seed=-1)) as b:
        assert 0 <= chain.seed < 0xFFFFFFFF
        assert chain.seed != b.seed
        drawn = [chain.sample(logits) for _ in range(20)]
        assert drawn == sample_many(model, replace(PLAIN, seed=chain.seed), logits, 20)


def test_forbidden_tokens_are_never_sampled(model):
    logits = np.full(model.vocabulary_size, -np.inf, np.float32)
    logits[[11, 200]] = 0.0
    assert set(sample_many(model, PLAIN, logits, 50)) == {11, 200}
    assert set(sample_many(model, replace(PLAIN, logit_bias=((11, -math.inf),)), logits, 20)) == {200}


def test_logit_bias_is_added(model):
    logits = random_logits(model, 0)
    assert sample_many(model, replace(GREEDY, logit_bias=((42, 100.0),)), logits, 1) == [42]


def test_repeat_penalty_divides_and_the_prompt_counts(model):
    logits = np.zeros(model.vocabulary_size, np.float32)
    logits[[7, 8]] = 3.0, 2.9
    config = replace(GREEDY, repeat_penalty=1.2, repeat_last_n=4)
    for prompt, expected in (([7], 8), ([], 7), ([7, 1, 2, 3, 4], 7)):  # 7 is out of the last four
        with SamplerChain(model, config) as chain:
            chain.accept_prompt(prompt)
            assert chain.sample(logits) == expected


def test_dry_forbids_going_on_with_a_repetition(model):
    logits = np.zeros(model.vocabulary_size, np.float32)
    logits[[70, 71]] = 3.0, 2.0
    prompt = [80, 81, 82, 70, 90, 80, 81, 82]
    config = replace(GREEDY, dry_multiplier=2.0, dry_breakers=("@",))
    for tokens, expected in ((prompt, 71), (prompt[:4], 70)):
        with SamplerChain(model, config) as chain:
            chain.accept_prompt(tokens)
            assert chain.sample(logits) == expected


def test_xtc_removes_all_but_the_last_probable_token(model):
    logits = np.zeros(model.vocabulary_size, np.float32)
    logits[[3, 4, 5]] = 12.0, 11.0, 10.0
    config = replace(PLAIN, xtc_probability=1.0, xtc_threshold=0.05)
    tokens = sample_many(model, config, logits, 30)
    assert 5 in tokens
    assert not {3, 4} & set(tokens)


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"top_k": 2}, {3, 4}),
        ({"top_p": 0.6}, {3}),
        ({"min_p": 0.2}, {3, 4}),
        ({"top_n_sigma": 1.0}, {3, 4}),
    ],
)
def test_truncation(model, change, allowed):
    logits = np.zeros(model.vocabulary_size, np.float32)
    logits[[3, 4, 5]] = 12.0, 11.0, 10.0
    assert set(sample_many(model, replace(PLAIN, **change), logits, 100)) == allowed


def test_input_is_left_alone_and_may_be_a_strided_row(model):
    table = np.random.default_rng(0).normal(size=(model.vocabulary_size, 3)).astype(np.float32)
    copy = table.copy()
    assert sample_many(model, GREEDY, table[:, 1], 1) == [int(table[:, 1].argmax())]
    np.testing.assert_array_equal(table, copy)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits(model, value):
    logits = random_logits(model, 0)
    logits[100] = value
    with SamplerChain(model, PLAIN) as chain:
        with pytest.raises(NativeError, match=str(value)):
            chain.sample(logits)
        logits[100] = 0
        assert 0 <= chain.sample(logits) < model.vocabulary_size


def test_other_wrong_input(model):
    size = model.vocabulary_size
    with SamplerChain(model, PLAIN) as chain:
        with pytest.raises(NativeError, match="-inf"):
            chain.sample(np.full(size, -np.inf, np.float32))
        with pytest.raises(NativeError, match="float64"):
            chain.sample(np.zeros(size))
        with pytest.raises(NativeError, match="shape"):
            chain.sample(np.zeros(size - 1, np.float32))
        with pytest.raises(NativeError, match=str(size)):
            chain.accept_prompt([size])
    with pytest.raises(NativeError, match="closed"):
        chain.sample(np.zeros(size, np.float32))
    chain.close()


@pytest.mark.parametrize("mirostat", [0, 2])
def test_biases_that_forbid_everything(model, mirostat):
    everything = tuple((token, -math.inf) for token in range(model.vocabulary_size))
    with (
        SamplerChain(model, replace(PLAIN, logit_bias=everything, mirostat=mirostat)) as chain,
        pytest.raises(NativeError, match="no token"),
    ):
        chain.sample(random_logits(model, 0))


def test_breakers_cut_anywhere_do_no_harm(model):
    config = replace(PLAIN, dry_multiplier=1.0, dry_breakers=("é€😀", "\n\n", "�", "a" * 40))
    assert len(sample_many(model, config, random_logits(model, 0), 5)) == 5


def test_handles_are_freed_once_also_when_construction_fails(model, monkeypatch):
    freed = []
    free = llama.llama_sampler_free

    def counted(handle):
        freed.append(ctypes.cast(handle, ctypes.c_void_p).value)
        free(handle)

    monkeypatch.setattr(llama, "llama_sampler_free", counted)
    with SamplerChain(model, replace(PLAIN, grammar='root ::= "a"')) as chain:
        assert freed == []
    chain.close()
    assert len(freed) == len(set(freed)) == 2
    freed.clear()
    monkeypatch.setattr(llama, "llama_sampler_init_min_p", lambda *_: None)
    with pytest.raises(NativeError):
        SamplerChain(model, PLAIN)
    assert len(freed) == 1


def test_a_chain_of_every_kind_runs_in_a_fresh_process(tiny_model):
    """Freeing at exit, with the model closed after the chain, ends the process cleanly."""
    program = (
        "import sys, numpy as np\n"
        "from pathlib import Path\n"
        "from abcli.config import ModelConfig\n"
        "from abcli.gguf.checked import check_model\n"
        "from abcli.native.model import Model\n"
        "from abcli.native.sampler import SamplerChain\n"
        "from abcli.sampling import SamplingConfig\n"
        "with Model(check_model(ModelConfig(Path(sys.argv[1])))) as model:\n"
        "    config = SamplingConfig(dry_multiplier=1.0, grammar='root ::= [a-z]+')\n"
        "    with SamplerChain(model, config) as chain:\n"
        "        print(chain.sample(np.zeros(model.vocabulary_size, np.float32)))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tiny_model)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=REPOSITORY,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().isdigit()
