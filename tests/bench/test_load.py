"""What other programs do meanwhile, told by standing clocks and counters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from abcli.bench import load


class Machine:
    """Counters as psutil gives them; tests move them."""

    def __init__(self) -> None:
        self.now = self.busy = self.idle = self.own = self.children = 0.0

    def cpu_times(self) -> Any:
        values = {"user": self.busy / 2, "system": self.busy / 2, "idle": self.idle, "iowait": 7.0, "guest": 5.0}
        return SimpleNamespace(_asdict=lambda: values)

    def process_times(self) -> Any:
        names = ("user", "system", "children_user", "children_system")
        return SimpleNamespace(**dict(zip(names, (self.own, 0.0, self.children, 0.0), strict=True)))


def test_only_what_others_do_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    monkeypatch.setattr(load.psutil, "cpu_times", machine.cpu_times)
    monkeypatch.setattr(load.psutil, "Process", lambda: SimpleNamespace(cpu_times=machine.process_times))
    monkeypatch.setattr(load, "perf_counter", lambda: machine.now)
    machine.busy, machine.own = 100.0, 10.0
    found = load.OtherLoad()
    machine.now, machine.idle = 10.0, 50.0
    # Twenty of this process, five of a child, and what others do.
    machine.busy, machine.own, machine.children = 125.0, 30.0, 5.0
    assert found.cores() == 0
    machine.busy += 8
    assert found.cores() == pytest.approx(0.8)


def test_the_real_counters_are_read() -> None:
    assert 0 <= load.OtherLoad().cores() < 10_000
