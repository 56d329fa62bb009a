from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from abcli.config import Buckets, ContextConfig
from abcli.errors import CancelledError
from abcli.generate import Generator
from abcli.gguf.header import read_header
from abcli.native.context import BatchPart, Context
from abcli.native.llama import CancelFlag
from abcli.native.model import Model
from abcli.native.rotating.keys import KeyBlock, KeyRotator, aligned_bytes, as_float32
from abcli.native.sampler import SamplerChain
from abcli.native.state import StateError, parse_state
from abcli.rope.frequencies import RopeParameters, angular_frequencies
from abcli.rope.parameters import rope_parameters
from abcli.sampling import GenerationConfig, SamplingConfig
from tests.support.engines import contexts_engine, stepped
from tests.support.models import open_model, set_up
from tests.support.tiny_gguf import write_tiny_model

BASES = (5_000.0, 10_000.0, 20_000.0)
TOKENS = [index * 7 % 250 for index in range(300)]
# Writes a model file; the parameters are what differs from a plain tiny llama.
Write = Callable[[Path], Path]

YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 1024,
}
MODELS: dict[str, Write] = {
    "pairs": write_tiny_model,
    "halves": lambda path: write_tiny_model(path, architecture="qwen2"),
    "factors": lambda path: write_tiny_model(path, rope_factors=[1, 1, 1.5, 2, 4, 8, 8, 8]),
    "linear": lambda path: write_tiny_model(
        path, metadata={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
    ),
    "yarn": lambda path: write_tiny_model(path, metadata=YARN),
    "partial": lambda path: write_tiny_model(path, architecture="stablelm"),
    "sliding window": lambda path: write_tiny_model(path, architecture="gemma3", layers=7),
}


def engine_config(**changes: Any) -> tuple[ContextConfig, Buckets]:
    values: dict[str, Any] = {"bases": BASES, "context_size": 512, "prefill": "shared", **changes}
    return set_up(**values)


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    with open_model(MODELS[request.param](tmp_path_factory.mktemp("shared") / "model.gguf")) as loaded:
        yield loaded


def state_of(context: Context, slot: int, end: int) -> NDArray[np.uint8]:
    context.take_range(slot, 0, end)
    data = aligned_bytes(context.spare_state_size())
    context.read_spare(data)
    context.drop_spare()
    return data


def layer_keys(data: NDArray[np.uint8], cache: int, layer: int) -> NDArray[np.float32]:
    """Keys [cells, numbers] of one layer."""
    parsed = parse_state(data)[cache]
    keys = parsed.layers[layer]
    size = keys.row_bytes * len(parsed.positions)
    return as_float32(data[keys.offset : keys.offset + size], keys.type_id).reshape(len(parsed.positions), -1)


def turned_in_float64(
    keys: NDArray[np.float32], positions: NDArray[np.int32], deltas: NDArray[np.float64], width: int, *, neox: bool
) -> NDArray[np.float64]:
    """The rotation written out plainly."""
    heads = keys.astype(np.float64).reshape(len(positions), -1, width).copy()
    pairs = len(deltas)
    first, second = (
        (slice(0, pairs), slice(pairs, 2 * pairs)) if neox else (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))
    )
    angle = positions[:, None, None] * deltas
    a, b = heads[..., first].copy(), heads[..., second].copy()
    heads[..., first] = a * np.cos(angle) - b * np.sin(angle)
    heads[..., second] = a * np.sin(angle) + b * np.cos(angle)
    return heads.reshape(len(positions), -1)


@pytest.mark.parametrize("cache_type", ["f32", "f16", "bf16"])
def test_taken_over_keys_of_the_first_layer_are_those_llama_cpp_makes(model: Model, cache_type: str) -> None:
    # The first layer's keys depend on nothing but the token and its position, so they must agree to rounding.
    changes = {"cache_type_k": cache_type, "cache_type_v": cache_type}
    states = {}
    for mode in ("shared", "exact"):
        with contexts_engine(model, *engine_config(prefill=mode, **changes)) as engine:
            engine.prefill(0, TOKENS)
            assert engine.sharing.shared == (mode == "shared")
            states[mode] = [state_of(context, 0, len(TOKENS) - 1) for context in engine._backend._contexts]
    rounding = {"f32": 2e-5, "f16": 2e-3, "bf16": 1.6e-2}[cache_type]
    for ours, theirs in zip(states["shared"], states["exact"], strict=True):
        for cache in range(len(parse_state(ours))):
            mine, wanted = layer_keys(ours, cache, 0), layer_keys(theirs, cache, 0)
            if cache == 0 and len(parse_state(ours)) == 2:
                continue  # the first global layer of a sliding-window model is not the model's first
            np.testing.assert_allclose(mine, wanted, atol=rounding * np.abs(wanted).max())


def test_each_bucket_holds_the_leaders_keys_turned_by_its_own_angles(model: Model) -> None:
    header = read_header(model.path)
    parameters = rope_parameters(header, neox=model.rotation == "halves", context_size=512)
    own_base = header.architecture == "gemma3"
    with contexts_engine(model, *engine_config(cache_type_k="f32")) as engine:
        engine.prefill(0, TOKENS)
        leader = engine._backend._contexts[engine._backend.leader]
        reference = state_of(leader, 0, len(TOKENS) - 1)
        for context in engine._backend._contexts:
            state = state_of(context, 0, len(TOKENS) - 1)
            deltas = angular_frequencies(parameters, context.base) - angular_frequencies(parameters, leader.base)
            for number, cache in enumerate(parse_state(reference)):
                turns = not (own_base and number == 1)
                for layer in range(len(cache.layers)):
                    keys = layer_keys(reference, number, layer)
                    wanted = turned_in_float64(
                        keys, cache.positions, deltas * turns, header.key_length, neox=parameters.neox
                    )
                    np.testing.assert_allclose(layer_keys(state, number, layer), wanted, atol=1e-4)


def test_shared_is_close_to_exact_and_continues_like_it(model: Model) -> None:
    logits = {}
    for mode in ("shared", "exact"):
        with contexts_engine(model, *engine_config(prefill=mode)) as engine:
            engine.prefill(0, TOKENS[:120])
            stepped(engine, {0: 5})
            logits[mode] = engine.prefill(0, TOKENS[120:]).copy()
            assert [context.length(0) for context in engine._backend._contexts] == [len(TOKENS) + 1] * 3
    # The leader computes everything itself; what reaches the others differs by the method's approximation.
    middle = BASES.index(10_000.0)
    np.testing.assert_allclose(logits["shared"][middle], logits["exact"][middle], atol=0.05)
    distance = np.abs(logits["shared"] - logits["exact"]).mean()
    between_bases = np.abs(logits["exact"][0] - logits["exact"][2]).mean()
    assert distance < max(between_bases, 0.02)


@pytest.mark.parametrize("seed", range(3))
def test_taking_over_in_random_pieces_gives_the_same_bytes_as_at_once(model: Model, seed: int) -> None:
    chance = random.Random(seed)
    longest = model.sliding_window or len(TOKENS)
    with contexts_engine(model, *engine_config(context_size=1024)) as engine:
        backend = engine._backend
        shared, leader = backend._shared, backend._contexts[backend.leader]
        assert shared is not None
        for start in range(0, len(TOKENS), longest):
            leader.decode([BatchPart(0, start, TOKENS[start : start + longest], output=False)], [None])
        others = [context for context in engine._backend._contexts if context is not leader]
        states = []
        for widest in (longest, chance.randint(1, longest)):
            start = 0
            while start < len(TOKENS):
                end = min(start + (widest if widest == longest else chance.randint(1, widest)), len(TOKENS))
                shared.transfer(leader, others, 0, start, end)
                start = end
            states.append([state_of(context, 0, len(TOKENS)) for context in others])
            for context in others:
                context.truncate(0, 0)
        for at_once, in_pieces in zip(*states, strict=True):
            assert np.array_equal(at_once, in_pieces)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1]),
    st.booleans(),
    st.floats(1_000, 1_000_000),
    st.floats(1_000, 1_000_000),
)
def test_turning_there_and_back_returns_the_keys(
    seed: int, type_id: int, neox: bool, base: float, other: float
) -> None:
    chance = np.random.default_rng(seed)
    cells, heads, width, layers = int(chance.integers(1, 20)), 2, 16, 3
    kind = np.float32 if type_id == 0 else np.float16
    block = KeyBlock(
        offset=12,
        stride=cells * heads * width * kind().itemsize + 12,
        layers=layers,
        cells=cells,
        heads=heads,
        width=width,
        type_id=type_id,
    )
    data = aligned_bytes(12 + layers * block.stride)
    data[:] = 0
    for layer in range(layers):
        keys = chance.normal(0, 3, cells * heads * width).astype(kind)
        data[12 + layer * block.stride :][: keys.nbytes] = keys.view(np.uint8)
    before = data.copy()
    parameters = RopeParameters(dimensions=12, neox=neox)
    deltas = angular_frequencies(parameters, other) - angular_frequencies(parameters, base)
    positions = chance.integers(0, 5_000, cells).astype(np.int32)
    with KeyRotator() as rotator:
        rotator.rotate(data, [block], positions, deltas, neox=neox)
        rotator.rotate(data, [block], positions, -deltas, neox=neox)
    for layer in range(layers):
        start = 12 + layer * block.stride
        ours, old = (as_float32(x[start : start + cells * block.row_bytes], type_id) for x in (data, before))
        np.testing.assert_allclose(ours, old, atol=1e-4 if type_id == 0 else 2e-2)
    gaps = np.ones(len(data), bool)
    for layer in range(layers):
        gaps[12 + layer * block.stride :][: cells * block.row_bytes] = False
    assert np.array_equal(data[gaps], before[gaps])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"cache_type_k": "q8_0"}, "quantised"),
        ({"prefill": "exact"}, "exact prefill"),
        ({"bases": (10_000.0,)}, "exact prefill"),
    ],
)
def test_falls_back_to_exact_and_says_why(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    path = write_tiny_model(tmp_path / "wide.gguf", embedding=128)
    with open_model(path) as model, contexts_engine(model, *engine_config(**changes)) as engine:
        assert not engine.sharing.shared
        assert reason in str(engine.sharing)
        engine.prefill(0, TOKENS)


def test_a_model_with_positions_of_several_parts_is_computed_exactly(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", architecture="qwen2vl")
    with open_model(path) as model, contexts_engine(model, *engine_config()) as engine:
        assert str(engine.sharing) == "exact prefill: the positions of this model have several parts (M-RoPE)"
        engine.prefill(0, TOKENS[:50])
        stepped(engine, {0: 3})


def test_wrong_angles_are_noticed_and_nothing_is_shared(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any, **keywords: Any) -> RopeParameters:
        return RopeParameters(dimensions=16, neox=True)

    monkeypatch.setattr("abcli.engine.contexts.rope_parameters", wrong)
    with open_model(tiny_model) as model, contexts_engine(model, *engine_config()) as engine:
        assert str(engine.sharing) == "exact prefill: the keys of layer 0 do not follow the base as RoPE turns them"


def test_auto_computes_short_texts_exactly(tiny_model: Path) -> None:
    logits = {}
    for mode in ("auto", "exact"):
        with open_model(tiny_model) as model, contexts_engine(model, *engine_config(prefill=mode)) as engine:
            logits[mode] = engine.prefill(0, TOKENS[:10]).copy()
    assert np.array_equal(logits["auto"], logits["exact"])


def test_a_base_that_is_no_bucket_can_prefill(tiny_model: Path) -> None:
    changes = {"bases": (5_000.0, 20_000.0), "prefill_base": 9_000.0}
    with open_model(tiny_model) as model, contexts_engine(model, *engine_config(**changes)) as engine:
        assert str(engine.sharing).startswith("shared prefill at base 9000")
        engine.prefill(0, TOKENS[:100])
        stepped(engine, {0: 3})
        stepped(engine, {0: 4})
        again = engine.prefill(0, TOKENS[100:200]).copy()
        assert {context.length(0) for context in engine._backend._contexts[:2]} == {202}
        engine.truncate(0, 50)
        assert engine._backend.length(0, engine._backend.leader) == 50
        engine.prefill(0, [*TOKENS[50:100], 3, 4, *TOKENS[100:200]])
        assert np.isfinite(again).all()


def test_cancelling_a_shared_prefill_restores_every_context(tiny_model: Path) -> None:
    with open_model(tiny_model) as model, contexts_engine(model, *engine_config(ubatch_size=32)) as engine:
        engine.prefill(0, TOKENS[:40])

        def progress(done: int, _total: int) -> None:
            if done >= 64:
                engine.cancel()

        with pytest.raises(CancelledError):
            engine.prefill(0, TOKENS, progress)
        assert [context.length(0) for context in engine._backend._contexts] == [40] * 3
        assert all(context.length(context.spare) == 0 for context in engine._backend._contexts)


def test_a_chat_of_30_turns_computes_each_token_once(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: dict[float, int] = {}
    original = Context.decode

    def counting(self: Context, parts: list[BatchPart], logits: list[Any]) -> None:
        if parts[0].sequence != self.spare:
            counted[self.base] = counted.get(self.base, 0) + sum(len(part.tokens) for part in parts)
        original(self, parts, logits)

    monkeypatch.setattr(Context, "decode", counting)
    generation = GenerationConfig(SamplingConfig(seed=1), max_tokens=4, ignore_eos=True)
    config = engine_config(prefill="auto", context_size=2048)
    with open_model(tiny_model) as model, contexts_engine(model, *config) as engine:
        counted.clear()
        with Generator(engine, model, lambda sampling: SamplerChain(model, sampling)) as generator:
            conversation: list[int] = []
            for turn in range(30):
                conversation += [(turn * 31 + index) % 250 for index in range(10 + turn % 3 * 20)]
                answer = [piece.answer for piece in generator.stream(0, conversation, generation)][-1]
                conversation += answer.tokens
        held = len(engine.tokens(0))
        # The last token of an answer is computed with the next turn.
        assert held == len(conversation) - 1
        assert counted[10_000.0] == held
        assert counted[5_000.0] == counted[20_000.0] < held


def test_a_prompt_of_one_context_is_read_from_bytes_only_if_they_are_sound(tiny_model: Path) -> None:
    with open_model(tiny_model) as model:
        config, _ = engine_config()
        with Context(model, 1e4, config, 512, 1, CancelFlag()) as context:
            context.decode([BatchPart(0, 0, TOKENS[:20], output=False)], [None])
            data = state_of(context, 0, 20)
    (cache,) = parse_state(data)
    assert list(cache.positions) == list(range(20))
    for end in [*range(60), len(data) - 1]:
        with pytest.raises(StateError):
            parse_state(data[:end])
    longer = np.concatenate([data, np.zeros(3, np.uint8)])
    with pytest.raises(StateError):
        parse_state(longer)
    chance = np.random.default_rng(0)
    for _ in range(300):
        damaged = data.copy()
        damaged[chance.integers(0, 300)] ^= 1 << int(chance.integers(0, 8))
        try:
            caches = parse_state(damaged)
        except StateError:
            continue
        for found in caches:
            for keys in found.layers:
                assert keys.offset + keys.row_bytes * len(found.positions) <= len(data)
