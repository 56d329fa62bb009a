"""Whether other programs ran while something was measured."""

from __future__ import annotations

from time import perf_counter

import psutil


class OtherLoad:
    """Counts from its making on how many cores' worth of time others than this process and its children used."""

    def __init__(self) -> None:
        self._begin = perf_counter()
        self._others = _others()

    def cores(self) -> float:
        """The mean number of cores that others kept busy."""
        return max(0.0, (_others() - self._others) / max(1e-9, perf_counter() - self._begin))


def _others() -> float:
    """Seconds of all cores that were spent neither idle nor by this process and those of its children that ended."""
    times = psutil.cpu_times()
    # Guests are counted in the time of users already.
    free = ("idle", "iowait", "guest", "guest_nice")
    busy = sum(value for name, value in times._asdict().items() if name not in free)
    own = psutil.Process().cpu_times()
    return float(busy - own.user - own.system - own.children_user - own.children_system)
