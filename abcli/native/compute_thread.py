"""The one thread of the process on which llama.cpp computes with several threads.

With OpenMP every thread that begins a parallel region keeps a team of its own. When the teams of a process have more
threads than there are cores, GNU's libgomp no longer lets them spin at barriers: each of the many barriers of a graph
then costs a system call or two, a fifth of a small model's step. One thread for all of it means one team.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from functools import cache
from typing import Any, TypeVar

Result = TypeVar("Result")


@cache
def compute_thread() -> Executor:
    """An executor with that thread; it lives as long as the process and is nobody's to shut down."""
    return ThreadPoolExecutor(1, thread_name_prefix="abcli-compute")


def run_on_compute_thread(job: Callable[[], Result], cancel: Callable[[], None] = lambda: None) -> Result:
    """The result of `job`, computed on that thread, which must not be the caller's.

    An exception that reaches the caller meanwhile, such as KeyboardInterrupt, calls `cancel` and waits for the job
    to end, since what the job uses may be freed next.
    """
    future = compute_thread().submit(job)
    wait_for([future], cancel)
    return future.result()


def wait_for(futures: Sequence[Future[Any]], cancel: Callable[[], None]) -> None:
    """Wait until all have ended; an exception that reaches the caller meanwhile calls `cancel` first and is raised."""
    try:
        wait(futures)
    except BaseException:
        # A signal handler raised: nobody may touch what the jobs use before they have stopped.
        cancel()
        wait(futures)
        raise


if hasattr(os, "register_at_fork"):
    # A child has none of its parent's threads.
    os.register_at_fork(after_in_child=compute_thread.cache_clear)
