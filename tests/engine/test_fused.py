from __future__ import annotations

import ctypes
import gc
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from abcli.config import Buckets, ContextConfig
from abcli.engine import fused
from abcli.engine.backend import TILED_TOKENS
from abcli.engine.engine import Engine
from abcli.errors import CancelledError, ContextFullError, NativeError, UnsupportedModelError
from abcli.generate import Generator
from abcli.native.model import Model
from abcli.native.rotating import context as context_module
from abcli.native.rotating.callback import ByCallback
from abcli.native.rotating.context import FusedContext
from abcli.native.rotating.turning import InGraph
from abcli.native.sampler import SamplerChain
from abcli.sampling import GenerationConfig, SamplingConfig
from tests.support.engines import computed, contexts_engine, fused_engine, stepped
from tests.support.models import open_model, set_up
from tests.support.tiny_gguf import write_tiny_experts, write_tiny_mamba, write_tiny_model

BASES = (5_000.0, 10_000.0, 20_000.0)
TOKENS = [index * 7 % 250 for index in range(300)]
# With half-precision caches the order of sums shows; these leave only float32 rounding.
EXACT: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off"}
YARN = {
    "llama.rope.scaling.type": "yarn",
    "llama.rope.scaling.factor": 4.0,
    "llama.rope.scaling.original_context_length": 1024,
}
LINEAR = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0}
# The parameters are what differs from a plain tiny llama.
MODELS: dict[str, dict[str, Any]] = {
    "pairs": {},
    "halves": {"architecture": "qwen2"},
    "factors": {"rope_factors": [1, 1, 1.5, 2, 4, 8, 8, 8]},
    "linear": {"metadata": LINEAR},
    "yarn": {"metadata": YARN},
    "partial": {"architecture": "stablelm"},
    # 12 of 16 numbers of each head: the rest is no multiple of it.
    "uneven": {"architecture": "stablelm", "metadata": {"stablelm.rope.dimension_count": 12}},
    "sliding window": {"architecture": "gemma3", "layers": 7},
}


def config(**changes: Any) -> tuple[ContextConfig, Buckets]:
    values: dict[str, Any] = {"bases": BASES, "context_size": 512, "threads": 2, **EXACT, **changes}
    return set_up(**values)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[Model]:
    with open_model(tiny_model) as model:
        yield model


@pytest.fixture(scope="module", params=list(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    path = tmp_path_factory.mktemp("fused") / "model.gguf"
    with open_model(write_tiny_model(path, **MODELS[request.param])) as loaded:
        yield loaded


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def divergence(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(left || right) of each row."""
    first, second = log_softmax(left), log_softmax(right)
    return np.asarray((np.exp(first) * (first - second)).sum(axis=-1))


def assert_equal(ours: NDArray[np.float32], theirs: NDArray[np.float32], tolerance: float = 1e-7) -> None:
    """To float32 rounding."""
    assert divergence(theirs, ours).max() < tolerance
    np.testing.assert_allclose(ours, theirs, atol=3 * float(np.sqrt(tolerance)))


def lengths(engine: Engine, slot: int = 0) -> set[int]:
    return {engine._backend.length(slot, column) for column in range(len(engine.bases))}


@pytest.fixture(params=["in the graph", "by callback"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    obstacle = "" if request.param == "in the graph" else "for the test"
    monkeypatch.setattr(context_module, "hook_obstacle", lambda: obstacle)
    return "inside llama.cpp's graph" if not obstacle else "by callback: for the test"


@pytest.mark.parametrize("attention", ["on", "off"])
@pytest.mark.parametrize("prefill", ["exact", "shared"])
def test_each_bucket_computes_what_a_context_of_its_own_computes(
    model: Model, way: str, prefill: Any, attention: Any
) -> None:
    settings = config(prefill=prefill, flash_attention=attention, ubatch_size=64)
    # On a CPU flash attention works with queries in half precision.
    tolerance = 1e-5 if attention == "on" else 1e-7
    with contexts_engine(model, *settings) as reference, fused_engine(model, *settings) as engine:
        assert engine._backend._context.turning_note == f"rows are turned {way}"
        assert engine.sharing == reference.sharing
        for start, end, stop in ((0, 130, 140), (140, 200, 210)):
            assert_equal(engine.prefill(0, TOKENS[start:end]), reference.prefill(0, TOKENS[start:end]), tolerance)
            for token in TOKENS[end:stop]:
                logits = stepped(engine, {0: token})[0]
                assert_equal(logits, stepped(reference, {0: token})[0], tolerance)
        assert divergence(logits[[1, 1]], logits[[0, 2]]).min() > 1e-5


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_200_positions_agree_with_half_precision_caches(tmp_path: Path, architecture: Any) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", architecture=architecture, layers=7)
    half = {"cache_type_k": "f16", "cache_type_v": "f16", "flash_attention": "auto", "prefill": "exact"}
    worst = np.zeros(len(BASES))
    with open_model(path) as model:
        settings = config(**half)
        with contexts_engine(model, *settings) as reference, fused_engine(model, *settings) as engine:
            for token in TOKENS[:200]:
                found = divergence(stepped(reference, {0: token})[0], stepped(engine, {0: token})[0])
                worst = np.maximum(worst, found)
    assert worst.max() < 1e-4


def test_quantised_caches_are_computed_exactly_and_say_so(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "wide.gguf", embedding=128)
    quantised = {"cache_type_k": "q8_0", "cache_type_v": "q8_0", "flash_attention": "on", "prefill": "auto"}
    with open_model(path) as model:
        settings = config(**quantised)
        with contexts_engine(model, *settings) as reference, fused_engine(model, *settings) as engine:
            assert str(engine.sharing).startswith("exact prefill: keys that are neither f32 nor f16")
            found = divergence(reference.prefill(0, TOKENS[:100]), engine.prefill(0, TOKENS[:100]))
            assert found.max() < 1e-2
            assert divergence(stepped(reference, {0: 5})[0], stepped(engine, {0: 5})[0]).max() < 1e-2


def test_prompts_of_models_with_experts_are_shared_where_graphs_are_left_out_as_a_whole(
    tmp_path: Path, way: str
) -> None:
    settings = config(prefill="auto")
    with (
        open_model(write_tiny_experts(tmp_path / "model.gguf")) as model,
        contexts_engine(model, *settings) as reference,
        fused_engine(model, *settings) as engine,
    ):
        assert engine.sharing.shared == way.startswith("inside")
        if engine.sharing.shared:
            assert_equal(engine.prefill(0, TOKENS[:100]), reference.prefill(0, TOKENS[:100]))
            assert_equal(stepped(engine, {0: 3}), stepped(reference, {0: 3}))
        else:
            assert "has experts" in engine.sharing.reason


def test_greedy_texts_are_the_same(tiny: Model) -> None:
    generation = GenerationConfig(SamplingConfig(temperature=0.0), max_tokens=60, ignore_eos=True)
    answers = []
    kinds: list[Callable[..., Engine]] = [contexts_engine, fused_engine]
    for kind in kinds:
        with (
            kind(tiny, *config()) as engine,
            Generator(engine, tiny, lambda chosen: SamplerChain(tiny, chosen)) as generator,
        ):
            answers.append([piece.answer for piece in generator.stream(0, TOKENS[:40], generation)][-1].tokens)
    assert answers[0] == answers[1]


def test_a_real_model_agrees_within_the_noise_of_llama_cpps_own_batches(real_model: Path) -> None:
    text = "The history of the lighthouse begins with fires that were lit on hills, for the sailors to steer by. "
    found, noise = [], []
    with open_model(real_model) as model:
        bases = tuple(float(np.float32(model.native_base * factor)) for factor in (0.5, 1.0, 2.0))
        tokens = model.tokenize(4 * text, add_special=True, parse_special=False)
        settings = set_up(bases, native=model.native_base, context_size=256, slots=2, prefill="exact")
        with contexts_engine(model, *settings) as reference, fused_engine(model, *settings) as engine:
            # Shorter prompts are summed as single tokens are.
            reference.prefill(0, tokens[:TILED_TOKENS])
            engine.prefill(0, tokens[:TILED_TOKENS])
            for end in (TILED_TOKENS + 1, TILED_TOKENS + 2):
                wanted = stepped(reference, {0: tokens[end - 1]})[0].copy()
                found.append(divergence(wanted, stepped(engine, {0: tokens[end - 1]})[0]))
                reference.truncate(1, 0)
                noise.append(divergence(wanted, reference.prefill(1, tokens[:end])))
    assert 1e-5 < np.mean(noise) < 0.05
    assert np.mean(found) < 3 * np.mean(noise)


def test_several_slots_with_gaps_go_in_any_order(tiny: Model) -> None:
    settings = config(slots=5, prefill="exact")
    with contexts_engine(tiny, *settings) as reference, fused_engine(tiny, *settings) as engine:
        for slot in range(5):
            assert_equal(
                engine.prefill(slot, TOKENS[slot : 20 + 3 * slot]),
                reference.prefill(slot, TOKENS[slot : 20 + 3 * slot]),
            )
        for chosen in ({4: 1, 0: 2, 1: 3}, {2: 9}, {0: 5, 1: 6, 2: 7, 3: 8, 4: 9}, {3: 1, 1: 2}):
            assert_equal(stepped(engine, chosen), stepped(reference, chosen))


@pytest.mark.parametrize(("bases", "like_device"), [(BASES, True), (BASES, False), (BASES[:1], False)])
def test_idle_slots_between_others_keep_what_they_hold(
    tiny: Model, bases: tuple[float, ...], like_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are computed along where that costs less than a batch of their own for those behind them."""
    if like_device:
        monkeypatch.setattr(fused, "_IDLE_ROWS_CPU", fused._IDLE_ROWS)
    settings = config(slots=7, bases=bases, context_size=64)
    batches = []
    compute = FusedContext.compute

    def counted(self: FusedContext, parts: Any, *arguments: Any, **options: Any) -> None:
        batches.append([part.slot for part in parts])
        compute(self, parts, *arguments, **options)

    with contexts_engine(tiny, *settings) as reference, fused_engine(tiny, *settings) as engine:
        for each in (reference, engine):
            for slot, length in ((1, 30), (2, 64), (3, 9), (4, 5)):
                each.prefill(slot, TOKENS[slot : slot + length])
        monkeypatch.setattr(FusedContext, "compute", counted)
        # Slot 2 is full and 0 empty.
        for chosen in ({0: 1, 4: 2}, {5: 3, 3: 4}, {0: 5, 1: 6, 3: 7}, dict.fromkeys((0, 1, 3, 4, 5, 6), 8)):
            assert_equal(stepped(engine, chosen), stepped(reference, chosen))
        between = [[3, 4, 5]] if like_device or len(bases) == 1 else [[3], [5]]
        assert batches == [[0], [4], *between, [0, 1], [3], [0, 1], [3, 4, 5, 6]]
        for slot in range(7):
            assert list(engine.tokens(slot)) == list(reference.tokens(slot))
            assert lengths(engine, slot) == {len(engine.tokens(slot))}


def test_more_sequences_than_a_batch_takes_are_computed_in_turns(tiny: Model) -> None:
    settings = config(slots=5, prefill="exact", ubatch_size=8, batch_size=8)
    with contexts_engine(tiny, *settings) as reference, fused_engine(tiny, *settings) as engine:
        for slot in range(5):
            assert_equal(engine.prefill(slot, TOKENS[: 9 + slot]), reference.prefill(slot, TOKENS[: 9 + slot]))
        chosen = dict.fromkeys(range(5), 7)
        assert_equal(stepped(engine, chosen), stepped(reference, chosen))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_whatever_happens_to_the_slots_both_engines_agree(tiny: Model, data: st.DataObject) -> None:
    chosen = config(slots=2, prefill="exact", context_size=128)
    with contexts_engine(tiny, *chosen) as reference, fused_engine(tiny, *chosen) as engine:
        for _ in range(data.draw(st.integers(3, 12))):
            slot = data.draw(st.integers(0, 1))
            tokens = data.draw(st.lists(st.integers(0, 299), min_size=1, max_size=20))
            held = len(reference.tokens(slot))
            match data.draw(st.sampled_from(["prefill", "step", "truncate", "copy"])):
                case "prefill" if held + len(tokens) <= 128:
                    assert_equal(engine.prefill(slot, tokens), reference.prefill(slot, tokens))
                case "step" if held < 128:
                    assert_equal(stepped(engine, {slot: tokens[0]}), stepped(reference, {slot: tokens[0]}))
                case "truncate":
                    length = data.draw(st.integers(0, 128))
                    assert engine.truncate(slot, length) == reference.truncate(slot, length)
                case "copy":
                    engine.copy(slot, 1 - slot)
                    reference.copy(slot, 1 - slot)
            assert [list(engine.tokens(slot)) for slot in range(2)] == [
                list(reference.tokens(slot)) for slot in range(2)
            ]


def test_a_base_that_is_no_bucket_can_prefill(tiny: Model) -> None:
    settings = config(bases=(5_000.0, 20_000.0), prefill_base=9_000.0, prefill="shared", slots=2)
    with contexts_engine(tiny, *settings) as reference, fused_engine(tiny, *settings) as engine:
        assert engine.sharing == reference.sharing
        for slot in (1, 0):
            assert_equal(engine.prefill(slot, TOKENS[:100]), reference.prefill(slot, TOKENS[:100]))
        assert_equal(stepped(engine, {0: 3, 1: 4}), stepped(reference, {0: 3, 1: 4}))
        # The leader takes over from the nearest bucket what was decoded without it.
        assert_equal(engine.prefill(0, TOKENS[100:200]), reference.prefill(0, TOKENS[100:200]))
        engine.truncate(0, 50)
        reference.truncate(0, 50)
        assert_equal(engine.prefill(0, TOKENS[:60]), reference.prefill(0, TOKENS[:60]))
        engine.copy(0, 1)
        reference.copy(0, 1)
        assert_equal(engine.prefill(1, TOKENS[:60]), reference.prefill(1, TOKENS[:60]))


def test_equal_and_single_buckets_are_served(tiny: Model) -> None:
    for bases in ((10_000.0,), (20_000.0,), (10_000.0, 10_000.0), (20_000.0, 20_000.0)):
        settings = config(bases=bases, prefill="auto")
        with contexts_engine(tiny, *settings) as reference, fused_engine(tiny, *settings) as engine:
            assert_equal(engine.prefill(0, TOKENS[:50]), reference.prefill(0, TOKENS[:50]))
            assert_equal(stepped(engine, {0: 3}), stepped(reference, {0: 3}))


def test_a_single_bucket_of_a_model_without_rope_is_served(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "gpt2.gguf", architecture="gpt2")
    settings = config(bases=(10_000.0,))
    with (
        open_model(path) as model,
        contexts_engine(model, *settings) as reference,
        fused_engine(model, *settings) as engine,
    ):
        assert_equal(engine.prefill(0, TOKENS[:50]), reference.prefill(0, TOKENS[:50]))
        assert_equal(stepped(engine, {0: 3}), stepped(reference, {0: 3}))


def test_a_graph_is_built_once_and_then_reused(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = InGraph._turned

    def counting(self: InGraph, *arguments: Any) -> int:
        built.append(arguments)
        return original(self, *arguments)

    monkeypatch.setattr(InGraph, "_turned", counting)
    with fused_engine(tiny, *config(prefill="exact")) as engine:
        built.clear()
        for token in range(100):
            stepped(engine, {0: token})
    # Queries and keys of both layers; llama.cpp builds anew when attention passes over more cells.
    assert len(built) == 4


@pytest.mark.parametrize(
    ("mode", "wanted"), [("exact", [20, 40, 60, 80, 100]), ("shared", [60, 100])], ids=["exact", "shared"]
)
def test_prefill_reports_progress(tiny: Model, mode: Any, wanted: list[int]) -> None:
    seen: list[tuple[int, int]] = []
    with fused_engine(tiny, *config(prefill=mode, ubatch_size=60)) as engine:
        engine.prefill(0, TOKENS[:100], lambda done, total: seen.append((done, total)))
    assert seen == [(done, 100) for done in wanted]


@pytest.mark.parametrize("prefill", ["exact", "shared"])
def test_cancelling_restores_every_sequence(tiny: Model, prefill: Any) -> None:
    with fused_engine(tiny, *config(prefill=prefill, ubatch_size=32)) as engine:
        engine.prefill(0, TOKENS[:40])

        def progress(done: int, _total: int) -> None:
            if done >= 64:
                engine.cancel()

        with pytest.raises(CancelledError):
            engine.prefill(0, TOKENS, progress)
        assert lengths(engine) == {40}
        assert list(engine.tokens(0)) == TOKENS[:40]
        after = stepped(engine, {0: 9})
        engine.truncate(0, 40)
        np.testing.assert_array_equal(stepped(engine, {0: 9}), after)


def test_cancelling_from_another_thread_interrupts_a_graph(real_model: Path) -> None:
    with open_model(real_model) as model:
        settings = config(bases=(5e4, 1e5), context_size=2048, prefill="exact", flash_attention="auto")
        with fused_engine(model, *settings) as engine:
            engine.cancel()
            engine.prefill(0, [1, 2, 3])
            timer = threading.Timer(0.05, engine.cancel)
            timer.start()
            with pytest.raises(CancelledError):
                engine.prefill(0, list(range(100, 1900)))
            timer.join()
            assert list(engine.tokens(0)) == [1, 2, 3]
            assert lengths(engine) == {3}


def test_an_exception_of_a_signal_handler_leaves_the_slot_as_it_was(tiny: Model) -> None:
    with fused_engine(tiny, *config(prefill="exact", ubatch_size=8)) as engine:
        engine.prefill(0, TOKENS[:10])

        def interrupt(done: int, _total: int) -> None:
            if done > 20:
                signal.raise_signal(signal.SIGINT)

        with pytest.raises(KeyboardInterrupt):
            engine.prefill(0, TOKENS[:100], interrupt)
        assert lengths(engine) == {10}
        stepped(engine, {0: 1})


@pytest.mark.parametrize(("kind", "method"), [(InGraph, "_turned"), (ByCallback, "_ask"), (ByCallback, "_graph")])
def test_a_failing_callback_is_an_error_and_never_a_wrong_token(
    tiny: Model, monkeypatch: pytest.MonkeyPatch, kind: type, method: str
) -> None:
    monkeypatch.setattr(context_module, "hook_obstacle", lambda: "" if kind is InGraph else "for the test")
    with fused_engine(tiny, *config()) as engine, contexts_engine(tiny, *config()) as reference:
        for each in (engine, reference):
            each.prefill(0, TOKENS[:40])
        calls = 0
        original = getattr(kind, method)

        def failing(self: Any, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls >= 2:
                raise ZeroDivisionError("out of order")
            return original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(kind, method, failing)
            with pytest.raises(NativeError, match="out of order"):
                engine.prefill(0, TOKENS[40:50])
        assert list(engine.tokens(0)) == TOKENS[:40]
        assert lengths(engine) == {40}
        assert_equal(stepped(engine, {0: 4}), stepped(reference, {0: 4}))


def test_a_failure_while_sharing_restores_every_sequence(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with fused_engine(tiny, *config(prefill="shared", ubatch_size=32)) as engine:
        engine.prefill(0, TOKENS[:40])
        original = FusedContext.share

        def failing(self: FusedContext, *arguments: Any) -> None:
            original(self, *arguments)
            raise NativeError("out of order")

        monkeypatch.setattr(FusedContext, "share", failing)
        with pytest.raises(NativeError):
            engine.prefill(0, TOKENS)
        assert lengths(engine) == {40}


def test_a_full_slot_refuses_before_llama_cpp_does(tiny: Model) -> None:
    with fused_engine(tiny, *config(context_size=300)) as engine:
        engine.prefill(0, TOKENS)
        for call in (lambda: stepped(engine, {0: 1}), lambda: engine.prefill(0, [1])):
            with pytest.raises(ContextFullError):
                call()
        assert list(engine.tokens(0)) == TOKENS


def test_a_context_can_be_filled_to_the_last_cell(tiny: Model) -> None:
    settings = config(context_size=256, ubatch_size=100)
    with fused_engine(tiny, *settings) as engine, contexts_engine(tiny, *settings) as reference:
        assert_equal(engine.prefill(0, TOKENS[:255]), reference.prefill(0, TOKENS[:255]))
        assert_equal(stepped(engine, {0: 1}), stepped(reference, {0: 1}))
        engine.truncate(0, 200)
        reference.truncate(0, 200)
        assert_equal(engine.prefill(0, TOKENS[:56]), reference.prefill(0, TOKENS[:56]))


def test_models_that_cannot_be_fused_are_refused_with_the_reason(tmp_path: Path) -> None:
    cases = {
        "M-RoPE": write_tiny_model(tmp_path / "mrope.gguf", architecture="qwen2vl"),
        "recurrent": write_tiny_mamba(tmp_path / "mamba.gguf"),
        "RoPE": write_tiny_model(tmp_path / "gpt2.gguf", architecture="gpt2"),
        "MLA": write_tiny_model(tmp_path / "mla.gguf", metadata={"llama.attention.kv_lora_rank": 16}),
    }
    for reason, path in cases.items():
        with open_model(path) as model, pytest.raises(UnsupportedModelError, match=reason):
            fused_engine(model, *config())


def test_impossible_sizes_are_refused(tiny: Model) -> None:
    with pytest.raises(UnsupportedModelError, match="batch of 2 tokens"):
        fused_engine(tiny, *config(ubatch_size=2))
    with pytest.raises(UnsupportedModelError, match="300 sequences"):
        fused_engine(tiny, *config(slots=100, context_size=8))
    # llama.cpp refuses a quantised value cache without flash attention.
    with pytest.raises(NativeError):
        fused_engine(tiny, *config(flash_attention="off", cache_type_v="q8_0"))


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("attention", ["on", "off"])
def test_stored_prompts_are_read_instead_of_computed(tmp_path: Path, architecture: Any, attention: Any) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", architecture=architecture, layers=7)
    settings = config(prompt_cache=tmp_path / "cache", ubatch_size=64, flash_attention=attention)
    results, warnings = [], []
    with open_model(path) as model:
        for _ in range(2):
            with fused_engine(model, *settings, warnings.append) as engine:
                results.append((*computed(engine, 0, TOKENS), stepped(engine, {0: 3})))
        with fused_engine(model, *settings, warnings.append) as engine:
            assert computed(engine, 0, [*TOKENS[:200], *range(100, 140)])[1] == 40
            assert lengths(engine) == {240}
    assert (results[0][1], results[1][1], warnings) == (300, 1, [])
    for ours, theirs in ((results[0][0], results[1][0]), (results[0][2], results[1][2])):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_prompt_cache_that_cannot_be_used_says_so(tiny: Model, tmp_path: Path) -> None:
    warnings: list[str] = []
    with fused_engine(tiny, *config(prompt_cache=tmp_path, prefill="exact"), warnings.append):
        assert warnings == ["`prompt_cache` needs a shared prefill or a single bucket: exact prefill"]


def test_two_engines_do_not_disturb_each_other(tiny: Model, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "other.gguf", architecture="qwen2", seed=7)
    with open_model(path) as other:
        alone = []
        for model in (tiny, other):
            with fused_engine(model, *config()) as engine:
                engine.prefill(0, TOKENS[:50])
                alone.append([stepped(engine, {0: token}) for token in TOKENS[:20]])
        with fused_engine(tiny, *config()) as first, fused_engine(other, *config()) as second:
            together: list[list[Any]] = [[], []]

            def work(index: int, engine: Engine) -> None:
                engine.prefill(0, TOKENS[:50])
                together[index] += [stepped(engine, {0: token}) for token in TOKENS[:20]]

            threads = [threading.Thread(target=work, args=pair) for pair in enumerate((first, second))]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    for ours, theirs in zip(together, alone, strict=True):
        np.testing.assert_array_equal(ours, theirs)


class MallocCounts(ctypes.Structure):
    """struct mallinfo2 of glibc."""

    _fields_ = [(f"field_{index}", ctypes.c_size_t) for index in range(10)]


def bytes_in_use() -> int:
    """What malloc has given and not got back; 0 where only glibc could tell."""
    counts = getattr(ctypes.CDLL(None), "mallinfo2", None)
    if counts is None:
        return 0
    counts.restype = MallocCounts
    found = counts()
    # uordblks, and hblkhd for what lies in mappings of its own.
    return int(found.field_7 + found.field_4)


def test_thousands_of_steps_and_engines_leave_memory_flat(tiny: Model) -> None:
    process = psutil.Process()

    def steps(engine: Engine, count: int) -> None:
        for index in range(count):
            if len(engine.tokens(0)) == engine.context_size:
                engine.truncate(0, 100)
            stepped(engine, {0: index % 250})
            if index % 50 == 0:
                engine.truncate(0, 90)
                engine.prefill(0, TOKENS[: 10 + index % 40])
        gc.collect()

    with fused_engine(tiny, *config()) as engine:
        steps(engine, 400)
        before = process.memory_info().rss
        steps(engine, 1500)
        assert process.memory_info().rss - before < 2 << 20

    def engines(count: int) -> None:
        for _ in range(count):
            with fused_engine(tiny, *config()) as engine:
                engine.prefill(0, TOKENS[:50])
        gc.collect()

    engines(5)
    before, in_use = process.memory_info().rss, bytes_in_use()
    engines(10)
    assert process.memory_info().rss - before < 4 << 20
    # What is freed glibc keeps, and uses again in other places, so that resident memory hides small leaks.
    assert bytes_in_use() - in_use < 100_000


def test_closing_twice_is_harmless(tiny: Model) -> None:
    engine = fused_engine(tiny, *config())
    engine.close()
    engine.close()
