"""`abcli tune`: learn a gain for every attention head, prove it on other questions, and store it as a profile."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from abcli.atomic import write_atomically
from abcli.cli._figures import check_destination
from abcli.cli._flags import flag
from abcli.cli._options import ModelOptions
from abcli.cli._questions import MAX_NUMBER, check_data, check_numbers, checked_model
from abcli.config import evaluations_directory, profiles_directory
from abcli.errors import CancelledError, UsageError
from abcli.evals.model_under_test import Subject
from abcli.evals.report import MAX_DEPTHS
from abcli.evals.runner import NEEDS_DATA, TASKS
from abcli.machine import log_to
from abcli.profiles.profile import NO_PROFILE, check_name
from abcli.profiles.store import save
from abcli.ui.progress import stage_progress
from abcli.ui.terminal import Terminal

if TYPE_CHECKING:
    from abcli.tune.tuning import TuningSettings

_DEVICES = ("auto", "cpu", "cuda", "mps")


@dataclass(frozen=True)
class TuningOptions:
    """What is learned from, for how long, and what becomes of it."""

    panel: ClassVar[str] = "Tuning"

    task: Annotated[str, flag("Any of needle, kv, qa and tools.", "--task", metavar="LIST")] = "needle,kv"
    length: Annotated[int, flag("Tokens of a context.", "--length")] = 1024
    questions: Annotated[int, flag("Questions to learn from, of each task.", "--questions")] = 320
    held_out: Annotated[int, flag("Other questions to judge by, of each task and length.", "--held-out")] = 200
    depths: Annotated[int, flag("Depths, evenly spaced from 0 to 1, taken in turn.", "--depths")] = 5
    data: Annotated[Path | None, flag("qa, tools: JSON lines.", "--data")] = None
    answers: Annotated[Path | None, flag("tools: the file of right answers.", "--answers")] = None
    steps: Annotated[int, flag("The most steps of learning.", "--steps")] = 60
    minutes: Annotated[float, flag("The most minutes of learning.", "--minutes")] = 60.0
    contexts: Annotated[int, flag("Contexts in a step.", "--contexts")] = 8
    guard: Annotated[float, flag("Weight of staying the model it was.", "--guard")] = 1.0
    seed: Annotated[int, flag("Other seeds make other questions.", "--seed", "-s")] = 0
    device: Annotated[str, flag("Where torch computes: auto, cpu, cuda or mps.", "--device")] = "auto"
    name: Annotated[str | None, flag("Name of the profile.", "--name", show_default="tuned-TASKS-LENGTH")] = None
    keep: Annotated[bool, flag("Store the profile whatever speaks against it.", "--keep")] = False
    dry_run: Annotated[bool, flag("Store no profile.", "--dry-run")] = False
    output: Annotated[
        Path | None, flag("Write what was found, both answers to every prompt included, as JSON.", "--output", "-o")
    ] = None

    def settings(self) -> TuningSettings:
        """The settings that the flags ask for. Raises UsageError."""
        from abcli.tune.tuning import TuningSettings

        tasks = tuple(dict.fromkeys(task.strip() for task in self.task.split(",")))
        for task in tasks:
            if task not in TASKS:
                raise UsageError(f"unknown task {task!r:.80}", f"use some of {', '.join(TASKS)}")
        if sum(task in NEEDS_DATA for task in tasks) > 1:
            raise UsageError("qa and tools need data of their own each", "tune for one of them at a time")
        for task in tasks:
            if task in NEEDS_DATA or len(tasks) == 1:
                check_data(task, self.data, self.answers)
        check_numbers(
            ("--length", self.length, 1, MAX_NUMBER),
            ("--questions", self.questions, 2, MAX_NUMBER // 2),
            ("--held-out", self.held_out, 1, MAX_NUMBER // 2),
            ("--depths", self.depths, 1, MAX_DEPTHS),
            ("--steps", self.steps, 1, MAX_NUMBER),
            ("--contexts", self.contexts, 1, 1024),
            ("--seed", self.seed, 0, 1_000_000),
        )
        for name, value, most in (("--minutes", self.minutes, 1e5), ("--guard", self.guard, 1e6)):
            if not 0 <= value <= most or (name == "--minutes" and value == 0):
                raise UsageError(f"{name} {value:g} is impossible", f"choose a number up to {most:g}")
        return TuningSettings(
            tasks,
            self.length,
            self.questions,
            self.held_out,
            self.seed,
            self.depths,
            self.data,
            self.answers,
            self.steps,
            self.minutes,
            self.contexts,
            self.guard,
        )

    def check(self) -> None:
        """Raise UsageError for what would only be noticed after the work is done."""
        if find_spec("torch") is None or find_spec("gguf") is None:
            raise UsageError("abcli tune needs torch and gguf, which are not installed", "pip install 'abcli[tune]'")
        if self.device not in _DEVICES:
            raise UsageError(f"--device {self.device!r:.60} is unknown", f"use one of {', '.join(_DEVICES)}")
        if self.keep and self.dry_run:
            raise UsageError("--keep and --dry-run contradict each other", "drop one")
        if self.output is not None:
            check_destination("--output", self.output)


def tune(
    model_word: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="GGUF file or name; default: the default model.")
    ] = None,
    *,
    tuning_options: TuningOptions,
    model_options: ModelOptions,
) -> None:
    """Learn a gain for every attention head from questions, judge it on others, and store it as a profile."""
    tuning_options.check()
    from abcli.tune.devices import torch_device
    from abcli.tune.judgement import judge, make_profile
    from abcli.tune.tuning import learn
    from abcli.tune.twin import check_architecture
    from abcli.ui.tuning import report_lines

    settings = tuning_options.settings()
    name = check_name(tuning_options.name or f"tuned-{'-'.join(settings.tasks)}-{settings.length}")
    model, config = checked_model(
        model_word,
        model_options,
        "tuning",
        prefill="prompts are computed with the gains",
        prefill_base="the profile has the model's own base",
    )
    check_architecture(model.header)
    device = torch_device(tuning_options.device)
    terminal = Terminal()
    if model_options.verbose:
        log_to(sys.stderr.write)
    with terminal.working(f"loading {model.path.name}"):
        subject = Subject(model, config, model_options.chat_template, evaluations_directory(), terminal.warn)
    with subject:
        try:
            with stage_progress(terminal) as progress:
                learned = learn(settings, subject, device, evaluations_directory() / "tuning", progress)
                judgement = judge(settings, learned.gains, subject, progress)
        except KeyboardInterrupt:
            raise CancelledError(hint="the same command goes on where it stopped") from None
        profile = make_profile(name, settings, learned, judgement, subject)
    for line in report_lines(learned, judgement):
        terminal.note(line)
    if tuning_options.output is not None:
        found = {"gains": learned.gains, "steps": [asdict(step) for step in learned.steps], **asdict(judgement)}
        write_atomically(tuning_options.output, json.dumps(found, ensure_ascii=False, indent=1).encode())
    if tuning_options.dry_run:
        terminal.note("no profile is stored (--dry-run)")
    elif judgement.objections and not tuning_options.keep:
        terminal.note("no profile is stored (--keep stores it in any case)")
    else:
        path = save(profile, profiles_directory())
        terminal.note(f"profile {name} is stored: {path}; --profile {NO_PROFILE} does without")
