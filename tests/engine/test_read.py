"""Texts that are read are computed as they would be token by token, in fewer batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abcli.errors import ContextFullError
from abcli.native.context import Sequences
from tests.support.engines import contexts_engine, fused_engine
from tests.support.models import open_model, set_up

ENGINES = (contexts_engine, fused_engine)
BASES = (5_000.0, 10_000.0, 20_000.0)
EXACT: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attention": "off"}
TOKENS = [index * 7 % 250 for index in range(300)]
PROMPT = TOKENS[:40]


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("bases", [BASES, BASES[:1], (6_000.0, 12_000.0)])
@pytest.mark.parametrize("prefill", ["exact", "shared"])
def test_reading_is_as_stepping(
    tiny_model: Path, kind: Any, bases: tuple[float, ...], prefill: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = set_up(bases, context_size=256, slots=3, prefill=prefill, threads=1, **EXACT)
    texts = {0: TOKENS[50:61], 2: TOKENS[70:77]}
    batches = []
    decode = Sequences.decode
    monkeypatch.setattr(Sequences, "decode", lambda *given: (batches.append(1), decode(*given))[1])
    with open_model(tiny_model) as model, kind(model, *chosen) as engine, kind(model, *chosen) as reference:
        for slot in texts:
            engine.prefill(slot, PROMPT)
            reference.prefill(slot, PROMPT)
        assert engine.outputs >= 18
        batches.clear()
        found = engine.read(texts)
        # One for each context, or for each slot with all buckets.
        assert len(batches) <= max(len(bases), len(texts))
        for slot, tokens in texts.items():
            alone = [reference.step({slot: token})[slot].copy() for token in tokens]
            np.testing.assert_allclose(found[slot], alone, atol=2e-4)
            assert list(engine.tokens(slot)) == [*PROMPT, *tokens]
        after = [one.step({0: 3, 2: 4}) for one in (engine, reference)]
        np.testing.assert_allclose(list(after[0].values()), list(after[1].values()), atol=2e-4)


@pytest.mark.parametrize("kind", ENGINES)
def test_as_much_as_there_is_room_for(tiny_model: Path, kind: Any) -> None:
    chosen = set_up(BASES, context_size=256, slots=2, threads=1, **EXACT)
    with open_model(tiny_model) as model, kind(model, *chosen) as engine:
        most = engine.outputs
        assert engine.read({0: TOKENS[:most]})[0].shape == (most, len(BASES), model.vocabulary_size)
        assert [len(rows) for rows in engine.read({1: [5], 0: [6]}).values()] == [1, 1]
        with pytest.raises(ContextFullError):
            engine.read({0: [1], 1: [1] * 256})
        assert [len(engine.tokens(slot)) for slot in range(2)] == [most + 1, 1]
        engine.begin(0, [1, 2])
        for wrong in ({0: [1]}, {1: []}):
            with pytest.raises(ValueError):
                engine.read(wrong)
