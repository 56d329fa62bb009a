from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from abcli.config import Buckets, ContextConfig
from abcli.errors import NativeError
from abcli.native.context import Context
from tests.support.engines import computed, contexts_engine
from tests.support.models import open_model, set_up
from tests.support.tiny_gguf import write_tiny_model

BASES = (5_000.0, 10_000.0, 20_000.0)
DOCUMENT = [index * 7 % 250 for index in range(400)]


def engine_config(cache: Path | None, **changes: Any) -> tuple[ContextConfig, Buckets]:
    values: dict[str, Any] = {"bases": BASES, "context_size": 1024, "ubatch_size": 128, **changes}
    return set_up(prompt_cache=cache, **values)


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("stored") / "model.gguf"
    return write_tiny_model(target, architecture=request.param, layers=7)


def prefill(path: Path, cache: Path | None, tokens: list[int], **changes: Any) -> tuple[np.ndarray, int, list[str]]:
    """Logits, tokens computed and warnings of a prefill by a new engine."""
    warnings: list[str] = []
    config = engine_config(cache, **changes)
    with open_model(path) as model, contexts_engine(model, *config, warnings.append) as engine:
        logits, left = computed(engine, 0, tokens)
        assert list(engine.tokens(0)) == tokens
        assert {context.length(0) for context in engine._backend._contexts} == {len(tokens)}
        return logits, left, warnings


def test_a_second_run_reads_what_the_first_computed(path: Path, tmp_path: Path) -> None:
    first, computed, _ = prefill(path, tmp_path, DOCUMENT)
    assert computed == len(DOCUMENT)
    second, computed, warnings = prefill(path, tmp_path, DOCUMENT)
    assert (computed, warnings) == (1, [])
    np.testing.assert_array_equal(first, second)


def test_another_question_on_the_same_document_computes_only_the_question(path: Path, tmp_path: Path) -> None:
    prefill(path, tmp_path, [*DOCUMENT, 1, 2, 3])
    other = [*DOCUMENT, *range(100, 140)]
    plain, _, _ = prefill(path, None, other, prefill="shared")
    read, computed, _ = prefill(path, tmp_path, other, prefill="shared")
    assert computed == 40
    np.testing.assert_allclose(read, plain, atol=0.05)


def test_one_file_serves_all_bucket_sets(path: Path, tmp_path: Path) -> None:
    wanted, _, _ = prefill(path, tmp_path, DOCUMENT, bases=(10_000.0,))
    for bases in ((5_000.0, 10_000.0, 15_000.0, 20_000.0), (10_000.0, 30_000.0), (10_000.0,)):
        logits, computed, _ = prefill(path, tmp_path, DOCUMENT, bases=bases)
        assert computed == 1
        np.testing.assert_allclose(logits[bases.index(10_000.0)], wanted[0], atol=0.05)
    assert len(list(tmp_path.iterdir())) == 1


def test_another_cache_type_or_base_is_another_entry(path: Path, tmp_path: Path) -> None:
    prefill(path, tmp_path, DOCUMENT)
    for changes in ({"cache_type_v": "f32"}, {"prefill_base": 20_000.0}):
        _, computed, _ = prefill(path, tmp_path, DOCUMENT, **changes)
        assert computed == len(DOCUMENT)


def test_a_damaged_file_costs_a_warning_and_is_written_again(path: Path, tmp_path: Path) -> None:
    first, _, _ = prefill(path, tmp_path, DOCUMENT)
    (file,) = tmp_path.iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    second, computed, warnings = prefill(path, tmp_path, DOCUMENT)
    assert computed > 1
    assert len(warnings) == 1
    np.testing.assert_allclose(first, second, atol=0.05)
    _, computed, warnings = prefill(path, tmp_path, DOCUMENT)
    assert (computed, warnings) == (1, [])


def test_a_slot_that_holds_a_little_takes_more_from_the_disk(path: Path, tmp_path: Path) -> None:
    prefill(path, tmp_path, DOCUMENT)
    with open_model(path) as model, contexts_engine(model, *engine_config(tmp_path)) as engine:
        engine.prefill(0, DOCUMENT[:20])
        assert computed(engine, 0, DOCUMENT[20:])[1] == 1
        assert list(engine.tokens(0)) == DOCUMENT
        engine.prefill(0, [5])
        engine.truncate(0, 100)
        engine.prefill(0, [6, 7, 8])
        assert list(engine.tokens(0)) == [*DOCUMENT[:100], 6, 7, 8]


def test_a_failure_while_reading_leaves_an_empty_slot(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill(path, tmp_path, DOCUMENT)
    with open_model(path) as model, contexts_engine(model, *engine_config(tmp_path)) as engine:
        engine.prefill(0, DOCUMENT[:20])
        with monkeypatch.context() as patch:
            patch.setattr(Context, "append_spare", Mock(side_effect=NativeError("out of order")))
            with pytest.raises(NativeError):
                engine.prefill(0, DOCUMENT[20:])
        assert list(engine.tokens(0)) == []
        assert {context.length(0) for context in engine._backend._contexts} == {0}
        engine.prefill(0, DOCUMENT)


def test_a_cache_that_cannot_be_shared_says_so(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "wide.gguf", embedding=128)
    _, computed, warnings = prefill(path, tmp_path / "cache", DOCUMENT, cache_type_k="q8_0")
    assert computed == len(DOCUMENT)
    assert len(warnings) == 1
    assert "quantised" in warnings[0]
