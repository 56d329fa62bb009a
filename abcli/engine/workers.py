"""How many contexts are computed at once, and with how many threads each."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import psutil

from abcli.errors import CancelledError
from abcli.native.compute_thread import wait_for
from abcli.native.llama import CancelFlag

# Two threads decode one context 1.3 to 1.8 times as fast as one (135M to 3B, F32 to Q4): about t ** 0.7.
_THREAD_EFFICIENCY = 0.7
_CGROUP_CPU_LIMIT = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True)
class WorkerPlan:
    """`workers` contexts are computed at the same time, each with `threads` threads."""

    workers: int
    threads: int


def plan_workers(buckets: int, cores: int) -> WorkerPlan:
    """The plan that finishes one step of `buckets` contexts first on `cores` cores.

    With w workers of t = cores // w threads a step takes ceil(buckets / w) rounds of 1 / t ** 0.7 each;
    among equals more workers win, since they wait less for each other.
    """
    candidates = [WorkerPlan(workers, cores // workers) for workers in range(1, min(buckets, cores) + 1)]
    return min(
        candidates,
        key=lambda plan: (ceil(buckets / plan.workers) / plan.threads**_THREAD_EFFICIENCY, -plan.workers),
    )


def run_all(pool: Executor, job: Callable[[int], object], count: int, cancel: CancelFlag) -> None:
    """Run job(0) ... job(count - 1) on the pool; wait for all of them, then raise the first error.

    Once `cancel` is set no job begins, and CancelledError is raised.
    """

    def guarded(index: int) -> None:
        if cancel.is_set():
            raise CancelledError
        job(index)

    futures = [pool.submit(guarded, index) for index in range(count)]
    wait_for(futures, cancel.set)
    for future in futures:
        future.result()


def available_cores() -> int:
    """The physical (on Apple Silicon: performance) cores this process may use, at least 1."""
    counts = [psutil.cpu_count(logical=False) or os.cpu_count() or 1]
    if sys.platform == "darwin":
        counts.append(_performance_cores() or counts[0])
    if hasattr(os, "sched_getaffinity"):
        counts.append(len(os.sched_getaffinity(0)))
    try:
        quota, period = _CGROUP_CPU_LIMIT.read_text().split()
        counts.append(ceil(int(quota) / int(period)))
    except (OSError, ValueError):
        pass  # no limit, or no cgroups on this system
    return max(1, min(counts))


def _performance_cores() -> int:
    """Apple's performance cores; the efficiency cores would hold up every step. 0 if unknown."""
    try:
        answer = subprocess.run(
            ["/usr/sbin/sysctl", "-n", "hw.perflevel0.physicalcpu"],
            capture_output=True,
            check=True,
            timeout=5,
        )
        return int(answer.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0
