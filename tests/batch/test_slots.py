from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from abcli.batch import slots
from abcli.batch.slots import MOST_SLOTS, SlotPlan, plan_slots
from abcli.config import Buckets, ContextConfig
from abcli.engine.memory import Room, predict
from abcli.errors import OutOfMemoryError, UsageError
from abcli.prepare import Prepared
from tests.support.models import buckets_at, checked_model

GIB = 1 << 30


@pytest.fixture
def found(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Prepared:
    give(monkeypatch, Room(8 * GIB))
    return Prepared(checked_model(tiny_model, 0), ContextConfig(context_size=1024), buckets_at(1e4, 2e4))


def give(monkeypatch: pytest.MonkeyPatch, room: Room) -> None:
    monkeypatch.setattr(slots, "free_room", lambda _gpu_layers: room)


def needed(count: int, found: Prepared) -> int:
    return predict(found.model, replace(found.context, slots=count), found.buckets).host


@pytest.mark.parametrize(("buckets", "wanted"), [(1, 32), (2, 32), (3, 32), (4, 24), (6, 16), (12, 8), (40, 8)])
def test_auto_takes_what_is_of_use_for_so_many_buckets(found: Prepared, buckets: int, wanted: int) -> None:
    bases = tuple(1e4 * (1 + index) for index in range(buckets))
    many = replace(found, context=ContextConfig(context_size=256), buckets=Buckets(bases, 1e4))
    assert plan_slots(None, many).slots == wanted


@pytest.mark.parametrize(("prompts", "wanted"), [(0, 1), (1, 1), (10, 10), (1000, 32)])
def test_auto_takes_no_more_than_there_are_prompts(found: Prepared, prompts: int, wanted: int) -> None:
    assert plan_slots(None, found, prompts).slots == wanted


@pytest.mark.parametrize("wanted", [1, 2, 5, 31])
def test_auto_takes_a_quarter_of_what_one_slot_leaves(
    found: Prepared, monkeypatch: pytest.MonkeyPatch, wanted: int
) -> None:
    one, more = needed(1, found), needed(wanted, found)
    give(monkeypatch, Room(one + 4 * (more - one)))
    plan = plan_slots(None, found)
    assert plan.slots == wanted
    assert plan.needed.host == more
    if wanted > 1:
        give(monkeypatch, Room(one + 4 * (more - one) - 4))
        assert plan_slots(None, found).slots == wanted - 1


def test_auto_leaves_it_to_the_engine_to_refuse_one_slot(found: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, Room(0))
    assert plan_slots(None, found).slots == 1


def test_what_does_not_fit_is_refused(found: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    give(monkeypatch, Room(needed(3, found)))
    assert plan_slots(3, found).slots == 3
    with pytest.raises(OutOfMemoryError) as caught:
        plan_slots(4, found)
    assert "`slots=3` would fit" in caught.value.hint
    assert plan_slots(4, replace(found, context=replace(found.context, force=True))).slots == 4
    give(monkeypatch, Room(0))
    with pytest.raises(OutOfMemoryError) as caught:
        plan_slots(4, found)
    assert "`slots=" not in caught.value.hint


@pytest.mark.parametrize("wanted", [0, -1, MOST_SLOTS + 1])
def test_impossible_numbers(found: Prepared, wanted: int) -> None:
    with pytest.raises(UsageError):
        plan_slots(wanted, found)


def test_the_plan_in_a_line() -> None:
    plan = SlotPlan(3, Room(2 * GIB), Room(8 * GIB))
    assert plan.text(1024, 2) == "3 slots of 1,024 tokens for 2 buckets: about 2.0 GiB of 8.0 GiB free"
    assert replace(plan, slots=1).text(1024, 1).startswith("1 slot of 1,024 tokens for 1 bucket: ")
    plan = SlotPlan(3, Room(2 * GIB, 3 * GIB), Room(8 * GIB, 24 * GIB))
    assert plan.text(1024, 2).endswith("free, 3.0 GiB of 24 GiB on the device")
