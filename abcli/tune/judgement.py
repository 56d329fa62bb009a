"""Judges a tuning in llama.cpp: better where it was learned, no worse elsewhere, and the same model in daily use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from abcli.config import UNTUNED, Tuning
from abcli.errors import EvaluationDataError, TemplateError, UsageError
from abcli.evals.configurations import Configuration
from abcli.evals.evidence import evidence, untuned_profile
from abcli.evals.model_under_test import Subject
from abcli.evals.runner import TASKS
from abcli.evals.scores import Score as AnswerScore
from abcli.evals.scoring import score
from abcli.evals.statistics import NATIVE, Estimate, LengthSummary, Summary, summarise
from abcli.evals.traces import Node, Trace
from abcli.profiles.profile import Everyday, Evidence, Profile
from abcli.text import StageProgress
from abcli.tune.everyday import answered, opened, prompts, prose, repeats_itself
from abcli.tune.material import Item
from abcli.tune.settings import Learned, TuningSettings

TUNED = "tuned"
# Plain text may become so much less likely.
_LARGEST_LOSS_RATIO = 1.005
_POWERS = (1.25, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class TaskResult:
    """One bucket untuned and tuned, and with the controls, on the same held-out questions."""

    task: str
    length: int
    trained: bool
    """Whether it was learned, at this length."""
    summary: LengthSummary

    def of(self, configuration: str) -> Summary:
        """What a configuration came to. Raises StopIteration if it was not asked."""
        return next(item for item in self.summary.summaries if item.configuration == configuration)

    @property
    def difference(self) -> Estimate:
        """Of the negative log-likelihood when tuned, in nats per token; below 0 it is better."""
        difference = self.of(TUNED).difference
        assert difference is not None  # noqa: S101 - the native one is what it is compared with
        return difference.nll


@dataclass(frozen=True)
class Judgement:
    """All that was found, and what speaks against the tuning, in words; nothing if it may be used."""

    results: tuple[TaskResult, ...]
    everyday: Everyday
    answers: tuple[tuple[str, str, str], ...]
    """Everyday prompts with both greedy answers, untuned and tuned."""
    left_out: tuple[str, ...]
    """What could not be judged, and why."""
    objections: tuple[str, ...]


def judge(
    settings: TuningSettings,
    learned: Learned,
    subject: Subject,
    on_progress: StageProgress = lambda _what, _done, _all: None,
) -> Judgement:
    """Compare one bucket untuned and tuned. Raises what evaluating raises."""
    results, left_out = [], []
    for task, length, trained in _asked(settings, subject.model.trained_context):
        try:
            items = settings.sources.held(task, length, subject, learned.items.get(task, ()))
        except (UsageError, EvaluationDataError, TemplateError) as error:
            if trained:
                raise
            left_out.append(f"{task_name(task)} at {length:,} tokens: {error.message}")
            continue
        tunings = {NATIVE: UNTUNED, TUNED: learned.tuning}
        if trained:
            tunings.update(learned.controls)
        what = f"judging: {task_name(task)}, {length:,} tokens"
        scores = _scores(items, tunings, subject, partial(on_progress, what), sharpen=trained)
        (summary,) = summarise(items, scores, settings.sources.depths, seed=settings.sources.seed)
        results.append(TaskResult(task, length, trained, summary))
    everyday, answers = _everyday(settings.text, learned.tuning, subject, on_progress)
    return Judgement(tuple(results), everyday, answers, tuple(left_out), tuple(_objections(results, everyday)))


def make_profile(
    name: str, settings: TuningSettings, learned: Learned, judgement: Judgement, subject: Subject
) -> Profile:
    """The tuning as a profile with the evidence for it: one bucket of the model's own base."""
    first = judgement.results[0]
    scores = tuple(
        evidence(summary, _label(result, summary.configuration))
        for result in judgement.results
        for summary in result.summary.summaries
    )
    found = Evidence(first.summary.questions, _label(first, TUNED), scores)
    return replace(
        untuned_profile(name, subject, "+".join(map(task_name, settings.tasks)), settings.length, found),
        gains=learned.tuning.gains,
        everyday=judgement.everyday,
        head_multipliers=learned.tuning.multipliers,
    )


def task_name(task: str) -> str:
    """What to call a task: a file of examples by its name."""
    return task if task in TASKS else Path(task).name


def sharpened(trace: Trace, power: float) -> Trace:
    """A trace as if each distribution were raised to `power` (1 or more) and normalised again.

    Tokens that the trace does not keep are left out of the norm, which flatters it by next to nothing.
    """

    def node(of: Node) -> Node:
        raised = power * of.log_probabilities.astype(np.float64)
        raised -= np.logaddexp.reduce(raised, axis=1, keepdims=True)
        return replace(of, log_probabilities=raised.astype(np.float32))

    return replace(trace, nodes=tuple(map(node, trace.nodes)))


def _scores(
    items: Sequence[Item],
    tunings: Mapping[str, Tuning],
    subject: Subject,
    on_progress: Callable[[int, int], None],
    *,
    sharpen: bool,
) -> dict[str, tuple[AnswerScore, ...]]:
    """The scores of one bucket with each of the tunings, by their names.

    With `sharpen` also those of the native one raised to the power that suits these very questions best: what of an
    improvement such a power gives as well is not seeing better.
    """
    base = subject.native_base
    questions = [item.question for item in items]
    scores, controls = {}, {}
    for number, (name, own) in enumerate(tunings.items()):

        def progress(done: int, _all: int, before: int = number * len(items)) -> None:
            on_progress(before + done, len(items) * len(tunings))

        configuration = Configuration(name, (base,), gains=own.gains, head_multipliers=own.multipliers)
        traces = subject.trace(questions, [base], subject.prefill("auto", None, own), progress)
        scores[name] = tuple(score(found, configuration) for found in traces)
        if sharpen and not own:
            powers = {
                power: tuple(score(sharpened(found, power), configuration) for found in traces) for power in _POWERS
            }
            best = min(powers, key=lambda power: sum(found.nll for found in powers[power]))
            controls[f"{name}, sharpened by {best:g}"] = powers[best]
    return {**scores, **controls}


def _label(result: TaskResult, configuration: str) -> str:
    return f"{task_name(result.task)} {result.length}: {configuration}"


def _asked(settings: TuningSettings, longest: int) -> list[tuple[str, int, bool]]:
    """Tasks and lengths to judge by, those that were learned first; those without data are left out."""
    asked = [(task, settings.length, True) for task in settings.tasks]
    # A question follows the context. Examples are as long as they are.
    if 2 * settings.length <= longest * 7 // 8:
        asked += [(task, 2 * settings.length, False) for task in settings.tasks if task in TASKS]
    others = [task for task in TASKS if task not in settings.tasks and settings.sources.has(task)]
    return asked + [(task, settings.length, False) for task in others]


def _everyday(
    text: Path | None, tuning: Tuning, subject: Subject, on_progress: StageProgress
) -> tuple[Everyday, tuple[tuple[str, str, str], ...]]:
    texts, asked = prose(text).check, prompts().check
    losses, replies, tokens = [], [], 0
    what = "judging: plain text and everyday prompts"
    for before, own in ((0, UNTUNED), (len(asked), tuning)):
        with opened(subject, own) as llm:
            scores = [score.log_probability for passage in texts for score in llm.score_text(passage)]
            losses.append(-sum(scores) / len(scores))
            tokens = len(scores)

            def progress(done: int, before: int = before) -> None:
                on_progress(what, before + done, 2 * len(asked))

            replies.append(answered(subject, llm, asked, progress))
    pairs = list(zip(*replies, strict=True))
    found = Everyday(
        text_tokens=tokens,
        native_loss=losses[0],
        tuned_loss=losses[1],
        prompts=len(asked),
        equal=sum(native.tokens == tuned.tokens for native, tuned in pairs),
        native_repeating=sum(repeats_itself(native.tokens) for native, _ in pairs),
        tuned_repeating=sum(repeats_itself(tuned.tokens) for _, tuned in pairs),
    )
    return found, tuple((prompt, native.text, tuned.text) for prompt, (native, tuned) in zip(asked, pairs, strict=True))


def _objections(results: Sequence[TaskResult], everyday: Everyday) -> list[str]:
    found = []
    for result in results:
        difference = result.difference
        place = f"{task_name(result.task)} at {result.length:,} tokens"
        span = f"{difference.value:+.3f} nats per token, 95 % from {difference.low:+.3f} to {difference.high:+.3f}"
        if not result.summary.reliable:
            found.append(f"{place}: too few contexts to tell ({result.summary.groups})")
        elif result.trained and difference.high >= 0:
            found.append(f"{place} is not better: {span}")
        elif difference.low > 0:
            found.append(f"{place} is worse: {span}")
    if everyday.tuned_loss > everyday.native_loss * _LARGEST_LOSS_RATIO:
        found.append(
            f"plain text is less likely: {everyday.tuned_loss:.3f} against {everyday.native_loss:.3f} nats per token"
        )
    if everyday.tuned_repeating > everyday.native_repeating:
        found.append(
            f"{everyday.tuned_repeating} of {everyday.prompts} everyday answers repeat themselves, "
            f"{everyday.native_repeating} untuned"
        )
    return found
