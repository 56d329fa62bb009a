"""Workers as actors of a Ray cluster, which Ray starts on the machines and whose death it notices.

Ray is imported when the first pool is made: it is large, and an extra.
"""

from __future__ import annotations

import os
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import Any, Literal

from abcli.batch.cluster.placement import Node, Place, place_workers
from abcli.batch.cluster.pool import Died, Done, Event, Joined, Opened, Refusal, Refused, WorkerReport, WorkerSetup
from abcli.batch.cluster.worker import Worker
from abcli.batch.jobs import Job
from abcli.batch.sidecar import describe_versions, find_differences
from abcli.errors import BatchError, UsageError

ENV_ADDRESS = "RAY_ADDRESS"
# Nothing large goes through Ray's store of objects; this is about the least that it takes.
_STORE_BYTES = 80 << 20
_CONNECT_SECONDS = 10
_MOST_REASON = 200

_Call = Literal["describe", "open", "exchange"]


class RayPool:
    """A pool of actors, see `Pool`. Use it as a context manager, or close it."""

    def __init__(self, setup: WorkerSetup, address: str | None = None, workers: int | None = None) -> None:
        """Join the cluster at `address` (or $RAY_ADDRESS), or start one on this machine.

        `address` is "HOST:PORT", or "auto" for the cluster to which this machine belongs. `workers`: None for one on
        every machine. Raises UsageError if Ray is not installed or for more workers than processors, and BatchError
        for a cluster that cannot be joined or started.
        """
        self._setup = setup
        self._calls: dict[Any, tuple[int, _Call]] = {}
        self._actors: dict[int, Any] = {}
        self._hosts: dict[int, str] = {}
        self._stack = ExitStack()
        with ExitStack() as opening:
            opening.callback(self.close)
            self._ray = self._stack.enter_context(_connected(address or os.environ.get(ENV_ADDRESS) or None))
            nodes = [_node(entry) for entry in self._ray.nodes() if entry["Alive"]]
            self._places = place_workers(nodes, workers, setup.context.threads, use_gpus=setup.gpu_layers != 0)
            opening.pop_all()
        self.workers = len(self._places)

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, worker: int) -> None:
        """See `Pool`; at another place if the machine is gone."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        place = self._places[worker]
        self._actors[worker] = (
            self._ray.remote(Worker)
            .options(
                num_cpus=place.processors,
                num_gpus=place.gpus,
                max_restarts=0,
                scheduling_strategy=NodeAffinitySchedulingStrategy(place.node.identifier, soft=True),
            )
            .remote()
        )
        self._ask(worker, "describe")

    def exchange(self, worker: int, jobs: Sequence[Job], *, stop: bool) -> None:
        """See `Pool`."""
        self._ask(worker, "exchange", list(jobs), stop=stop)

    def wait(self, seconds: float) -> list[Event]:
        """See `Pool`."""
        if not self._calls:
            time.sleep(seconds)
            return []
        calls = list(self._calls)
        done, _ = self._ray.wait(calls, timeout=seconds)
        if done:
            done, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        return [event for call in done for event in self._result(call)]

    def close(self) -> None:
        """See `Pool`; leaves the cluster, or ends the one that was started."""
        for worker in list(self._actors):
            self._end(worker)
        self._stack.close()

    def _ask(self, worker: int, what: _Call, *arguments: Any, **named: Any) -> None:
        call = getattr(self._actors[worker], what).remote(*arguments, **named)
        self._calls[call] = (worker, what)

    def _result(self, call: Any) -> Iterator[Event]:
        """What the answer to a call means."""
        worker, what = self._calls.pop(call)
        try:
            answer = self._ray.get(call)
        except self._ray.exceptions.RayError as error:
            self._end(worker)
            yield _problem(worker, error)
            return
        if what == "describe":
            yield from self._open(worker, answer)
        elif what == "open":
            yield self._opened(worker, answer)
        else:
            yield from self._done(worker, answer)

    def _open(self, worker: int, description: dict[str, Any]) -> Iterator[Event]:
        """Let a worker that has begun open the model, if it has the same programs as this process."""
        host = self._hosts[worker] = str(description["host"])
        differences = find_differences(describe_versions(), description["versions"])
        if differences:
            problem = f"{host} has other versions than this machine (here -> there): {'; '.join(differences)}"
            yield Refused(worker, BatchError(problem, "install the same on every machine"))
            return
        place: Place = self._places[worker]
        self._ask(worker, "open", self._setup, place.processors, place.processes)

    def _opened(self, worker: int, answer: Opened | Refusal) -> Event:
        host = self._hosts[worker]
        if isinstance(answer, Refusal):
            return Refused(worker, BatchError(f"worker {worker + 1} on {host}: {answer.message}", answer.hint))
        return Joined(worker, answer.slots, f"on {host}: {answer.plan}", answer.warnings)

    def _done(self, worker: int, answer: Done) -> Iterator[Event]:
        yield WorkerReport(worker, answer.results, answer.totals, answer.ended, answer.warnings)
        if answer.failure:
            self._end(worker)
            yield Died(worker, answer.failure)

    def _end(self, worker: int) -> None:
        actor = self._actors.pop(worker, None)
        if actor is not None:
            # It may have ended by itself, and so may the cluster.
            with suppress(self._ray.exceptions.RayError, RuntimeError, ValueError):
                self._ray.kill(actor)


def _problem(worker: int, error: Exception) -> Event:
    """What an error of Ray's means: that a worker has died, or that none can live there."""
    text = str(error)
    if "ModuleNotFoundError: No module named 'abcli" in text:
        return Refused(
            worker,
            BatchError(
                "a machine of the Ray cluster does not have this version of abcli",
                "install the same on every machine, for the Python that runs Ray there",
            ),
        )
    return Died(worker, _reason(text))


def _reason(text: str) -> str:
    """Why a worker died, in few words: Ray explains at length."""
    if "worker process has died" in text:
        return "its process was killed or has crashed"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    because = "The actor is dead because "
    chosen = next((line for line in lines if line.startswith(because)), lines[0] if lines else "no reason given")
    chosen = chosen.removeprefix(because)
    return chosen if len(chosen) <= _MOST_REASON else f"{chosen[:_MOST_REASON]}..."


def _node(entry: dict[str, Any]) -> Node:
    resources = entry.get("Resources", {})
    return Node(str(entry["NodeID"]), int(resources.get("CPU", 0)), int(resources.get("GPU", 0)))


@contextmanager
def _connected(address: str | None) -> Iterator[Any]:
    """Ray, joined to the cluster at `address`, or to one that is started on this machine and ends with the block."""
    # Ray reads these when it is imported. Nothing is sent to its makers.
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is None:
        # A cluster of one machine is nobody else's: it listens on loopback, and asks for a token.
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    else:
        _check_reachable(address)
    try:
        import ray
    except ImportError as error:
        raise UsageError("`ray` needs Ray, which is not installed", "pip install 'abcli[ray]'") from error
    with ExitStack() as stack:
        # Ray tells of its workers' deaths on standard output, which is for answers.
        stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))))
        options: dict[str, Any] = {"address": address}
        if address is None:
            directory = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="abcli-", dir=_short_directory(), ignore_cleanup_errors=True)
            )
            options = {
                "address": "local",
                "include_dashboard": False,
                "object_store_memory": _STORE_BYTES,
                "_temp_dir": directory,
            }
        stack.callback(ray.shutdown)
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", **options)
        except Exception as error:  # Ray raises many kinds, and assertions too
            raise _not_connected(address, error) from error
        yield ray


def _short_directory() -> str | None:
    """Where Ray's sockets may lie, whose whole paths must not be longer than about 100 bytes; None for the default."""
    chosen = os.environ.get("RAY_TMPDIR")
    # The default on macOS is long.
    return chosen or ("/tmp" if os.name == "posix" else None)  # noqa: S108


def _check_reachable(address: str) -> None:
    """Raise UsageError for an address that is none, BatchError if nobody listens there, for which Ray takes minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or "/" in host:
        raise UsageError(f"{address!r:.80} is no address of a Ray cluster", "write HOST:PORT, as `ray start` shows it")
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BatchError(
            f"nothing answers at {address}: {reason}",
            "start a cluster there with `ray start --head`, or check the address",
        ) from None


def _not_connected(address: str | None, error: Exception) -> BatchError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if address is None:
        return BatchError(
            f"Ray cannot start a cluster on this machine: {reason:.300}",
            "its files are in $RAY_TMPDIR, else in /tmp: name a directory with a short path and space",
        )
    return BatchError(
        f"cannot join the Ray cluster at {address}: {reason:.300}",
        "run this on a machine of the cluster, with the same Python and Ray; RAY_AUTH_MODE=token if it asks for one",
    )
