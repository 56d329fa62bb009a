from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from abcli.batch import slots
from abcli.batch.slots import MOST_AUTOMATIC, plan_slots, slot_bytes
from abcli.config import EngineConfig
from abcli.errors import OutOfMemoryError, UsageError
from abcli.models.header import read_header
from tests.support.tiny_gguf import write_tiny_model

GIB = 1 << 30


@pytest.fixture
def config(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    monkeypatch.setattr(slots, "available_memory", lambda: 8 * GIB)
    return EngineConfig(tiny_model, (1e4, 2e4), context_size=1024, gpu_layers=0)


def test_the_estimate_covers_caches_and_logits(config: EngineConfig, tmp_path: Path) -> None:
    wide = read_header(write_tiny_model(tmp_path / "wide.gguf", vocabulary_size=900))
    narrow = read_header(config.model)
    cache = narrow.kv_bytes_per_token("f16", "f16") * 1024 * 2
    assert cache < slot_bytes(config, narrow) < 2 * cache
    # Logits of two buckets and a sampler's candidates for each further token of the vocabulary.
    further = 900 - narrow.vocabulary_size
    assert slot_bytes(config, wide) - slot_bytes(config, narrow) == further * (3 * 2 * 4 + 16)


def test_a_leader_that_is_no_bucket_counts(config: EngineConfig) -> None:
    header = read_header(config.model)
    bases = (header.native_base / 2, header.native_base * 2)
    outside = slot_bytes(replace(config, bases=bases), header)
    inside = slot_bytes(replace(config, bases=(header.native_base, bases[1])), header)
    assert outside == slot_bytes(replace(config, bases=(*bases, header.native_base)), header) > inside
    assert slot_bytes(replace(config, bases=bases, prefill="exact"), header) == inside


def test_auto_takes_half_of_the_free_memory_at_most(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_header(config.model)
    each = slot_bytes(config, header)
    assert plan_slots(None, config, header).slots == MOST_AUTOMATIC
    for held, expected in ((20, MOST_AUTOMATIC), (10, 5), (3, 1), (0, 1)):
        monkeypatch.setattr(slots, "available_memory", lambda held=held: held * each)
        assert plan_slots(None, config, header).slots == expected


def test_what_does_not_fit_is_refused(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    header = read_header(config.model)
    monkeypatch.setattr(slots, "available_memory", lambda: 3 * slot_bytes(config, header) + 1)
    assert plan_slots(3, config, header).slots == 3
    with pytest.raises(OutOfMemoryError) as caught:
        plan_slots(4, config, header)
    assert "--slots 3 would fit" in caught.value.hint


@pytest.mark.parametrize("wanted", [0, -1, 257])
def test_impossible_numbers(config: EngineConfig, wanted: int) -> None:
    with pytest.raises(UsageError):
        plan_slots(wanted, config, read_header(config.model))


def test_the_plan_in_a_line(config: EngineConfig) -> None:
    plan = plan_slots(3, config, read_header(config.model))
    text = plan.text(1024, 2)
    assert text.startswith("3 slots of 1,024 tokens for 2 buckets: about ")
    assert text.endswith(" MiB of 8,192 free")
    assert replace(plan, slots=1).text(1024, 1).startswith("1 slot of 1,024 tokens for 1 bucket: ")
