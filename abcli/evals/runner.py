"""Runs an evaluation: the same questions for every configuration, each prompt computed once per kind of prefill."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from abcli.errors import UsageError
from abcli.evals.configurations import Configuration
from abcli.evals.kv import kv
from abcli.evals.model_under_test import Prefill, Subject
from abcli.evals.needle import needle
from abcli.evals.qa import qa
from abcli.evals.questions import Question, Task, TaskSettings
from abcli.evals.scores import Score
from abcli.evals.scoring import score
from abcli.evals.tools import tools
from abcli.native.llama import version
from abcli.version import __version__

TASKS: Mapping[str, Task] = {"needle": needle, "kv": kv, "qa": qa, "tools": tools}
# What a report calls the format in which calls of tools were scored.
CALLS = "calls"
NEEDS_DATA = ("qa", "tools")


@dataclass(frozen=True)
class EvaluationSettings:
    """What is asked, at which lengths; the questions of one length are `TaskSettings`."""

    task: str
    lengths: tuple[int, ...]
    limit: int = 200
    seed: int = 0
    depths: int = 5
    data: Path | None = None
    answers: Path | None = None

    def at(self, length: int) -> TaskSettings:
        """The settings of the questions of one length."""
        return TaskSettings(length, self.limit, self.seed, self.depths, self.data, self.answers)


@dataclass(frozen=True)
class Evaluation:
    """The scores of every configuration on the same questions, and what is needed to repeat them."""

    questions: tuple[Question, ...]
    configurations: tuple[Configuration, ...]
    scores: Mapping[str, tuple[Score, ...]]
    """By the configuration's name, in the order of `questions`."""
    about: Mapping[str, object]
    """Model, versions and settings, ready for JSON."""


def make_questions(settings: EvaluationSettings, subject: Subject) -> list[Question]:
    """The questions of every length, in order. Raises UsageError and EvaluationDataError."""
    if settings.task not in TASKS:
        raise UsageError(f"unknown task {settings.task!r}", f"use one of {', '.join(TASKS)}")
    if not settings.lengths:
        raise UsageError("no length is given", "give `length=1024`")
    task = TASKS[settings.task]
    return [question for length in settings.lengths for question in task(settings.at(length), subject.prompts.count)]


def evaluate(
    settings: EvaluationSettings,
    configurations: Sequence[Configuration],
    subject: Subject,
    on_progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Ask the model of `subject` every question under every configuration; traces that are stored are not recomputed.

    `on_progress` gets (questions done, questions in all), where a question counts once for each way of prefilling.
    Raises UsageError, EvaluationDataError, and what `Subject.trace` raises.
    """
    names = [item.name for item in configurations]
    if len(set(names)) < len(names) or not names:
        raise UsageError("the configurations to compare are not distinct", "give each `compare` once")
    questions = make_questions(settings, subject)
    tokenized = [subject.prompts.tokenize(question) for question in questions]
    by_prefill: dict[Prefill, list[Configuration]] = {}
    for item in configurations:
        by_prefill.setdefault(subject.prefill(item.prefill, item.prefill_base, item.tuning), []).append(item)
    scores: dict[str, tuple[Score, ...]] = {}
    total = len(questions) * len(by_prefill)
    for index, (prefill, group) in enumerate(by_prefill.items()):

        def progress(done: int, _all: int, before: int = index * len(questions)) -> None:
            if on_progress is not None:
                on_progress(before + done, total)

        bases = sorted({base for item in group for base in item.bases})
        traces = subject.trace(tokenized, bases, prefill, progress)
        for item in group:
            scores[item.name] = tuple(score(found, item) for found in traces)
    return Evaluation(
        tuple(questions), tuple(configurations), {name: scores[name] for name in names}, describe(subject, questions)
    )


def describe(subject: Subject, questions: Sequence[Question]) -> dict[str, object]:
    """What an evaluation depends on besides the data and configurations, ready for JSON."""
    config, tools = subject.config, questions[0].tools
    # Reports of `tools` without it are of a prompt of abcli's own.
    calls = {CALLS: subject.prompts.call_format(tools).name} if tools else {}
    return {
        **calls,
        "abcli": __version__,
        "llama.cpp": version(),
        "numpy": np.__version__,
        "prefill of auto": "shared",
        "cache_type_k": config.cache_type_k,
        "cache_type_v": config.cache_type_v,
        "flash_attention": config.flash_attention,
        "ubatch_size": config.ubatch_size,
        "gpu_layers": subject.checked.config.gpu_layers,
    }
