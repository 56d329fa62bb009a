"""Slots in which the native bucket decides alone: the others catch up when they are asked, and hold the right cells."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from abcli.config import Buckets, ContextConfig
from abcli.engine import fused
from abcli.engine.contexts import ContextsBackend
from abcli.engine.engine import Engine
from abcli.engine.fused import FusedBackend
from abcli.engine.make import Kind, make_engine
from abcli.errors import CancelledError
from abcli.generate import Generator
from abcli.native.context import Sequences
from abcli.native.model import Model
from abcli.native.rotating.mixing import LogitsMixer
from abcli.native.sampler import SamplerChain
from abcli.native.state import parse_state
from abcli.sampling import GenerationConfig, SamplingConfig
from tests.engine.test_shared import layer_keys, state_of
from tests.support.models import open_model, set_up
from tests.support.tiny_gguf import write_tiny_model

# The native base is 10,000.
BASES = (5_000.0, 10_000.0, 20_000.0)
NATIVE = 1
# Here it is no bucket's, but that of the leader of shared prefills.
AROUND = (5_000.0, 20_000.0)
SLOTS = 3
KINDS: tuple[Kind, ...] = ("contexts", "fused")


def config(**changes: Any) -> tuple[ContextConfig, Buckets]:
    exact: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off"}
    values: dict[str, Any] = {"bases": BASES, "context_size": 256, "threads": 2, "slots": SLOTS, **exact, **changes}
    return set_up(**values)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[Model]:
    with open_model(tiny_model) as model:
        yield model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("prefill", "first"), [("shared", 10_000.0), ("exact", 16_000.0)])
def test_the_first_base_is_the_nearest_by_its_logarithm(tiny: Model, kind: Kind, prefill: str, first: float) -> None:
    # 5,000 is nearer to the native base by its difference.
    with make_engine(kind, tiny, *config(bases=(5_000.0, 16_000.0), prefill=prefill)) as engine:
        assert engine.first_base == first


def keys(engine: Engine, slot: int, column: int) -> NDArray[np.float32]:
    """The keys [layers, tokens, numbers] of a slot in a column."""
    backend, end = engine._backend, len(engine.tokens(slot))
    if isinstance(backend, FusedBackend):
        data = backend._context.read_cells(slot, column, 0, end)
    else:
        assert isinstance(backend, ContextsBackend)
        data = state_of(backend._contexts[column], slot, end)
    (cache,) = parse_state(data)
    # Cells of contexts lie in any order.
    order = np.argsort(cache.positions)
    assert list(cache.positions[order]) == list(range(end))
    return np.stack([layer_keys(data, 0, layer)[order] for layer in range(len(cache.layers))])


def assert_equal(engine: Engine, reference: Engine) -> None:
    for slot in range(SLOTS):
        assert list(engine.tokens(slot)) == list(reference.tokens(slot))
        for column in range(len(engine.bases)):
            np.testing.assert_allclose(keys(engine, slot, column), keys(reference, slot, column), atol=1e-4)


STEP = st.tuples(
    st.just("step"), st.dictionaries(st.integers(0, SLOTS - 1), st.sampled_from([None, True, False]), min_size=1)
)
TRUNCATE = st.tuples(st.just("truncate"), st.tuples(st.integers(0, SLOTS - 1), st.integers(0, 60)))
COPY = st.tuples(st.just("copy"), st.tuples(st.integers(0, SLOTS - 1), st.integers(0, SLOTS - 1)))
PROMPT = st.tuples(st.just("prompt"), st.tuples(st.integers(0, SLOTS - 1), st.sampled_from([3, 30])))
WORK = st.lists(st.one_of(STEP, STEP, STEP, TRUNCATE, COPY, PROMPT), min_size=3, max_size=14)


def run(engine: Engine, work: list[tuple[str, Any]], *, at_once: bool) -> list[NDArray[np.float32]]:
    """Do `work`; with `at_once` the others catch up after each step. The logits that came of it."""
    found = []
    for number, (what, arguments) in enumerate(work):
        if what == "step":
            tokens = {slot: (7 * number + slot) % 250 for slot in arguments if len(engine.tokens(slot)) < 200}
            gates = {slot: lambda _row, let=let: let for slot, let in arguments.items() if let is not None}
            for slot, logits in (engine.step(tokens, gates=gates) if tokens else {}).items():
                assert len(logits) == (1 if arguments[slot] else len(engine.bases))
                found.append(logits.copy())
        elif what == "truncate":
            engine.truncate(*arguments)
        elif what == "copy":
            engine.copy(*arguments)
        elif len(engine.tokens(arguments[0])) < 200:
            found.append(engine.prefill(arguments[0], [(13 * number + i) % 250 for i in range(arguments[1])]).copy())
        if at_once:
            for slot in range(SLOTS):
                engine._catch_up(slot, engine._others)
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bases", "gated"), [(BASES, False), (BASES, True), (AROUND, True)])
@pytest.mark.parametrize("prefill", ["auto", "exact"])
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(work=WORK)
def test_cells_are_those_of_catching_up_at_once(
    tiny: Model, kind: Kind, bases: tuple[float, ...], gated: bool, prefill: Any, work: list[tuple[str, Any]]
) -> None:
    chosen = config(bases=bases, gated=gated, prefill=prefill)
    with make_engine(kind, tiny, *chosen) as engine, make_engine(kind, tiny, *chosen) as reference:
        wanted = run(reference, work, at_once=True)
        found = run(engine, work, at_once=False)
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        last = {slot: 9 + slot for slot in range(SLOTS)}
        for ours, theirs in zip(engine.step(last).values(), reference.step(last).values(), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-4)
        assert_equal(engine, reference)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [False, True])
def test_without_sharing_all_is_as_if_every_bucket_had_been_asked(tiny: Model, kind: Kind, gated: bool) -> None:
    chosen = config(gated=gated, prefill="exact")
    with make_engine(kind, tiny, *chosen) as engine, make_engine(kind, tiny, *chosen) as reference:
        for slot in range(SLOTS):
            for each in (engine, reference):
                each.prefill(slot, range(10 + slot))
        for number in range(12):
            tokens = {slot: 20 + number + slot for slot in range(SLOTS)}
            gates = {slot: lambda _row, let=(number + slot) % 4 > 0: let for slot in range(SLOTS)}
            found, wanted = engine.step(tokens, gates=gates), reference.step(tokens)
            for slot, logits in found.items():
                rows = slice(NATIVE, NATIVE + 1) if (number + slot) % 4 else slice(None)
                np.testing.assert_allclose(logits, wanted[slot][rows], atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sliding_window_longer_owed_than_it_is(tmp_path: Path, kind: Kind) -> None:
    chosen = config(gated=True, slots=1, context_size=512)
    with (
        open_model(write_tiny_model(tmp_path / "model.gguf", architecture="gemma3", layers=7)) as model,
        make_engine(kind, model, *chosen) as engine,
        make_engine(kind, model, *chosen) as reference,
    ):
        for each in (engine, reference):
            each.prefill(0, range(40))
            for number in range(200):
                each.step({0: number}, gates={0: lambda _row: True})
                if each is reference:
                    each._catch_up(0, each._others)
        for number in range(3):
            np.testing.assert_allclose(engine.step({0: number})[0], reference.step({0: number})[0], atol=1e-4)


@pytest.mark.parametrize("like_device", [True, False])
def test_slots_that_are_sure_are_left_alone_in_batches_of_others(
    tiny: Model, like_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if like_device:
        monkeypatch.setattr(fused, "_IDLE_ROWS_CPU", fused._IDLE_ROWS)
    batches: list[list[int]] = []
    decode = Sequences.decode

    def noted(self: Sequences, parts: Any, *logits: Any) -> None:
        batches.append([part.sequence for part in parts])
        decode(self, parts, *logits)

    with make_engine("fused", tiny, *config(gated=True)) as engine:
        for slot in range(SLOTS):
            engine.prefill(slot, range(30))
        monkeypatch.setattr(Sequences, "decode", noted)
        engine.step(
            dict.fromkeys(range(SLOTS), 5), gates={slot: lambda _row, let=slot == 1: let for slot in range(SLOTS)}
        )
        # The native bucket of all slots is one batch; then the others of slots 0 and 2, on a device with 1 between.
        assert batches == [[6, 7, 8], *([[0, 1, 2, 3, 4, 5]] if like_device else [[0, 1], [4, 5]])]
        backend = engine._backend
        assert [backend.length(1, column) for column in range(3)] == [30, 31, 30]
        assert {backend.length(slot, column) for slot in (0, 2) for column in range(3)} == {31}


@pytest.mark.parametrize("native", range(len(BASES)))
def test_all_buckets_of_one_slot_are_one_batch_in_their_order(
    tiny: Model, native: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    bases = (*BASES[1:], BASES[0]) if native == 0 else BASES if native == NATIVE else (BASES[0], BASES[2], BASES[1])
    logits: list[NDArray[np.float32]] = []
    merged: list[NDArray[np.float32]] = []
    for gated in (False, True):
        chosen = config(bases=bases, gated=gated, slots=1, prefill="exact")
        with make_engine("fused", tiny, *chosen) as engine:
            monkeypatch.setattr(LogitsMixer, "mixes_on_cpu", False)
            engine.prefill(0, range(30))
            logits.append(engine.step({0: 5})[0].copy())
            monkeypatch.setattr(LogitsMixer, "mixes_on_cpu", True)
            merged.append(engine.step({0: 5}, "confidence")[0].copy())
            assert len(merged[-1]) == 1
    np.testing.assert_allclose(*logits, atol=1e-4)
    np.testing.assert_allclose(*merged, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_cancelling_where_the_others_are_asked_leaves_all_as_it_was(
    tiny: Model, kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make_engine(kind, tiny, *config(gated=True)) as engine, make_engine(kind, tiny, *config()) as reference:
        for each in (engine, reference):
            each.prefill(0, range(30))
        for number in range(4):
            engine.step({0: number}, gates={0: lambda _row: True})
            reference.step({0: number}, gates={0: lambda _row: True})

        def cancelling(_row: Any) -> bool:
            engine.cancel()
            return False

        with pytest.raises(CancelledError):
            engine.step({0: 9}, gates={0: cancelling})
        assert list(engine.tokens(0)) == list(reference.tokens(0))
        np.testing.assert_allclose(engine.step({0: 9})[0], reference.step({0: 9})[0], atol=1e-4)


def answers(model: Model, kind: Kind, chosen: tuple[ContextConfig, Buckets], gates: list[float | None]) -> list[Any]:
    """An answer in a slot of its own under each gate, decoded together."""
    with (
        make_engine(kind, model, *chosen) as engine,
        Generator(engine, model, lambda sampling: SamplerChain(model, sampling)) as generator,
    ):
        config = [GenerationConfig(SamplingConfig(seed=3, top_k=5), 30, (), True, gate) for gate in gates]
        found = [generator.start(slot, [17 * i % 250 for i in range(40)], c) for slot, c in enumerate(config)]
        while generator.step():
            pass
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bases", "prefill"), [(BASES, "auto"), (BASES, "exact"), (AROUND, "auto")])
def test_gates_at_their_ends_and_between(
    tiny: Model, kind: Kind, bases: tuple[float, ...], prefill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[float] = []
    confidence = SamplerChain.confidence

    def noted(self: SamplerChain, logits: NDArray[np.float32]) -> float:
        seen.append(confidence(self, logits))
        return seen[-1]

    monkeypatch.setattr(SamplerChain, "confidence", noted)
    chosen = config(bases=bases, gated=True, prefill=prefill)
    (off,) = answers(tiny, kind, config(bases=bases, prefill=prefill), [None])
    (single,) = answers(tiny, kind, config(bases=BASES[NATIVE : NATIVE + 1], prefill=prefill), [None])
    assert off.tokens != single.tokens
    never, always = answers(tiny, kind, chosen, [1.0, 0.0])
    assert (never.tokens, always.tokens) == (off.tokens, single.tokens)
    assert len(seen) == 30
    _, between, _ = answers(tiny, kind, chosen, [1.0, usual := float(np.median(seen)), None])
    assert (never.statistics.asked, always.statistics.asked, off.statistics.asked) == (1, 0, 1)
    assert 0 < between.statistics.asked < 1
    assert between.tokens == answers(tiny, kind, chosen, [usual])[0].tokens
