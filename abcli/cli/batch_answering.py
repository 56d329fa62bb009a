"""Who answers the prompts of a batch: this process with a model of its own, or the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

from abcli.batch.cluster.driver import ClusterRun
from abcli.batch.cluster.pool import WorkerSetup
from abcli.batch.cluster.ray_pool import RayPool
from abcli.batch.jobs import BadLine, Job, Result
from abcli.batch.progress import Progress, write_results
from abcli.batch.scheduler import Scheduler, StopSwitch, Totals
from abcli.batch.slots import reuse_rule
from abcli.batch.writing import Output
from abcli.chat.template import load_template
from abcli.cli.batch_options import ClusterOptions
from abcli.cli.setup import ready
from abcli.config import BucketConfig, EngineConfig
from abcli.errors import CancelledError
from abcli.ui.batch import batch_progress
from abcli.ui.terminal import Terminal, on_interrupt

Ending = Literal["finished", "interrupted", "failed"]
"""How a run ends; failed: at its first error, as --fail-fast wants it."""


class _Answers(Protocol):
    """A scheduler, or what stands for many."""

    @property
    def finished(self) -> bool:
        """Whether every job has had its result."""

    def results(self) -> Iterator[Result]:
        """The results as they become ready."""


@dataclass(frozen=True)
class Run:
    """What is left to do, and where results and remarks go."""

    items: Iterator[Job | BadLine]
    output: Output
    progress: Progress
    totals: Totals
    terminal: Terminal
    bar: bool
    """Whether a bar may be shown."""
    fail_fast: bool

    def answer_here(
        self, config: EngineConfig, buckets: BucketConfig, template_choice: str | None, *, verbose: bool
    ) -> Ending:
        """Load the model and write the result of every item."""
        with ready(self.terminal, config, buckets, verbose=verbose) as loaded:
            engine = loaded.opened.engine
            template = load_template(loaded.opened.model, template_choice, self.terminal.warn)
            switch = StopSwitch(loaded.generator.cancel)
            return self._write(
                switch,
                lambda show: Scheduler(
                    self.items,
                    engine,
                    loaded.generator,
                    lambda job: template.tokens(job.messages),
                    switch,
                    reuse=reuse_rule(config, engine),
                    totals=self.totals,
                    on_step=show,
                ),
            )

    def answer_on_cluster(self, setup: WorkerSetup, options: ClusterOptions) -> Ending:
        """Let the workers of a cluster load the model, and write the result of every item."""
        with self.terminal.working("joining the cluster"):
            pool = RayPool(setup, options.ray_address, options.ray_workers)
        with pool:
            # Nothing is computed here that would have to be left: the run looks at the switch.
            switch = StopSwitch(lambda: None)
            return self._write(
                switch,
                lambda show: ClusterRun(
                    self.items,
                    pool,
                    switch,
                    totals=self.totals,
                    on_step=show,
                    note=self.terminal.note,
                    warn=self.terminal.warn,
                ),
            )

    def _write(self, switch: StopSwitch, begin: Callable[[Callable[[], None]], _Answers]) -> Ending:
        """Write what `begin` makes of the items; it is given what is to be called after every step."""
        with (
            on_interrupt(switch.press),
            batch_progress(self.terminal, self.progress, self.totals, switch, bar=self.bar) as show,
        ):
            answers = begin(show)
            try:
                if not write_results(answers.results(), self.output, self.progress, fail_fast=self.fail_fast):
                    return "failed"
            except CancelledError:
                return "interrupted"
            return "finished" if answers.finished else "interrupted"
