"""Engines in a test, and what the tests ask of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from abcli.engine.engine import Engine
from abcli.engine.make import make_engine

contexts_engine = partial(make_engine, "contexts")
fused_engine = partial(make_engine, "fused")


def stepped(engine: Engine, tokens: Mapping[int, int]) -> NDArray[np.float32]:
    """The logits [len(tokens), buckets, vocabulary] of a step in which no prompt waits, in the mapping's order."""
    found = engine.step(tokens)
    assert list(found) == list(tokens)
    return np.stack(list(found.values()))


def together(engine: Engine, prompts: Mapping[int, Sequence[int]]) -> NDArray[np.float32]:
    """The logits [len(prompts), buckets, vocabulary] of prompts that are begun at once."""
    for slot, tokens in prompts.items():
        engine.begin(slot, tokens)
    found: dict[int, NDArray[np.float32]] = {}
    while len(found) < len(prompts):
        found |= {slot: logits.copy() for slot, logits in engine.step({}).items()}
    return np.stack([found[slot] for slot in prompts])


def computed(engine: Engine, slot: int, tokens: Sequence[int]) -> tuple[NDArray[np.float32], int]:
    """The logits [buckets, vocabulary] after a prompt, and how many of its tokens were not in the prompt cache."""
    left = engine.begin(slot, tokens)
    while not (found := engine.step({})):
        pass
    return found[slot].copy(), left
