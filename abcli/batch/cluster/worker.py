"""One process of many that answer a batch: opens its own model, decodes in a thread, and is asked what it has done."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from abcli.batch.cluster.pool import Done, Opened, Refusal, WorkerSetup
from abcli.batch.jobs import Job, Result
from abcli.batch.scheduler import Scheduler, StopSwitch, Totals
from abcli.batch.sidecar import describe_versions
from abcli.batch.slots import plan_slots, reuse_rule
from abcli.config import ModelConfig
from abcli.errors import AbcliError, ModelFileError
from abcli.gguf.checked import check_model
from abcli.hub.fetch import Download, fetch
from abcli.hub.locate import BundledName, locate_model
from abcli.hub.names import HubName
from abcli.hub.packaged import fetch_bundled
from abcli.llm import LLM
from abcli.prepare import Prepared

# The longest that a question waits for a result, in seconds; how often a driver hears how far a worker is.
_PATIENCE = 0.5

_Item = TypeVar("_Item")


class Worker:
    """Answers jobs in a thread of its own, which owns the model; the methods are for one other thread."""

    def __init__(self) -> None:
        self._totals = Totals()
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._outbox: SimpleQueue[Result] = SimpleQueue()
        self._opened: SimpleQueue[Opened | Refusal] = SimpleQueue()
        self._warnings: SimpleQueue[str] = SimpleQueue()
        self._switch = StopSwitch(lambda: None)
        self._failure = ""
        self._thread: Thread | None = None

    def describe(self) -> dict[str, Any]:
        """Which programs it has, and where it is; a plain dictionary, which any other version can read."""
        return {"versions": describe_versions(), "host": socket.gethostname(), "process": os.getpid()}

    def open(self, setup: WorkerSetup, processors: int, processes: int) -> Opened | Refusal:
        """Load the model for `processors` threads, on a machine that so many `processes` like this one share."""
        self._thread = Thread(target=self._work, args=(setup, processors, processes), daemon=True)
        self._thread.start()
        return self._opened.get()

    def exchange(self, jobs: Sequence[Job], *, stop: bool = False) -> Done:
        """Take `jobs`, and wait a moment for results; with `stop` finish what is begun, and drop the rest."""
        for job in jobs:
            self._inbox.put(job)
        if stop and not self._switch.stopping:
            self._switch.stopping = True
            self._inbox.put(None)
        alive = self._thread is not None and self._thread.is_alive()
        results = _taken(self._outbox, _PATIENCE if alive else 0)
        # Whatever a thread that has ended before has put there is taken.
        return Done(
            results,
            replace(self._totals),
            ended=not alive,
            failure="" if alive else self._failure,
            warnings=_taken(self._warnings),
        )

    def close(self) -> None:
        """Finish what is begun, and free the model."""
        self._switch.stopping = True
        self._inbox.put(None)
        if self._thread is not None:
            self._thread.join()

    def _work(self, setup: WorkerSetup, processors: int, processes: int) -> None:
        """Open the model, answer what comes, and free the model."""
        try:
            self._answer(setup, processors, processes)
        except AbcliError as error:
            self._failure = error.message
            self._opened.put(Refusal(error.message, error.hint))
        except Exception as error:  # it must reach the one who waits
            self._failure = f"{type(error).__name__}: {error}"
            self._opened.put(Refusal(self._failure))

    def _answer(self, setup: WorkerSetup, processors: int, processes: int) -> None:
        model = check_model(ModelConfig(_locate(setup.model), setup.gpu_layers, setup.lora)).with_tuning(setup.tuning)
        if model.fingerprint != setup.fingerprint:
            raise ModelFileError(
                f"{model.path} is another model than the one of that name where the batch is run",
                "give every machine the same file",
            )
        share = processors if processors < (os.cpu_count() or 1) else 0
        context = replace(setup.context, threads=setup.context.threads or share)
        found = Prepared(model, context, setup.buckets)
        plan = plan_slots(setup.slots, found, processes=processes)
        found = replace(found, context=replace(context, slots=plan.slots))
        with LLM(found, template_source=setup.template, warn=self._warnings.put) as llm:
            self._scheduler = Scheduler(
                self._jobs(),
                llm.engine,
                llm.generator,
                lambda job: llm.ask(job.messages, job.options, job.generation),
                self._switch,
                reuse=reuse_rule(llm),
                totals=self._totals,
            )
            self._opened.put(Opened(plan.slots, plan.text(llm.context_size, len(llm.bases)), _taken(self._warnings)))
            for result in self._scheduler.results():
                self._outbox.put(result)

    def _jobs(self) -> Iterator[Job | None]:
        """The jobs as they come; None where there is none, but the scheduler has something else to do."""
        while True:
            try:
                yield self._inbox.get(block=self._scheduler.idle)
            except Empty:
                yield None


def _taken(queue: SimpleQueue[_Item], seconds: float = 0) -> list[_Item]:
    """What is in a queue; `seconds` is the longest that its first item is waited for."""
    found: list[_Item] = []
    try:
        found.append(queue.get(timeout=seconds))
        while True:
            found.append(queue.get_nowait())
    except Empty:
        return found


class _Silent:
    """Watches a download that nobody sees."""

    def begin(self, download: Download) -> None:
        pass

    def progress(self, done: int, total: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass


def _locate(name: str | None) -> Path:
    """This machine's file of the model. Raises what finding it raises."""
    path = locate_model(name, _fetch)
    if not path.exists():
        raise ModelFileError(
            f"there is no file {path}",
            "put the model at the same path on every machine, or name one of the hub, which each machine fetches",
        )
    return path


def _fetch(name: HubName | BundledName) -> Path:
    if isinstance(name, BundledName):
        return fetch_bundled(name, lambda _text: None)
    return fetch(name, _Silent())
