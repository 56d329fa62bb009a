"""`abcli tune`: learn numbers for every head, prove them on other questions, and store them as a profile."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import typer

from abcli.atomic import write_atomically
from abcli.cli._figures import check_destination
from abcli.cli._flags import flag
from abcli.cli._options import ModelOptions
from abcli.cli._questions import MAX_NUMBER, check_numbers, checked_model
from abcli.config import evaluations_directory, profiles_directory
from abcli.errors import CancelledError, UsageError
from abcli.evals.model_under_test import Subject
from abcli.evals.report import MAX_DEPTHS
from abcli.evals.runner import TASKS
from abcli.machine import log_to
from abcli.profiles.profile import NO_PROFILE, check_name
from abcli.profiles.store import save
from abcli.tune.architecture import check_architecture
from abcli.tune.judgement import Judgement, judge, make_profile
from abcli.tune.material import Sources
from abcli.tune.settings import Kind, Learned, TrainingSettings, TuningSettings
from abcli.ui.progress import stage_progress
from abcli.ui.terminal import Terminal
from abcli.ui.tuning import answer_lines, result_lines, step_line, verdict_lines

Device = Literal["auto", "cpu", "cuda", "mps"]
_NOT_A_NAME = re.compile("[^a-z0-9_.]+")


@dataclass(frozen=True)
class TuningOptions:
    """What is learned from, for how long, and what becomes of it."""

    panel: ClassVar[str] = "Tuning"

    task: Annotated[
        str,
        flag(
            "Any of needle, kv, qa and tools, or a file of prompts and the answers that are wanted, as JSON lines.",
            "--task",
            metavar="LIST",
        ),
    ] = "needle,kv"
    length: Annotated[int, flag("Tokens of a context; of an example, at most.", "--length")] = 1024
    questions: Annotated[int, flag("Questions to learn from, of each task.", "--questions")] = 320
    held_out: Annotated[int, flag("Other questions to judge by, of each task and length.", "--held-out")] = 200
    depths: Annotated[int, flag("Depths, evenly spaced from 0 to 1, taken in turn.", "--depths")] = 5
    qa_data: Annotated[Path | None, flag("qa: JSON lines, as for eval.", "--qa-data", metavar="FILE")] = None
    tools_data: Annotated[Path | None, flag("tools: requests, as for eval.", "--tools-data", metavar="FILE")] = None
    tools_answers: Annotated[
        Path | None, flag("tools: the right calls, as for eval.", "--tools-answers", metavar="FILE")
    ] = None
    answers: Annotated[
        Path | None,
        flag("A file of prompts: what is wanted, as abcli batch writes answers.", "--answers", metavar="FILE"),
    ] = None
    text: Annotated[
        Path | None,
        flag("Prose to stay as good at.", "--text", metavar="FILE", show_default="passages of twelve old books"),
    ] = None
    steps: Annotated[int, flag("The most steps of learning.", "--steps")] = 60
    minutes: Annotated[float, flag("The most minutes of learning, and of each control.", "--minutes")] = 60.0
    contexts: Annotated[int, flag("Contexts in a step.", "--contexts")] = 8
    rate: Annotated[float, flag("Learning rate.", "--rate")] = 0.03
    guard: Annotated[float, flag("Weight of staying the model it was.", "--guard")] = 1.0
    gains: Annotated[bool, flag("Learn a factor on the output of each attention head.", "--gains/--no-gains")] = True
    bases: Annotated[bool, flag("Learn a factor on the RoPE base of each head of keys.", "--bases/--no-bases")] = False
    controls: Annotated[
        bool, flag("Learn the same for all heads, and from wrong answers, to compare with.", "--controls/--no-controls")
    ] = True
    seed: Annotated[int, flag("Other seeds make other questions.", "--seed", "-s")] = 0
    device: Annotated[Device, flag("Where torch computes; auto: on a GPU, if it has one.", "--device")] = "auto"
    name: Annotated[str | None, flag("Name of the profile.", "--name", show_default="tuned-TASKS-LENGTH")] = None
    keep: Annotated[bool, flag("Store the profile whatever speaks against it.", "--keep")] = False
    dry_run: Annotated[bool, flag("Store no profile.", "--dry-run")] = False
    output: Annotated[
        Path | None,
        flag("Write all that was found, the answers included, as JSON.", "--output", "-o", metavar="FILE"),
    ] = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks, each once; a file by its path. Raises UsageError."""
        words = tuple(dict.fromkeys(word.strip() for word in self.task.split(",")))
        for word in words:
            if word not in TASKS and not Path(word).is_file():
                raise UsageError(
                    f"--task {word!r:.120} is neither a task nor a file", f"use some of {', '.join(TASKS)}, or a file"
                )
        if sum(word not in TASKS for word in words) > 1:
            raise UsageError("--task names several files", "put them into one")
        return words

    def settings(self) -> TuningSettings:
        """The settings that the flags ask for. Raises UsageError."""
        check_numbers(
            ("--length", self.length, 1, MAX_NUMBER),
            ("--questions", self.questions, 2, MAX_NUMBER // 2),
            ("--held-out", self.held_out, 1, MAX_NUMBER // 2),
            ("--depths", self.depths, 1, MAX_DEPTHS),
            ("--steps", self.steps, 1, MAX_NUMBER),
            ("--contexts", self.contexts, 1, 1024),
            ("--seed", self.seed, 0, 1_000_000),
        )
        for name, value, least, most in (
            ("--minutes", self.minutes, 1e-3, 1e5),
            ("--rate", self.rate, 1e-6, 1.0),
            ("--guard", self.guard, 0.0, 1e6),
        ):
            if not isfinite(value) or not least <= value <= most:
                raise UsageError(f"{name} {value:g} is impossible", f"choose {least:g} to {most:g}")
        sources = Sources(
            self.questions,
            self.held_out,
            self.seed,
            self.depths,
            self.qa_data,
            self.tools_data,
            self.tools_answers,
            self.answers,
        )
        kinds: dict[Kind, bool] = {"gains": self.gains, "multipliers": self.bases}
        training = TrainingSettings(
            self.steps,
            self.minutes * 60,
            self.contexts,
            self.rate,
            self.guard,
            self.seed,
            learned=tuple(kind for kind, asked in kinds.items() if asked),
        )
        return TuningSettings(self.tasks, self.length, sources, self.text, training, self.controls)

    def check(self) -> None:
        """Raise UsageError for what would only be noticed after the work is done."""
        tasks = self.tasks
        if find_spec("torch") is None or find_spec("gguf") is None:
            raise UsageError("abcli tune needs torch and gguf, which are not installed", "pip install 'abcli[tune]'")
        for task, needed in (
            ("qa", {"--qa-data": self.qa_data}),
            ("tools", {"--tools-data": self.tools_data, "--tools-answers": self.tools_answers}),
        ):
            missing = [name for name, path in needed.items() if path is None]
            # Without being learned from, they are judged by where their data is there.
            if missing and (task in tasks or len(missing) < len(needed)):
                raise UsageError(f"{task} needs {missing[0]} FILE", "scripts/fetch_evaluation_data.py fetches data")
        if self.answers is not None and all(task in TASKS for task in tasks):
            raise UsageError(
                f"--answers {self.answers} has no say in {self.task}", "name a file of prompts with --task"
            )
        if not self.gains and not self.bases:
            raise UsageError("--no-gains without --bases leaves nothing to learn", "give --bases")
        if self.keep and self.dry_run:
            raise UsageError("--keep and --dry-run contradict each other", "drop one")
        if self.output is not None:
            check_destination("--output", self.output)

    def profile_name(self) -> str:
        """What to call the profile. Raises UsageError."""
        words = [task if task in TASKS else Path(task).name.partition(".")[0] for task in self.tasks]
        usual = _NOT_A_NAME.sub("-", f"tuned-{'-'.join(words)}-{self.length}".lower())[:64]
        return check_name(self.name or usual)


def tune(
    model_word: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="GGUF file or name; default: the default model.")
    ] = None,
    *,
    tuning_options: TuningOptions,
    model_options: ModelOptions,
) -> None:
    """Learn a gain, or a RoPE base, for every attention head from questions, and store it as a profile."""
    tuning_options.check()
    settings, name = tuning_options.settings(), tuning_options.profile_name()
    model, config = checked_model(
        model_word,
        model_options,
        "tuning",
        prefill="prompts are computed with what is learned",
        prefill_base="the profile has the model's own base",
    )
    check_architecture(model)
    # torch takes seconds to load, and is an extra.
    from abcli.tune.devices import torch_device
    from abcli.tune.tuning import Listener, learn

    device = torch_device(tuning_options.device)
    terminal = Terminal()
    if model_options.verbose:
        log_to(sys.stderr.write)
    with terminal.working(f"loading {model.path.name}"):
        subject = Subject(model, config, model_options.chat_template, evaluations_directory(), terminal.warn)
    with subject:
        try:
            with stage_progress(terminal) as progress:
                listener = Listener(
                    progress,
                    lambda memory: terminal.note(f"{memory} (torch, {device.type})"),
                    lambda what, step: terminal.note(step_line(what, step)),
                )
                learned = learn(settings, subject, device, evaluations_directory() / "tuning", listener)
                judgement = judge(settings, learned, subject, progress)
        except KeyboardInterrupt:
            raise CancelledError(hint="the same command goes on where it stopped") from None
        profile = make_profile(name, settings, learned, judgement, subject)
    # Before anything is shown: whoever reads it may close the pipe.
    if tuning_options.output is not None:
        found = _found(learned, judgement)
        write_atomically(tuning_options.output, json.dumps(found, ensure_ascii=False, indent=1).encode())
    if tuning_options.dry_run:
        outcome = "no profile is stored (--dry-run)"
    elif judgement.objections and not tuning_options.keep:
        outcome = "no profile is stored (--keep stores it in any case)"
    else:
        path = save(profile, profiles_directory())
        outcome = f"profile {name} is stored: {path}; --profile {NO_PROFILE} does without"
    _show(terminal, judgement, outcome)


def _show(terminal: Terminal, judgement: Judgement, outcome: str) -> None:
    """Results and answers on standard output, the verdict on standard error."""
    for line in (*result_lines(judgement), *answer_lines(judgement)):
        terminal.write(f"{line}\n")
    for line in (*verdict_lines(judgement), outcome):
        terminal.note(line)


def _found(learned: Learned, judgement: Judgement) -> dict[str, Any]:
    """All that was found, ready for JSON."""
    return {
        **asdict(learned.tuning),
        "controls": {name: asdict(tuning) for name, tuning in learned.controls.items()},
        "steps": [asdict(step) for step in learned.steps],
        "twin_divergence": learned.twin_divergence,
        **asdict(judgement),
    }
