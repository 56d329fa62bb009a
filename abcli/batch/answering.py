"""Who answers the prompts of a batch: this process with a model of its own, or the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal, Protocol

from abcli.batch.cluster.driver import ClusterRun
from abcli.batch.cluster.ray_pool import RayPool
from abcli.batch.jobs import BadLine, Job, Result
from abcli.batch.progress import RunProgress, write_results
from abcli.batch.scheduler import Scheduler, StopSwitch, Totals
from abcli.batch.slots import reuse_rule
from abcli.batch.writing import Output
from abcli.errors import CancelledError
from abcli.llm import LLM

Ending = Literal["finished", "interrupted", "failed"]
"""How a run ends; failed: at its first error, if that is wanted."""

Watch = Callable[[StopSwitch], AbstractContextManager[Callable[[], None]]]
"""Lets a person see and stop a run for the time of a block; it gives what is to be called after every step."""


class _Answers(Protocol):
    """A scheduler, or what stands for many."""

    @property
    def finished(self) -> bool:
        """Whether every job has had its result."""

    def results(self) -> Iterator[Result]:
        """The results as they become ready."""


@dataclass(frozen=True)
class Run:
    """What is left to do, and where results go."""

    items: Iterator[Job | BadLine]
    output: Output
    progress: RunProgress
    totals: Totals
    fail_fast: bool
    watch: Watch

    def answer_here(self, llm: LLM) -> Ending:
        """Write the result of every item, answered by `llm`."""
        switch = StopSwitch(llm.generator.cancel)

        def begin(on_step: Callable[[], None]) -> _Answers:
            return Scheduler(
                self.items,
                llm.engine,
                llm.generator,
                lambda job: llm.ask(job.messages, job.options, job.generation),
                switch,
                reuse=reuse_rule(llm),
                totals=self.totals,
                on_step=on_step,
            )

        return self._write(switch, begin)

    def answer_on_cluster(self, pool: RayPool, note: Callable[[str], None], warn: Callable[[str], None]) -> Ending:
        """Write the result of every item, answered by the workers of `pool`."""
        # Nothing is computed here that would have to be left: the run looks at the switch.
        switch = StopSwitch(lambda: None)

        def begin(on_step: Callable[[], None]) -> _Answers:
            return ClusterRun(self.items, pool, switch, totals=self.totals, on_step=on_step, note=note, warn=warn)

        return self._write(switch, begin)

    def _write(self, switch: StopSwitch, begin: Callable[[Callable[[], None]], _Answers]) -> Ending:
        with self.watch(switch) as show:
            answers = begin(show)
            try:
                if not write_results(answers.results(), self.output, self.progress, fail_fast=self.fail_fast):
                    return "failed"
            except CancelledError:
                return "interrupted"
            return "finished" if answers.finished else "interrupted"
