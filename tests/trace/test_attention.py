"""What heads attend to, against numpy's own account of the same queries and keys."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from abcli.config import Buckets, ContextConfig
from abcli.engine.make import make_engine
from abcli.engine.memory import Room
from abcli.errors import CancelledError, NativeError, OutOfMemoryError
from abcli.native import ggml_api as api
from abcli.native.attention import AttentionContext
from abcli.native.ggml_api import TensorStruct
from abcli.native.llama import CancelFlag
from abcli.native.rotating.keys import aligned_bytes, as_float32
from abcli.native.state import StateError, parse_state, without_flash_attention
from abcli.trace import attention
from abcli.trace.attention import Reading, furthest, mean_by_distance, read_attention, summarised
from tests.support.models import open_model
from tests.support.tiny_gguf import write_tiny_mamba, write_tiny_model

CONFIG = ContextConfig(context_size=256, threads=1)
TOKENS = np.random.default_rng(5).integers(0, 300, 40).tolist()
BASES = (5000.0, 10000.0, 40000.0)


class Watched(AttentionContext):
    """Keeps the queries that each layer's scores were made of."""

    def _weights(self, node, tensor):
        scores = TensorStruct.from_address(node.src[0])
        query = TensorStruct.from_address(scores.src[1])
        width, rows, heads, _ = query.ne
        # A view of rows that lie otherwise in memory: read whole, then laid out by its strides.
        whole = np.empty(query.nb[2] * heads + query.nb[1] * rows, np.uint8)
        size = sum((n - 1) * b for n, b in zip(query.ne, query.nb, strict=True)) + 4
        api.tensor_get(scores.src[1], whole.ctypes.data, 0, min(size, whole.nbytes))
        found = np.ndarray((heads, rows, width), np.float32, whole, strides=(query.nb[2], query.nb[1], 4))
        self.queries = [*getattr(self, "queries", []), found.copy()]
        return super()._weights(node, tensor)


def keys_of(context, layers, kv_heads):
    """The keys of the context's text, float32 [layers, positions, kv_heads, width], from the bytes of its state."""
    context.take_range(0, 0, context.length(0))
    data = aligned_bytes(context.spare_state_size())
    context.read_spare(data)
    context.drop_spare()
    (cache,) = parse_state(data)
    assert cache.positions.tolist() == list(range(len(cache.positions)))
    found = [
        as_float32(data[keys.offset : keys.offset + len(cache.positions) * keys.row_bytes], keys.type_id)
        for keys in cache.layers
    ]
    return np.stack(found).reshape(layers, len(cache.positions), kv_heads, -1)


def test_weights_are_those_of_the_same_queries_and_keys(tmp_path):
    path = write_tiny_model(tmp_path / "tiny.gguf", layers=3)
    seen = {}
    with open_model(path) as model, Watched(model, 10000.0, CONFIG, 256, 1, CancelFlag()) as context:
        context.append(TOKENS[:30])
        context.append(TOKENS[30:], lambda layer, weights: seen.__setitem__(layer, weights.copy()))
        keys = keys_of(context, 3, 2)
        queries = context.queries
    assert list(seen) == [0, 1, 2]
    for layer in range(3):
        for head in range(4):
            scores = queries[layer][head].astype(np.float64) @ keys[layer][:, head // 2].T / np.sqrt(16)
            scores[np.triu(np.ones(scores.shape, bool), 31)] = -np.inf
            wanted = np.exp(scores - scores.max(axis=1, keepdims=True))
            wanted /= wanted.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(seen[layer][head], wanted, atol=1e-3)


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_turned_keys_give_nearly_the_weights_of_a_prompt_of_ones_own(tmp_path, architecture):
    path = write_tiny_model(tmp_path / "tiny.gguf", architecture=architecture, layers=6)
    with open_model(path) as model:
        own = read_attention(model, CONFIG, BASES, TOKENS, 30, cancel=CancelFlag())
        taken = read_attention(model, CONFIG, BASES, TOKENS, 30, prefill_base=10000.0, cancel=CancelFlag())
    assert own.heads == taken.heads
    assert own.weights.shape == (3, 10, 40)
    np.testing.assert_allclose(own.weights.sum(axis=2), 1, atol=1e-4)
    # Under the base that computed the prompt it is the same; under the others a little was mixed otherwise.
    np.testing.assert_allclose(own.weights[1], taken.weights[1], atol=1e-4)
    assert 0 < abs(own.weights[0] - taken.weights[0]).max() < 0.2
    for row in range(10):
        assert not own.weights[:, row, 31 + row :].any()


@pytest.mark.parametrize("kind", ["fused", "contexts"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_what_an_engine_holds_of_a_prompt_is_not_computed_again(tmp_path, architecture, kind, monkeypatch):
    path = write_tiny_model(tmp_path / "tiny.gguf", architecture=architecture, layers=7)
    appended = []
    append = AttentionContext.append

    def counted(self, tokens, see=None):
        appended.append(len(tokens))
        append(self, tokens, see)

    monkeypatch.setattr(AttentionContext, "append", counted)
    config = replace(CONFIG, prefill="shared", ubatch_size=16)
    with open_model(path) as model, make_engine(kind, model, config, Buckets(BASES, 10000.0)) as engine:
        assert engine.sharing.shared
        engine.prefill(0, TOKENS)
        cells = [piece.data for piece in engine.cells(0, 30)]
        assert len(cells) == 2
        assert not list(engine.cells(0, 41))
        taken = read_attention(model, CONFIG, BASES, TOKENS, 30, prefill_base=10000.0, cells=cells, cancel=CancelFlag())
        assert appended == [10] * 4
        own = read_attention(model, CONFIG, BASES, TOKENS, 30, prefill_base=10000.0, cancel=CancelFlag())
        assert 30 in appended
        np.testing.assert_allclose(taken.weights, own.weights, atol=2e-3)
        # What is no state is computed.
        other = read_attention(
            model, CONFIG, BASES, TOKENS, 30, prefill_base=10000.0, cells=[cells[0][:-8]], cancel=CancelFlag()
        )
    np.testing.assert_array_equal(other.weights, own.weights)


def test_values_are_transposed_and_nothing_else_changes(tmp_path):
    # Keys and values of a first layer are the same with flash attention and without.
    path = write_tiny_model(tmp_path / "tiny.gguf", layers=1)
    states = []
    with open_model(path) as model:
        for flash in ("on", "off"):
            config = replace(CONFIG, flash_attention=flash)
            with make_engine("contexts", model, config, Buckets(BASES[:1], BASES[0])) as engine:
                engine.prefill(0, TOKENS[:5])
                states += [piece.data for piece in engine.cells(0, 5)]
    with_flash, without = states
    found, wanted = without_flash_attention(with_flash, ()), without_flash_attention(without, ())
    np.testing.assert_array_equal(found, wanted)
    # All but whose cells they are is llama.cpp's own form.
    (cache,) = parse_state(without)
    start = cache.layers[0].offset - 12
    np.testing.assert_array_equal(found[start:], without[start:])
    assert not np.array_equal(with_flash[start:], without[start:])
    with pytest.raises(StateError):
        without_flash_attention(with_flash[:-1], ())


def test_a_text_too_long_for_memory_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    path = write_tiny_model(tmp_path / "tiny.gguf")
    monkeypatch.setattr(attention, "free_room", lambda _layers: Room(1 << 20))
    with open_model(path) as model:
        with pytest.raises(OutOfMemoryError, match="attention over 40 tokens needs"):
            read_attention(model, CONFIG, BASES, TOKENS, 30, cancel=CancelFlag())
        forced = replace(CONFIG, force=True)
        assert read_attention(model, forced, BASES, TOKENS, 30, cancel=CancelFlag()).heads


def test_long_answers_are_read_in_pieces(tmp_path):
    path = write_tiny_model(tmp_path / "tiny.gguf")
    long = np.random.default_rng(6).integers(0, 300, 200).tolist()
    with open_model(path) as model:
        whole = read_attention(model, CONFIG, BASES[:1], long, 20, cancel=CancelFlag())
        small = ContextConfig(context_size=256, threads=1, ubatch_size=16)
        pieces = read_attention(model, small, BASES[:1], long, 20, cancel=CancelFlag())
    assert whole.heads == pieces.heads
    np.testing.assert_allclose(whole.weights, pieces.weights, atol=1e-4)


def test_what_has_no_attention_says_so(tmp_path):
    path = write_tiny_mamba(tmp_path / "mamba.gguf")
    with open_model(path) as model, pytest.raises(NativeError, match="no attention weights"):
        read_attention(model, CONFIG, (10000.0,), TOKENS, 30, cancel=CancelFlag())


def test_reading_can_be_cancelled_and_errors_of_a_visitor_come_out(tmp_path):
    path = write_tiny_model(tmp_path / "tiny.gguf")
    with open_model(path) as model:
        cancel = CancelFlag()
        cancel.set()
        with pytest.raises(CancelledError):
            read_attention(model, CONFIG, BASES, TOKENS, 30, cancel=cancel)
        with AttentionContext(model, 10000.0, CONFIG, 256, 1, CancelFlag()) as context:
            with pytest.raises(KeyError, match="seen"):
                context.append(TOKENS, lambda _layer, _weights: {}["seen"])
            context.truncate(0, 0)
            context.append(TOKENS)
            assert context.length(0) == len(TOKENS)


def test_heads_are_chosen_by_how_far_they_look():
    reaches = {layer: np.arange(10.0) + 10 * layer for layer in range(2)}
    assert furthest(reaches) == ((1, 8), (1, 9))
    assert furthest({0: np.array([1.0, 3.0, 2.0])}) == ((0, 1),)
    # Those that see no further than a window do not count beside others, but where there are no others.
    assert furthest(reaches, (False, True)) == ((0, 8), (0, 9))
    assert furthest(reaches, (True, True)) == ((1, 8), (1, 9))


def test_a_reading_is_summed_as_numpy_would_sum_it():
    random = np.random.default_rng(0)
    prompt, steps = 12, 4
    weights = np.zeros((2, steps, prompt + steps - 1), np.float32)
    for row in range(steps):
        share = random.random((2, prompt + row))
        weights[:, row, : prompt + row] = share / share.sum(axis=1, keepdims=True)
    merge = np.array([[0.25, 0.75]] * 3 + [[1.5, -0.5]])
    found = summarised(Reading(prompt - 1, ((0, 0),), weights), merge, prompt, ((0, 5), (5, 12)))
    merged = 0.25 * weights[0] + 0.75 * weights[1]
    merged[3] = weights[0, 3]
    rows = np.concatenate((weights, merged[None]))[:, :, :prompt]
    np.testing.assert_allclose(found.whole, rows.mean(axis=1), rtol=1e-5)
    wanted = np.stack((rows[:, :, :5].sum(axis=2), rows[:, :, 5:].sum(axis=2)), axis=-1)
    np.testing.assert_allclose(found.passages, wanted.transpose(1, 0, 2), rtol=1e-5)
    assert found.strongest.shape == (steps, 3, prompt)
    np.testing.assert_allclose(found.strongest_weights, -np.sort(-rows.transpose(1, 0, 2), axis=2), rtol=1e-5)
    direct = [np.mean([weights[0, r, prompt - 1 + r - d] for r in range(steps)]) for d in range(prompt - 1)]
    np.testing.assert_allclose(found.by_distance[0], direct, rtol=1e-5)
    np.testing.assert_allclose(mean_by_distance(weights[0], prompt - 1), direct, rtol=1e-5)
