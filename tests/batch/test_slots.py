from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from abcli.batch import slots
from abcli.batch.slots import MOST_SLOTS, SlotPlan, plan_slots
from abcli.config import EngineConfig
from abcli.engine.memory import Room, predict
from abcli.errors import OutOfMemoryError, UsageError
from abcli.gguf.header import Header, read_header

GIB = 1 << 30


@pytest.fixture
def header(tiny_model: Path) -> Header:
    return read_header(tiny_model)


@pytest.fixture
def config(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    give(monkeypatch, Room(8 * GIB))
    return EngineConfig(tiny_model, (1e4, 2e4), context_size=1024, gpu_layers=0)


def give(monkeypatch: pytest.MonkeyPatch, room: Room) -> None:
    monkeypatch.setattr(slots, "free_room", lambda _config: room)


def needed(count: int, config: EngineConfig, header: Header) -> int:
    return predict(replace(config, slots=count), header).host


@pytest.mark.parametrize(("buckets", "wanted"), [(1, 32), (2, 32), (3, 32), (4, 24), (6, 16), (12, 8), (40, 8)])
def test_auto_takes_what_is_of_use_for_so_many_buckets(
    config: EngineConfig, header: Header, buckets: int, wanted: int
) -> None:
    config = replace(config, bases=tuple(1e4 * (1 + index) for index in range(buckets)), context_size=256)
    assert plan_slots(None, config, header).slots == wanted


@pytest.mark.parametrize(("prompts", "wanted"), [(0, 1), (1, 1), (10, 10), (1000, 32)])
def test_auto_takes_no_more_than_there_are_prompts(
    config: EngineConfig, header: Header, prompts: int, wanted: int
) -> None:
    assert plan_slots(None, config, header, prompts).slots == wanted


@pytest.mark.parametrize("wanted", [1, 2, 5, 31])
def test_auto_takes_a_quarter_of_what_one_slot_leaves(
    config: EngineConfig, header: Header, monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    one, more = needed(1, config, header), needed(wanted, config, header)
    give(monkeypatch, Room(one + 4 * (more - one)))
    plan = plan_slots(None, config, header)
    assert plan.slots == wanted
    assert plan.needed.host == more
    if wanted > 1:
        give(monkeypatch, Room(one + 4 * (more - one) - 4))
        assert plan_slots(None, config, header).slots == wanted - 1


def test_auto_leaves_it_to_the_engine_to_refuse_one_slot(
    config: EngineConfig, header: Header, monkeypatch: pytest.MonkeyPatch
) -> None:
    give(monkeypatch, Room(0))
    assert plan_slots(None, config, header).slots == 1


def test_what_does_not_fit_is_refused(config: EngineConfig, header: Header, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, Room(needed(3, config, header)))
    assert plan_slots(3, config, header).slots == 3
    with pytest.raises(OutOfMemoryError) as caught:
        plan_slots(4, config, header)
    assert "--slots 3 would fit" in caught.value.hint
    assert plan_slots(4, replace(config, force=True), header).slots == 4
    give(monkeypatch, Room(0))
    with pytest.raises(OutOfMemoryError) as caught:
        plan_slots(4, config, header)
    assert "--slots" not in caught.value.hint


@pytest.mark.parametrize("wanted", [0, -1, MOST_SLOTS + 1])
def test_impossible_numbers(config: EngineConfig, header: Header, wanted: int) -> None:
    with pytest.raises(UsageError):
        plan_slots(wanted, config, header)


def test_the_plan_in_a_line() -> None:
    plan = SlotPlan(3, Room(2 * GIB), Room(8 * GIB))
    assert plan.text(1024, 2) == "3 slots of 1,024 tokens for 2 buckets: about 2.0 GiB of 8.0 GiB free"
    assert replace(plan, slots=1).text(1024, 1).startswith("1 slot of 1,024 tokens for 1 bucket: ")
    plan = SlotPlan(3, Room(2 * GIB, 3 * GIB), Room(8 * GIB, 24 * GIB))
    assert plan.text(1024, 2).endswith("free, 3.0 GiB of 24 GiB on the device")
