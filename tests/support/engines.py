"""Engines of a model in a test, by the settings that matter there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from abcli.config import EngineConfig
from abcli.engine.engine import Engine
from abcli.engine.make import Kind, make_engine
from abcli.gguf.header import read_header
from abcli.native.model import Model


def engine_of(
    kind: Kind, model: Model, config: EngineConfig, warn: Callable[[str], None] = lambda _line: None
) -> Engine:
    """An engine of one kind for a model that was loaded without checks."""
    return make_engine(kind, model, config, replace(read_header(model.path), adapters=model.adapters), warn)


def contexts_engine(model: Model, config: EngineConfig, warn: Callable[[str], None] = lambda _line: None) -> Engine:
    """An engine with a context for each bucket."""
    return engine_of("contexts", model, config, warn)


def fused_engine(model: Model, config: EngineConfig, warn: Callable[[str], None] = lambda _line: None) -> Engine:
    """An engine with one context for all buckets."""
    return engine_of("fused", model, config, warn)


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
