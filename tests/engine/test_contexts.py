from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import psutil
import pytest

from abcli.config import Buckets, ContextConfig
from abcli.errors import CancelledError, ContextFullError, NativeError
from abcli.generate import Generator
from abcli.native.context import Context
from abcli.native.model import Model
from abcli.native.sampler import SamplerChain
from abcli.sampling import GenerationConfig, SamplingConfig
from tests.support.engines import contexts_engine, stepped
from tests.support.models import open_model, set_up
from tests.support.tiny_gguf import write_tiny_mamba

PROMPTS = [
    "The capital of France is",
    "Once upon a time, in a land far away,",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8,",
    '{"name": "Ada", "born":',
    "Ein Satz auf Deutsch:",
]
ANSWER_TOKENS = 24


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[Model]:
    with open_model(tiny_model) as model:
        yield model


# With half-precision caches the order of sums shows; these leave only float32 rounding.
EXACT: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off"}


def config(model: Model, *bases: float, **settings: Any) -> tuple[ContextConfig, Buckets]:
    defaults: dict[str, Any] = {"context_size": 512, "prefill": "exact"}
    return set_up(bases or (model.native_base,), native=model.native_base, **{**defaults, **settings})


def test_one_bucket_gives_token_for_token_what_llama_gives(real_model: Path) -> None:
    reference = llama_cpp.Llama(str(real_model), n_ctx=512, n_threads=2, n_threads_batch=2, verbose=False)
    try:
        with open_model(real_model) as model, contexts_engine(model, *config(model, flash_attention="off")) as engine:
            generation = GenerationConfig(SamplingConfig(temperature=0.0), max_tokens=ANSWER_TOKENS)
            with Generator(engine, model, lambda settings: SamplerChain(model, settings)) as generator:
                for prompt in PROMPTS:
                    tokens = model.tokenize(prompt, add_special=True, parse_special=False)
                    engine.truncate(0, 0)
                    ours = [piece.answer for piece in generator.stream(0, tokens, generation)][-1].tokens
                    theirs = []
                    for token in reference.generate(tokens, temp=0.0, repeat_penalty=1.0, reset=True):
                        if model.is_end(token) or len(theirs) == ANSWER_TOKENS:
                            break
                        theirs.append(token)
                    assert ours == theirs, prompt
    finally:
        reference.close()


def test_each_bucket_computes_what_a_plain_context_with_its_base_computes(real_model: Path) -> None:
    bases = (50_000.0, 100_000.0, 200_000.0)
    with (
        open_model(real_model) as model,
        contexts_engine(model, *config(model, *bases, flash_attention="off")) as engine,
    ):
        tokens = model.tokenize(" ".join(PROMPTS), add_special=True, parse_special=False)
        ours = engine.prefill(0, tokens).copy()
        after = stepped(engine, {0: 28})[0]
        for bucket, base in enumerate(bases):
            plain = llama_cpp.Llama(
                str(real_model), n_ctx=512, n_threads=engine._backend.plan.threads, rope_freq_base=base, verbose=False
            )
            try:
                for token_list, rows in ((tokens, ours), ([28], after)):
                    plain.eval(token_list)
                    pointer = llama_cpp.llama_get_logits_ith(plain.ctx, -1)
                    expected = np.ctypeslib.as_array(pointer, (model.vocabulary_size,))
                    np.testing.assert_allclose(rows[bucket], expected, atol=1e-4)
            finally:
                plain.close()
        assert np.abs(ours[0] - ours[1]).max() > 0.1


def test_truncating_and_continuing_equals_a_fresh_slot(tiny: Model) -> None:
    with contexts_engine(tiny, *config(tiny, 1e4, 3e4, **EXACT)) as engine:
        engine.prefill(0, list(range(40)))
        assert engine.truncate(0, 25) == 25
        assert list(engine.tokens(0)) == list(range(25))
        again = engine.prefill(0, [7, 8, 9]).copy()
        engine.truncate(0, 0)
        fresh = engine.prefill(0, [*range(25), 7, 8, 9])
        np.testing.assert_allclose(again, fresh, atol=1e-4)


def test_prefill_in_pieces_reports_progress_and_equals_one_go(tiny: Model) -> None:
    tokens = [index % 250 for index in range(300)]
    seen: list[tuple[int, int]] = []
    with contexts_engine(tiny, *config(tiny, 1e4, 3e4, ubatch_size=64, **EXACT)) as engine:
        in_pieces = engine.prefill(0, tokens, lambda done, total: seen.append((done, total))).copy()
    with contexts_engine(tiny, *config(tiny, 1e4, 3e4, **EXACT)) as engine:
        at_once = engine.prefill(0, tokens)
    assert seen == [(64, 300), (128, 300), (192, 300), (256, 300), (300, 300)]
    np.testing.assert_allclose(in_pieces, at_once, atol=1e-4)


def test_slots_are_independent_and_can_be_copied(tiny: Model) -> None:
    with contexts_engine(tiny, *config(tiny, 1e4, 3e4, slots=3, **EXACT)) as engine:
        engine.prefill(0, [1, 2, 3])
        alone = engine.prefill(1, [9, 8, 7, 6]).copy()
        engine.truncate(0, 1)
        together = stepped(engine, {1: 5, 0: 4})
        engine.copy(1, 2)
        assert list(engine.tokens(2)) == [9, 8, 7, 6, 5]
        copied = stepped(engine, {2: 11, 1: 11})
        np.testing.assert_allclose(copied[0], copied[1], atol=1e-4)
        for slot in range(3):
            engine.truncate(slot, 0)
        np.testing.assert_allclose(engine.prefill(0, [9, 8, 7, 6]), alone, atol=1e-4)
        np.testing.assert_allclose(engine.prefill(0, [5]), together[0], atol=1e-4)
        np.testing.assert_allclose(engine.prefill(2, [1, 4]), together[1], atol=1e-4)


def test_cancel_interrupts_inside_a_piece_and_restores_the_slot(real_model: Path) -> None:
    with open_model(real_model) as model, contexts_engine(model, *config(model, 5e4, 1e5, context_size=2048)) as engine:
        engine.prefill(0, [1, 2, 3])
        done: list[int] = []
        timer = threading.Timer(0.2, engine.cancel)
        timer.start()
        begin = time.monotonic()
        with pytest.raises(CancelledError):
            engine.prefill(0, list(range(100, 1900)), lambda count, _total: done.append(count))
        timer.join()
        assert time.monotonic() - begin < 5
        assert list(engine.tokens(0)) == [1, 2, 3]
        after = engine.prefill(0, [4]).copy()
        engine.truncate(0, 0)
        engine.prefill(0, [1, 2, 3])
        np.testing.assert_allclose(engine.prefill(0, [4]), after, atol=1e-4)


def test_cancel_without_a_computation_does_nothing(tiny: Model) -> None:
    with contexts_engine(tiny, *config(tiny)) as engine:
        engine.cancel()
        engine.prefill(0, [1])
        assert list(engine.tokens(0)) == [1]


def test_a_failing_bucket_leaves_every_bucket_as_it_was(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    with contexts_engine(tiny, *config(tiny, 1e4, 2e4, 3e4)) as engine:
        engine.prefill(0, [1, 2, 3])
        original = Context.decode

        def failing(self: Context, *arguments: Any) -> None:
            if self.base == 2e4:
                raise NativeError("out of order")
            original(self, *arguments)

        monkeypatch.setattr(Context, "decode", failing)
        with pytest.raises(NativeError):
            stepped(engine, {0: 4})
        monkeypatch.undo()
        assert list(engine.tokens(0)) == [1, 2, 3]
        assert {context.length(0) for context in engine._backend._contexts} == {3}


def test_a_full_slot_refuses_before_llama_cpp_does(tiny: Model) -> None:
    with contexts_engine(tiny, *config(tiny, context_size=8)) as engine:
        engine.prefill(0, list(range(8)))
        with pytest.raises(ContextFullError):
            stepped(engine, {0: 1})
        with pytest.raises(ContextFullError):
            engine.prefill(0, [1])
        assert len(engine.tokens(0)) == 8


def test_a_recurrent_model_forgets_everything_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mamba.gguf"
    write_tiny_mamba(path)
    with open_model(path) as model:
        assert model.is_recurrent
        with contexts_engine(model, *config(model)) as engine:
            engine.prefill(0, [1, 2, 3, 4])
            assert engine.truncate(0, 2) == 0
            assert list(engine.tokens(0)) == []
            engine.prefill(0, [1, 2])


def test_an_impossible_context_is_an_error_and_leaks_nothing(tiny: Model) -> None:
    # llama.cpp refuses a quantised value cache without flash attention.
    with pytest.raises(NativeError):
        contexts_engine(tiny, *config(tiny, 1e4, 2e4, flash_attention="off", cache_type_v="q8_0"))


def test_hundreds_of_turns_leave_memory_flat(tiny: Model) -> None:
    process = psutil.Process()
    generation = GenerationConfig(SamplingConfig(seed=1), max_tokens=4, ignore_eos=True)
    with (
        contexts_engine(tiny, *config(tiny, 1e4, 2e4)) as engine,
        Generator(engine, tiny, lambda settings: SamplerChain(tiny, settings)) as generator,
    ):

        def turns(count: int) -> None:
            for turn in range(count):
                prompt = [*engine.tokens(0), 1 + turn % 200, 2, 3]
                if len(prompt) > 400:
                    prompt = prompt[:3]
                list(generator.stream(0, prompt, generation))
            gc.collect()

        turns(100)
        before = process.memory_info().rss
        turns(500)
        assert process.memory_info().rss - before < 2 << 20


def test_closing_twice_is_harmless(tiny: Model) -> None:
    engine = contexts_engine(tiny, *config(tiny))
    engine.close()
    engine.close()
