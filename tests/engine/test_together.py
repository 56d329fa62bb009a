"""Prompts that are computed together get what each gets alone, in both engines."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.config import Buckets, ContextConfig
from abcli.engine.backend import Part
from abcli.engine.contexts import fitting
from abcli.errors import CancelledError, ContextFullError
from abcli.native.context import Sequences
from tests.support.engines import contexts_engine, fused_engine, stepped, together
from tests.support.models import open_model, set_up
from tests.support.tiny_gguf import write_tiny_mamba, write_tiny_model

ENGINES = (contexts_engine, fused_engine)
BASES = (5_000.0, 10_000.0, 20_000.0)
EXACT: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off"}
TOKENS = [index * 7 % 250 for index in range(300)]


def config(**changes: Any) -> tuple[ContextConfig, Buckets]:
    values: dict[str, Any] = {"bases": BASES, "context_size": 256, "threads": 2, "slots": 5, **EXACT, **changes}
    return set_up(**values)


def assert_the_same(
    path: Path, kind: Any, chosen: tuple[ContextConfig, Buckets], lengths: dict[int, int], held: int = 3
) -> None:
    """In slots that hold something already, with the steps that follow, and with none left out."""
    slots = range(chosen[0].slots)
    with open_model(path) as model, kind(model, *chosen) as engine, kind(model, *chosen) as reference:
        for slot in slots:
            beginning = TOKENS[slot : slot + held + slot]
            engine.prefill(slot, beginning)
            reference.prefill(slot, beginning)
        prompts = {slot: TOKENS[50 + slot : 50 + slot + length] for slot, length in lengths.items()}
        found = together(engine, prompts)
        alone = [reference.prefill(slot, tokens).copy() for slot, tokens in prompts.items()]
        np.testing.assert_allclose(found, alone, atol=1e-3)
        last = {slot: 9 + slot for slot in slots}
        np.testing.assert_allclose(stepped(engine, last), stepped(reference, last), atol=1e-3)
        for slot in last:
            assert list(engine.tokens(slot)) == list(reference.tokens(slot))


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("bases", [BASES, BASES[:1], (6_000.0, 12_000.0)])
@pytest.mark.parametrize("prefill", ["exact", "shared", "auto"])
def test_together_is_as_alone(tiny_model: Path, kind: Any, bases: tuple[float, ...], prefill: Any) -> None:
    chosen = config(bases=bases, prefill=prefill)
    assert_the_same(tiny_model, kind, chosen, {3: 40, 0: 9, 1: 12, 4: 1})


@pytest.mark.parametrize("kind", ENGINES)
def test_more_than_a_batch_takes(tiny_model: Path, kind: Any) -> None:
    chosen = config(bases=BASES[:1], ubatch_size=32, batch_size=32)
    assert_the_same(tiny_model, kind, chosen, {0: 20, 1: 20, 2: 100, 3: 5, 4: 6})


def test_a_sliding_window_is_kept_whole(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", architecture="gemma3", layers=7)
    for kind in ENGINES:
        # Far beyond the window, with the shorter prompts filled up in one batch.
        assert_the_same(path, kind, config(bases=BASES[:1]), {0: 3, 1: 10, 2: 9, 3: 1, 4: 10}, held=100)


def test_recurrent_models_are_served(tmp_path: Path) -> None:
    path = write_tiny_mamba(tmp_path / "model.gguf")
    assert_the_same(path, contexts_engine, config(bases=BASES[:1], cache_type_v="f32"), {1: 5, 0: 9, 4: 2})


def test_near_lengths_share_a_batch(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    decode = Sequences.decode

    def counted(self: Sequences, parts: Any, logits: Any = ()) -> None:
        batches.append(len({part.sequence for part in parts}))
        decode(self, parts, logits)

    for kind, wanted in ((contexts_engine, [2, 1, 1, 1]), (fused_engine, [3, 1, 1])):
        chosen = config(bases=BASES[:1])
        with open_model(tiny_model) as model, kind(model, *chosen) as engine:  # type: ignore[operator]
            monkeypatch.setattr(Sequences, "decode", counted)
            batches.clear()
            together(engine, {slot: TOKENS[:length] for slot, length in enumerate((20, 24, 22, 90, 5))})
            assert batches == wanted
            monkeypatch.undo()


@pytest.mark.parametrize("kind", ENGINES)
def test_a_slot_can_be_filled_to_the_last_token_beside_others(tiny_model: Path, kind: Any) -> None:
    chosen = config(bases=BASES[:1], context_size=64)
    with open_model(tiny_model) as model, kind(model, *chosen) as engine, kind(model, *chosen) as reference:
        for each in (engine, reference):
            each.prefill(0, TOKENS[:60])
        found = together(engine, {0: TOKENS[:4], 1: TOKENS[:14]})
        wanted = [reference.prefill(0, TOKENS[:4]).copy(), reference.prefill(1, TOKENS[:14])]
        np.testing.assert_allclose(found, wanted, atol=1e-3)


@pytest.mark.parametrize("kind", ENGINES)
def test_one_that_does_not_fit_leaves_all_as_they_were(tiny_model: Path, kind: Any) -> None:
    with open_model(tiny_model) as model, kind(model, *config()) as engine:
        engine.prefill(1, TOKENS[:10])
        with pytest.raises(ContextFullError):
            together(engine, {0: TOKENS[:5], 1: TOKENS[:250]})
        with pytest.raises(ValueError, match="token"):
            engine.begin(1, [])
        assert (list(engine.tokens(0)), list(engine.tokens(1))) == ([], TOKENS[:10])


@pytest.mark.parametrize("kind", ENGINES)
def test_a_cancelled_one_leaves_all_as_they_were(tiny_model: Path, kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_model(tiny_model) as model, kind(model, *config()) as engine:
        engine.prefill(0, TOKENS[:10])
        before = stepped(engine, {0: 7})
        engine.truncate(0, 10)
        decode = Sequences.decode

        def cancelling(self: Sequences, parts: Any, logits: Any = ()) -> None:
            decode(self, parts, logits)
            engine.cancel()

        monkeypatch.setattr(Sequences, "decode", cancelling)
        with pytest.raises(CancelledError):
            together(engine, {0: TOKENS[:40], 1: TOKENS[:50]})
        monkeypatch.undo()
        assert (list(engine.tokens(0)), list(engine.tokens(1))) == (TOKENS[:10], [])
        assert (engine.waiting(0), engine.waiting(1)) == (40, 50)
        engine.drop(0)
        engine.drop(1)
        np.testing.assert_allclose(stepped(engine, {0: 7}), before, atol=1e-4)


@settings(max_examples=50)
@given(lengths=st.dictionaries(st.integers(0, 20), st.integers(1, 30), min_size=1), limit=st.integers(1, 40))
def test_groups_fit_and_leave_none_out(lengths: dict[int, int], limit: int) -> None:
    parts = [Part(slot, 0, [0] * length) for slot, length in lengths.items()]
    groups = [[part.slot for part in group] for group in fitting(parts, limit)]
    assert [slot for group in groups for slot in group] == list(lengths)
    assert all(len(group) == 1 or sum(lengths[slot] for slot in group) <= limit for group in groups)
    assert all(sum(lengths[slot] for slot in [*group, after[0]]) > limit for group, after in pairwise(groups))
