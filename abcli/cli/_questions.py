"""What `eval` and `calibrate` share: checks of what is asked, the data behind it, and where the result goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from abcli.bench.costs import Costed, measure_costs
from abcli.chat.known_templates import KNOWN_TEMPLATES
from abcli.cli._figures import FigureOptions, check_destination
from abcli.cli._flags import flag
from abcli.cli._options import ModelOptions
from abcli.config import DEFAULT_CONTEXT, Buckets, ContextConfig
from abcli.errors import OutOfMemoryError, UsageError
from abcli.evals.model_under_test import Subject
from abcli.evals.report import (
    DataFile,
    EvaluationReport,
    RecordedCost,
    RecordedModel,
    data_file,
    encode_report,
    write_report,
)
from abcli.evals.runner import CALLS, NEEDS_DATA, EvaluationSettings
from abcli.evals.statistics import LengthSummary
from abcli.evals.tools import FORMER_PROMPT, FORMER_TASK
from abcli.gguf.checked import CheckedModel, check_model
from abcli.ui.evaluation import depth_figure, show_evaluation
from abcli.ui.plots import depth_image
from abcli.ui.progress import stage_progress
from abcli.ui.report_pages import evaluation_page
from abcli.ui.terminal import Terminal

MAX_NUMBER = 2**31 - 1
# Where no terminal sets a limit, no line of a table is folded.
_PLAIN_WIDTH = 250


@dataclass(frozen=True)
class ResultOptions(FigureOptions):
    """Where the result goes."""

    output: Annotated[Path | None, flag("Write the report, as JSON.", "--output", "-o", metavar="FILE")] = None
    examples: Annotated[bool, flag("Put the contexts themselves into the report.", "--examples")] = False
    as_json: Annotated[bool, flag("Print the report instead of tables.", "--json")] = False
    plot: Annotated[
        bool | None,
        flag("Bars by depth in the terminal.", "--plot/--no-plot", show_default="on a terminal"),
    ] = None

    cost: Annotated[
        bool | None,
        flag("Measure tokens/s and memory of each configuration, too.", "--cost/--no-cost", show_default="with --html"),
    ] = None

    @property
    def costs(self) -> bool:
        """Whether costs are to be measured."""
        return self.html is not None if self.cost is None else self.cost

    def check(self) -> None:
        """Raise UsageError for what would only be noticed after the work is done."""
        if self.output is not None:
            check_destination("--output", self.output)
        super().check()
        if self.examples and self.output is None and not self.as_json:
            raise UsageError("--examples is for a report", "say where it goes: --output FILE or --json")


def check_numbers(*numbers: tuple[str, int, int, int]) -> None:
    """Raise UsageError for a (flag, value, least, most) whose value is out of its range."""
    for name, value, least, most in numbers:
        if not least <= value <= most:
            raise UsageError(f"{name} {value} is impossible", f"choose {least} to {most}")


def check_data(task: str, data: Path | None, answers: Path | None) -> None:
    """Raise UsageError for --data and --answers that `task` lacks or does not use."""
    needed = {"--data": task in NEEDS_DATA, "--answers": task == "tools"}
    possible = {"--data": task != "kv", "--answers": task == "tools"}
    for name, path in (("--data", data), ("--answers", answers)):
        if path is None and needed[name]:
            raise UsageError(
                f"{task} needs {name} FILE", "scripts/fetch_evaluation_data.py fetches data, or says where it is"
            )
        if path is not None and not possible[name]:
            raise UsageError(f"{name} {path} has no say in {task}", "drop it")


def checked_model(
    model: str | None, options: ModelOptions, work: str, *, prefill: str, prefill_base: str
) -> tuple[CheckedModel, ContextConfig]:
    """The model, checked, and how llama.cpp runs it.

    Raises UsageError for flags that `work`, such as "an evaluation", decides itself; `prefill` and `prefill_base`
    are the hints that go with two of them.
    """
    for name, wrong, hint in (
        ("--ctx-size", options.ctx_size != DEFAULT_CONTEXT, "the context is made as long as the questions: --length"),
        ("--prefill", options.prefill is not None, prefill),
        ("--prefill-base", options.prefill_base is not None, prefill_base),
        ("--engine", options.engine == "fused", "every base has a context of its own here"),
        (
            "--prompt-cache",
            options.prompt_cache or options.prompt_cache_dir is not None,
            f"{work} stores its own results",
        ),
    ):
        if wrong:
            raise UsageError(f"{name} has no say in {work}", hint)
    return check_model(options.model_config(model)), replace(options.context_config(), engine="contexts")


def recorded_model(subject: Subject) -> RecordedModel:
    """What a report says of the model."""
    model = subject.checked
    return RecordedModel(model.name, model.fingerprint, model.header.architecture, subject.native_base)


def data_files(settings: EvaluationSettings, chat_template: str | None) -> list[DataFile]:
    """What a report says of the files behind the questions and of --chat-template. Raises EvaluationDataError."""
    files = (("--data", settings.data), ("--answers", settings.answers))
    data = [data_file(name, path) for name, path in files if path is not None]
    if chat_template is not None:
        name, path = "--chat-template", Path(chat_template)
        # What is neither a file nor a known template, loading will complain about.
        known = chat_template in KNOWN_TEMPLATES or not path.is_file()
        data.append(DataFile(name, path.name, "") if known else data_file(name, path))
    return data


def with_costs(
    terminal: Terminal, report: EvaluationReport, model: CheckedModel, config: ContextConfig
) -> EvaluationReport:
    """The report with what its configurations cost on this machine; as it is, with a warning, where memory is short."""
    sets = {
        one.name: Costed(
            Buckets(one.bases, one.prefill_base or model.header.native_base, one.merge, one.weights),
            one.prefill,
            one.tuning,
        )
        for one in report.configurations
    }
    usual = replace(config, engine="auto")
    try:
        with stage_progress(terminal) as progress:
            costs = measure_costs(model, usual, sets, max(report.lengths), progress)
    except OutOfMemoryError as error:
        terminal.warn(f"{error.message}; costs are left out")
        return report
    return replace(
        report,
        costs={
            name: RecordedCost(cost.speed.median, cost.speed.low, cost.speed.high, cost.memory)
            for name, cost in costs.items()
        },
    )


def deliver(terminal: Terminal, report: EvaluationReport, options: ResultOptions) -> None:
    """Write the report and the figures that are asked for, then show the result on standard output."""
    with terminal.working("resampling"):
        summaries = report.summaries()
    if options.output is not None:
        write_report(options.output, report, summaries)
    if report.task == FORMER_TASK and CALLS not in report.about:
        terminal.warn(f"the report is of {FORMER_PROMPT}: do not compare it with figures of today")
    title = f"{report.task}, {report.model.name}"
    options.write(
        lambda image_format: depth_image(depth_figure(title, summaries), image_format),
        lambda: evaluation_page(report, summaries),
    )
    if options.as_json:
        terminal.write(encode_report(report, summaries).decode())
        return
    _show(terminal, report, summaries, plot=terminal.output_is_terminal if options.plot is None else options.plot)


def _show(terminal: Terminal, report: EvaluationReport, summaries: Sequence[LengthSummary], *, plot: bool) -> None:
    settings: dict[str, Any] = {} if terminal.output_is_terminal else {"width": _PLAIN_WIDTH}
    console = Console(file=terminal.output, highlight=False, emoji=False, **settings)
    unicode = (terminal.output.encoding or "").lower().startswith("utf")
    show_evaluation(console, report.task, summaries, bars=plot, unicode=unicode)
