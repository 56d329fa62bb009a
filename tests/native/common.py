"""What the tests of samplers and of grammars share."""

from __future__ import annotations

from dataclasses import replace

import llama_cpp.llama_cpp as llama
import numpy as np

from abcli.native.sampler import SamplerChain
from abcli.sampling import SamplingConfig

# No sampler but the last one, which draws.
PLAIN = SamplingConfig(seed=1, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)
GREEDY = replace(PLAIN, temperature=0.0)


def random_logits(model, seed, scale=4.0):
    return np.random.default_rng(seed).normal(0, scale, model.vocabulary_size).astype(np.float32)


def sample_many(model, config, logits, count):
    with SamplerChain(model, config) as chain:
        return [chain.sample(logits) for _ in range(count)]


def accepted_by_llama_cpp(model, text):
    handle = llama.llama_sampler_init_grammar(model.vocabulary, text.encode(), b"root")
    if handle:
        llama.llama_sampler_free(handle)
    return bool(handle)
