"""`abcli calibrate`: finds bases and a merge rule for a model and a task, and stores them if they prove better."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from abcli.calibrate.calibration import PREFILL_MULTIPLIERS, Calibration, CalibrationSettings, calibrate
from abcli.calibrate.judgement import Judgement, Verdict, about, judge, make_profile
from abcli.cli._flags import flag
from abcli.cli._options import ModelOptions
from abcli.cli._questions import (
    MAX_NUMBER,
    ResultOptions,
    check_data,
    check_numbers,
    checked_model,
    data_files,
    deliver,
    recorded_model,
    with_costs,
)
from abcli.config import DEFAULT_BUCKETS, MAX_BUCKETS, MERGE_RULES, MergeRule, evaluations_directory, profiles_directory
from abcli.errors import CancelledError, ProfileError, UsageError
from abcli.evals.model_under_test import Subject
from abcli.evals.report import MAX_DEPTHS, make_report
from abcli.evals.runner import TASKS
from abcli.machine import log_to
from abcli.profiles.lookup import default_profile
from abcli.profiles.profile import NO_PROFILE, Profile, check_name
from abcli.profiles.store import find, save
from abcli.rope.bases import parse_numbers
from abcli.ui.calibration import tried_lines, verdict_text
from abcli.ui.progress import stage_progress
from abcli.ui.terminal import Terminal

_USUAL = CalibrationSettings("needle", 1024)
# A prefill further from the native base than this is never better, and a base given by mistake lies outside.
_LEAST_MULTIPLIER, _MOST_MULTIPLIER = 0.1, 10.0


@dataclass(frozen=True)
class CalibrationOptions:
    """What is asked, and what may be chosen."""

    panel: ClassVar[str] = "Calibration"

    task: Annotated[
        str, flag("needle, kv, qa, tools, or a file of questions as for qa.", "--task", metavar="TASK|FILE")
    ] = _USUAL.task
    length: Annotated[int, flag("Tokens of a context.", "--length")] = _USUAL.length
    buckets: Annotated[int, flag(f"The most buckets to choose, 1 to {MAX_BUCKETS}.", "--buckets", "-k")] = (
        DEFAULT_BUCKETS
    )
    limit: Annotated[int, flag("Questions to choose by.", "--limit")] = _USUAL.limit
    held_out: Annotated[int, flag("Further questions to judge the choice by.", "--held-out")] = _USUAL.held_out
    seed: Annotated[int, flag("Other seeds make other questions.", "--seed", "-s")] = _USUAL.seed
    depths: Annotated[int, flag("Depths, evenly spaced from 0 to 1, taken in turn.", "--depths")] = _USUAL.depths
    data: Annotated[
        Path | None, flag("needle: a text or a directory of .txt files; qa, tools: JSON lines.", "--data")
    ] = None
    answers: Annotated[Path | None, flag("tools: the file of right answers.", "--answers")] = None
    prefill_bases: Annotated[
        str | None,
        flag(
            "Bases for a shared prefill to try, as multiples of the model's own; none for none.",
            "--prefill-bases",
            metavar="LIST",
            show_default=",".join(f"{multiplier:.4g}" for multiplier in PREFILL_MULTIPLIERS),
        ),
    ] = None
    rules: Annotated[
        str | None,
        flag("Merge rules to choose from.", "--rules", metavar="LIST", show_default=",".join(MERGE_RULES)),
    ] = None
    name: Annotated[str | None, flag("Name of the profile.", "--name", metavar="NAME", show_default="TASK-LENGTH")] = (
        None
    )
    keep: Annotated[bool, flag("Store the profile even if it is not proved better.", "--keep")] = False
    dry_run: Annotated[bool, flag("Store no profile.", "--dry-run")] = False
    fresh: Annotated[bool, flag("Compute everything anew; stored results are neither read nor written.", "--fresh")] = (
        False
    )

    def settings(self) -> CalibrationSettings:
        """The settings that the flags ask for. Raises UsageError."""
        task, data = self._task()
        check_numbers(
            ("--length", self.length, 1, MAX_NUMBER),
            ("--buckets", self.buckets, 1, MAX_BUCKETS),
            ("--limit", self.limit, 2, MAX_NUMBER // 2),
            ("--held-out", self.held_out, 1, MAX_NUMBER // 2),
            ("--depths", self.depths, 1, MAX_DEPTHS),
            ("--seed", self.seed, 0, MAX_NUMBER),
        )
        check_data(task, data, self.answers)
        if self.keep and self.dry_run:
            raise UsageError("--keep and --dry-run contradict each other", "drop one")
        return CalibrationSettings(
            task=task,
            length=self.length,
            limit=self.limit,
            held_out=self.held_out,
            seed=self.seed,
            depths=self.depths,
            data=data,
            answers=self.answers,
            buckets=self.buckets,
            rules=self._rules(),
            prefill_multipliers=self._prefill_multipliers(),
        )

    def profile_name(self, task: str) -> str:
        """What the profile is to be called. Raises UsageError."""
        return check_name(f"{task}-{self.length}" if self.name is None else self.name)

    def _task(self) -> tuple[str, Path | None]:
        """The name of the task, and its data."""
        if self.task in TASKS:
            return self.task, self.data
        path = Path(self.task)
        try:
            is_file = path.is_file()
        except OSError:  # a name that is too long
            is_file = False
        if not is_file:
            raise UsageError(f"unknown task {self.task!r:.80}", f"use one of {', '.join(TASKS)}, or name a file")
        if self.data is not None:
            raise UsageError("--task and --data both name a file", "use --task qa --data FILE")
        return "qa", path

    def _rules(self) -> tuple[MergeRule, ...]:
        if self.rules is None:
            return MERGE_RULES
        names = [name.strip() for name in self.rules.split(",")]
        for name in names:
            if name not in MERGE_RULES:
                raise UsageError(f"--rules: unknown merge rule {name!r:.60}", f"use {', '.join(MERGE_RULES)}")
        return tuple(rule for rule in MERGE_RULES if rule in names)

    def _prefill_multipliers(self) -> tuple[float, ...]:
        if self.prefill_bases is None:
            return PREFILL_MULTIPLIERS
        if self.prefill_bases == "none":
            return ()
        multipliers = parse_numbers(self.prefill_bases, "--prefill-bases")
        for multiplier in multipliers:
            if not _LEAST_MULTIPLIER <= multiplier <= _MOST_MULTIPLIER:
                raise UsageError(
                    f"--prefill-bases: {multiplier:g} times the model's own base is out of reach",
                    f"give multiples from {_LEAST_MULTIPLIER:g} to {_MOST_MULTIPLIER:g}, like 0.7071,1.4142",
                )
        return multipliers


def calibration(
    model_word: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="GGUF file or name; default: the default model.")
    ] = None,
    *,
    calibration_options: CalibrationOptions,
    result_options: ResultOptions,
    model_options: ModelOptions,
) -> None:
    """Choose bases, merge rule and prefill base on some questions, judge the choice on others, and store it."""
    result_options.check()
    settings = calibration_options.settings()
    name = calibration_options.profile_name(settings.task)
    model, config = checked_model(
        model_word,
        model_options,
        "a calibration",
        prefill="it finds out which prefill is best",
        prefill_base="name those to try: --prefill-bases 0.7071,1.4142 (multiples of the model's own)",
    )
    terminal = Terminal()
    # Before the questions are made of it, so that a file that changes meanwhile is not mistaken for what was asked.
    data = data_files(settings.asked(), model_options.chat_template)
    if model_options.verbose:
        log_to(sys.stderr.write)
    scores = None if calibration_options.fresh else evaluations_directory()
    with terminal.working(f"loading {model.path.name}"):
        subject = Subject(model, config, model_options.chat_template, scores, terminal.warn)
    with subject:
        try:
            with stage_progress(terminal) as progress:
                found = calibrate(settings, subject, progress)
            with terminal.working("resampling"):
                judgement = judge(found)
        except KeyboardInterrupt:
            hint = "" if calibration_options.fresh else "the same command goes on where it stopped"
            raise CancelledError(hint=hint) from None
        recorded = recorded_model(subject)
        profile = make_profile(name, found, judgement, subject)
    kept = calibration_options.keep or judgement.verdict is Verdict.CALIBRATED
    # Before anything is shown: whoever reads it may close the pipe.
    outcome = _store(terminal, profile) if kept and not calibration_options.dry_run else _not_stored(judgement)
    for line in tried_lines(found):
        terminal.note(line)
    evaluation = replace(found.held_out, about={**found.held_out.about, "calibration": about(found, judgement)})
    report = make_report(settings.asked(), evaluation, recorded, data, contexts=result_options.examples)
    if result_options.costs:
        report = with_costs(terminal, report, model, config)
    deliver(terminal, report, result_options)
    _conclude(terminal, found, judgement, outcome)


def _store(terminal: Terminal, profile: Profile) -> str:
    """Store `profile`; the sentence that says so. Raises ProfileError."""
    directory = profiles_directory()
    try:
        before = find(directory, profile.fingerprint, profile.name, terminal.warn)
    except ProfileError:
        before = None  # a damaged one is replaced, too
    if before is not None:
        terminal.note(f"profile {profile.name} of {before.created:.10} is replaced")
        profile = replace(profile, chosen=before.chosen)
    path = save(profile, directory)
    usual = default_profile(directory, profile.fingerprint, terminal.warn)
    if usual is not None and usual.name != profile.name:
        return (
            f"profile {profile.name} is stored: {path}; {usual.name} stays the default "
            f"until `abcli profiles use {profile.name}`"
        )
    return f"profile {profile.name} is stored: {path}; it is used from now on, --profile {NO_PROFILE} does without"


def _not_stored(judgement: Judgement) -> str:
    if judgement.verdict is Verdict.CALIBRATED:
        return "no profile is stored (--dry-run)"
    if judgement.verdict is Verdict.TOO_FEW:
        return "no profile is stored; hold out more questions (--held-out), or store it in any case (--keep)"
    return "no profile is stored (--keep stores it in any case)"


def _conclude(terminal: Terminal, found: Calibration, judgement: Judgement, outcome: str) -> None:
    terminal.note(verdict_text(judgement, f"spread{found.settings.buckets}"))
    terminal.note(outcome)
