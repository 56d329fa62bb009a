"""`abcli eval`: whether buckets help on a model and a task, measured on the same questions for all configurations."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import typer

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
from abcli.config import ContextConfig, evaluations_directory, profiles_directory
from abcli.errors import CancelledError, ProfileError, UsageError
from abcli.evals.configurations import Configuration, parse_configuration
from abcli.evals.model_under_test import Subject
from abcli.evals.report import (
    MAX_DEPTHS,
    EvaluationReport,
    make_report,
    read_report,
)
from abcli.evals.runner import TASKS, EvaluationSettings, evaluate
from abcli.evals.tools import FORMER_PROMPT, FORMER_TASK
from abcli.gguf.checked import CheckedModel
from abcli.machine import log_to
from abcli.profiles.lookup import default_profile, named_profile
from abcli.profiles.profile import Profile
from abcli.ui.progress import step_progress
from abcli.ui.terminal import Terminal

_DEFAULT_LENGTH = 1024
_DEFAULT_LIMIT = 200
_DEFAULT_DEPTHS = 5
_DEFAULT_COMPARED = ("native", "spread6", "paper6")
_MAX_LENGTHS = 16


@dataclass(frozen=True)
class QuestionOptions:
    """Which questions are asked, and of which configurations."""

    panel: ClassVar[str] = "Questions"

    length: Annotated[
        list[int] | None,
        flag("Tokens of a context; repeatable.", "--length", show_default=str(_DEFAULT_LENGTH)),
    ] = None
    depths: Annotated[
        int | None,
        flag("Depths, evenly spaced from 0 to 1, taken in turn.", "--depths", show_default=str(_DEFAULT_DEPTHS)),
    ] = None
    limit: Annotated[int | None, flag("Questions for each length.", "--limit", show_default=str(_DEFAULT_LIMIT))] = None
    seed: Annotated[int | None, flag("Other seeds make other questions.", "--seed", "-s", show_default="0")] = None
    data: Annotated[
        Path | None, flag("needle: a text or a directory of .txt files; qa, tools: JSON lines.", "--data")
    ] = None
    answers: Annotated[Path | None, flag("tools: the file of right answers.", "--answers")] = None
    compare: Annotated[
        list[str] | None,
        flag(
            'native, spread6, paper6, profile, profile=NAME, "bases=50000,100000;merge=mean"; repeatable.',
            "--compare",
            metavar="SPEC",
            show_default=", ".join(_DEFAULT_COMPARED) + ", and the model's profile if it has one",
        ),
    ] = None
    fresh: Annotated[bool, flag("Compute everything anew; stored results are neither read nor written.", "--fresh")] = (
        False
    )

    def settings(self, task: str) -> EvaluationSettings:
        """The settings that the flags ask for. Raises UsageError."""
        lengths = tuple(self.length or (_DEFAULT_LENGTH,))
        settings = EvaluationSettings(
            task=task,
            lengths=lengths,
            limit=_DEFAULT_LIMIT if self.limit is None else self.limit,
            seed=self.seed or 0,
            depths=_DEFAULT_DEPTHS if self.depths is None else self.depths,
            data=self.data,
            answers=self.answers,
        )
        check_numbers(
            *(("--length", length, 1, MAX_NUMBER) for length in lengths),
            ("--limit", settings.limit, 1, MAX_NUMBER),
            ("--depths", settings.depths, 1, MAX_DEPTHS),
            ("--seed", settings.seed, 0, MAX_NUMBER),
        )
        if len(set(lengths)) < len(lengths) or len(lengths) > _MAX_LENGTHS:
            listed = ", ".join(map(str, lengths[: _MAX_LENGTHS + 1]))
            raise UsageError(f"the lengths {listed} are not distinct or too many", f"give up to {_MAX_LENGTHS}")
        check_data(task, self.data, self.answers)
        return settings


def evaluation(
    task: Annotated[str | None, typer.Argument(metavar="TASK", help="needle, kv, qa or tools.")] = None,
    model_word: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="GGUF file or name; default: the default model.")
    ] = None,
    *,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="REPORT", help="Show a stored report again, without a task; a model only for --cost."
        ),
    ] = None,
    question_options: QuestionOptions,
    result_options: ResultOptions,
    model_options: ModelOptions,
) -> None:
    """Compare configurations of buckets on the same questions."""
    result_options.check()
    terminal = Terminal()
    if source is not None:
        if result_options.cost and model_word is None:
            # The only word that has a say then is a model.
            task, model_word = None, task
        _check_alone(task, model_word, question_options, result_options, model_options)
        report = read_report(source)
        if result_options.cost:
            report = _costed(terminal, report, model_word, model_options)
    else:
        if task is None or task not in TASKS:
            wrong = "no task is given" if task is None else f"unknown task {task!r:.80}"
            raise UsageError(wrong, f"use one of {', '.join(TASKS)}")
        report = _evaluate(
            terminal, question_options.settings(task), model_word, question_options, result_options, model_options
        )
    deliver(terminal, report, result_options)


def _check_alone(
    task: str | None, model: str | None, questions: QuestionOptions, results: ResultOptions, model_options: ModelOptions
) -> None:
    """Raise UsageError for anything that contradicts --from, which needs a model for --cost alone."""
    others: list[tuple[str, object]] = [("TASK", task), ("--examples", results.examples or None)]
    if not results.cost:
        others += [("MODEL", model), ("--output", results.output)]
    for group in (questions,) if results.cost else (questions, model_options):
        changed = [item for item in fields(group) if getattr(group, item.name) != item.default]
        others += [(f"--{item.name.replace('_', '-')}", getattr(group, item.name)) for item in changed]
    for name, value in others:
        if value is not None:
            raise UsageError(f"{name} contradicts --from, which shows what a report holds", "drop one of them")


def _evaluate(
    terminal: Terminal,
    settings: EvaluationSettings,
    model_word: str | None,
    questions: QuestionOptions,
    results: ResultOptions,
    options: ModelOptions,
) -> EvaluationReport:
    model, config = _checked(model_word, options)
    configurations = _configurations(terminal, questions.compare, model)
    # Before the questions are made of it, so that a file that changes meanwhile is not mistaken for what was asked.
    data = data_files(settings, options.chat_template)
    if options.verbose:
        log_to(sys.stderr.write)
    with terminal.working(f"loading {model.path.name}"):
        scores = None if questions.fresh else evaluations_directory()
        subject = Subject(model, config, options.chat_template, scores, terminal.warn)
    with subject:
        try:
            with step_progress(terminal, settings.task) as progress:
                found = evaluate(settings, configurations, subject, progress)
        except KeyboardInterrupt:
            hint = "" if questions.fresh else "the same command goes on where it stopped"
            raise CancelledError(hint=hint) from None
        recorded = recorded_model(subject)
    report = make_report(settings, found, recorded, data, contexts=results.examples)
    return with_costs(terminal, report, model, config) if results.costs else report


def _costed(
    terminal: Terminal, report: EvaluationReport, model_word: str | None, options: ModelOptions
) -> EvaluationReport:
    """A stored report with what its configurations cost here."""
    model, config = _checked(model_word, options)
    if model.fingerprint != report.model.fingerprint:
        raise UsageError(f"the report is of {report.model.name}, not of {model.name}", "name that model")
    return with_costs(terminal, report, model, config)


def _checked(model_word: str | None, options: ModelOptions) -> tuple[CheckedModel, ContextConfig]:
    return checked_model(
        model_word,
        options,
        "an evaluation",
        prefill='say it for a configuration: --compare "spread6;prefill=exact"',
        prefill_base='say it for a configuration: --compare "spread6;prefill-base=50000"',
    )


def _configurations(terminal: Terminal, texts: Sequence[str] | None, model: CheckedModel) -> list[Configuration]:
    """What is compared: what the user lists, else the usual sets and the model's default profile if it has one."""
    native_base, identity = model.header.native_base, model.fingerprint
    find_profile = partial(_find_profile, terminal, model)
    chosen = list(_DEFAULT_COMPARED if texts is None else texts)
    for text in chosen:
        if chosen.count(text) > 1:
            raise UsageError(f"--compare {text!r:.120} is given twice", "drop one")
    found = [parse_configuration(text, native_base, find_profile) for text in chosen]
    if texts is None:
        try:
            usual = default_profile(profiles_directory(), identity, terminal.warn)
        except ProfileError as error:
            terminal.warn(f"{error.message}; no profile is compared")
        else:
            if usual is not None:
                found.append(parse_configuration("profile", native_base, lambda _name: _told(terminal, usual)))
    return found


def _find_profile(terminal: Terminal, model: CheckedModel, name: str | None) -> Profile:
    """A model's profile by its name, None being the default one. Raises ProfileError."""
    if name is not None:
        return _told(terminal, named_profile(profiles_directory(), model.fingerprint, name, model.name))
    profile = default_profile(profiles_directory(), model.fingerprint, terminal.warn)
    if profile is None:
        raise ProfileError(f"{model.name} has no profile", "`abcli calibrate` makes one")
    return _told(terminal, profile)


def _told(terminal: Terminal, profile: Profile) -> Profile:
    """`profile`, with a warning where it was calibrated on what is asked otherwise today."""
    if profile.task == FORMER_TASK:
        terminal.warn(f"the profile {profile.name} was calibrated on {FORMER_PROMPT}")
    return profile
