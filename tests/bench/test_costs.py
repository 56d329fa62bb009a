"""What sets of buckets cost, on a tiny model."""

from __future__ import annotations

import pytest

from abcli.bench import costs
from abcli.bench.costs import Costed, measure_costs
from abcli.config import Buckets, ContextConfig
from abcli.engine.memory import Room
from abcli.errors import OutOfMemoryError
from tests.support.models import checked_model

CONFIG = ContextConfig(threads=1, engine="contexts")
SETS = {
    "one": Costed(Buckets((10000.0,), 10000.0)),
    "two": Costed(Buckets((5000.0, 10000.0), 10000.0)),
    "another two": Costed(Buckets((10000.0, 20000.0), 10000.0)),
}


def test_kinds_are_measured_once_and_more_buckets_take_more(tiny_model, monkeypatch):
    made = []
    make = costs.make_engine
    monkeypatch.setattr(costs, "make_engine", lambda *given: made.append(given) or make(*given))
    told = []
    found = measure_costs(checked_model(tiny_model), CONFIG, SETS, 40, lambda *done: told.append(done))
    assert set(found) == set(SETS)
    assert len(made) == 2
    assert found["two"] == found["another two"]
    assert 0 < found["two"].speed.low <= found["two"].speed.median < found["one"].speed.median
    assert found["two"].memory > found["one"].memory
    assert told[-1] == ("measuring speeds", 12, 12)


def test_what_does_not_fit_is_not_tried(tiny_model, monkeypatch):
    monkeypatch.setattr(costs, "free_room", lambda _layers: Room(1 << 20))
    with pytest.raises(OutOfMemoryError, match="side by side needs"):
        measure_costs(checked_model(tiny_model), CONFIG, SETS, 40)
