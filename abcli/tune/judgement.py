"""Judges gains in llama.cpp: better where they were learned, no worse elsewhere, and the same model in daily use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from abcli.config import Gains
from abcli.evals.configurations import Configuration
from abcli.evals.model_under_test import Subject
from abcli.evals.runner import NEEDS_DATA, TASKS, evaluate
from abcli.evals.statistics import NATIVE, Estimate, LengthSummary, Summary, summarise
from abcli.profiles.profile import Difference, Evidence, Profile, Score, utc_now
from abcli.text import StageProgress
from abcli.tune.everyday import prompts, prose, repeats_itself
from abcli.tune.tuning import Learned, TuningSettings, answered, opened
from abcli.version import __version__

TUNED = "tuned"
# Plain text may become so much less likely.
_LARGEST_LOSS_RATIO = 1.005


@dataclass(frozen=True)
class TaskResult:
    """One bucket without and with the gains on the same held-out questions."""

    task: str
    length: int
    trained: bool
    """Whether it was learned, at this length."""
    summary: LengthSummary

    @property
    def native(self) -> Summary:
        """Without the gains."""
        return next(item for item in self.summary.summaries if item.configuration == NATIVE)

    @property
    def tuned(self) -> Summary:
        """With them."""
        return next(item for item in self.summary.summaries if item.configuration == TUNED)

    @property
    def difference(self) -> Estimate:
        """Of the negative log-likelihood in nats per token; below 0 the gains are better."""
        difference = self.tuned.difference
        assert difference is not None  # noqa: S101 - the native one is what it is compared with
        return difference.nll


@dataclass(frozen=True)
class DailyUse:
    """What became of other texts: losses in nats per token, and counts of everyday prompts."""

    native_loss: float
    tuned_loss: float
    prompts: int
    equal: int
    """Answers, greedy, that are the same token by token."""
    native_repeating: int
    """Answers that say the same again and again."""
    tuned_repeating: int
    examples: tuple[tuple[str, str, str], ...]
    """Prompts with both answers."""


@dataclass(frozen=True)
class Judgement:
    """All that was found, and what speaks against the gains, in words; nothing if they may be used."""

    results: tuple[TaskResult, ...]
    daily: DailyUse
    objections: tuple[str, ...]


def judge(
    settings: TuningSettings,
    gains: Gains,
    subject: Subject,
    on_progress: StageProgress = lambda _what, _done, _all: None,
) -> Judgement:
    """Compare one bucket without and with `gains`. Raises what evaluating raises."""
    native = Configuration(NATIVE, (subject.native_base,))
    tuned = Configuration(TUNED, (subject.native_base,), gains=gains)
    results = []
    for task, length, trained in _asked(settings, subject.model.trained_context):
        found = evaluate(
            settings.asked(task, length, training=False),
            (native, tuned),
            subject,
            partial(on_progress, f"judging: {task}, {length:,} tokens"),
        )
        (summary,) = summarise(found.questions, dict(found.scores), settings.depths, seed=settings.seed)
        results.append(TaskResult(task, length, trained, summary))
    daily = _daily_use(gains, subject, on_progress)
    return Judgement(tuple(results), daily, tuple(_objections(results, daily)))


def make_profile(
    name: str, settings: TuningSettings, learned: Learned, judgement: Judgement, subject: Subject
) -> Profile:
    """The gains as a profile with the evidence for it: one bucket of the model's own base."""
    scores = []
    for result in judgement.results:
        for summary in (result.native, result.tuned):
            measures = summary.measures
            difference = None
            if summary is not result.native:
                found = result.difference
                difference = Difference(found.value, found.low, found.high)
            scores.append(
                Score(
                    _label(result, summary.configuration),
                    measures.nll.value,
                    measures.accuracy.value,
                    measures.worst_nll.value,
                    difference,
                )
            )
    first = judgement.results[0]
    return Profile(
        name=name,
        fingerprint=subject.checked.fingerprint,
        model=subject.checked.name,
        architecture=subject.checked.header.architecture,
        native_base=subject.native_base,
        bases=(subject.native_base,),
        merge="confidence",
        weights=(),
        prefill="auto",
        prefill_base=None,
        task="+".join(settings.tasks),
        length=settings.length,
        created=utc_now(),
        abcli_version=__version__,
        evidence=Evidence(first.summary.questions, _label(first, TUNED), tuple(scores)),
        gains=learned.gains,
    )


def _label(result: TaskResult, configuration: str) -> str:
    return f"{result.task} {result.length}: {configuration}"


def _asked(settings: TuningSettings, longest: int) -> list[tuple[str, int, bool]]:
    """Tasks and lengths to judge by, those that were learned first; those without data are left out."""
    asked = [(task, settings.length, True) for task in settings.tasks]
    # A question follows the context.
    if 2 * settings.length <= longest * 7 // 8:
        asked += [(task, 2 * settings.length, False) for task in settings.tasks]
    possible = [
        task
        for task in TASKS
        if task not in NEEDS_DATA or (settings.data is not None and (task == "tools") == (settings.answers is not None))
    ]
    return asked + [(task, settings.length, False) for task in possible if task not in settings.tasks]


def _daily_use(gains: Gains, subject: Subject, on_progress: StageProgress) -> DailyUse:
    texts, asked = prose().check, prompts().check
    losses, replies = [], []
    for number, own in enumerate(((), gains)):
        on_progress("judging: plain text and everyday prompts", number, 2)
        with opened(subject, own) as llm:
            scores = [score.log_probability for text in texts for score in llm.score_text(text)]
            losses.append(-sum(scores) / len(scores))
            replies.append(answered(llm, asked))
    on_progress("judging: plain text and everyday prompts", 2, 2)
    pairs = list(zip(*replies, strict=True))
    return DailyUse(
        losses[0],
        losses[1],
        len(asked),
        sum(native.tokens == tuned.tokens for native, tuned in pairs),
        sum(repeats_itself(native.tokens) for native, _ in pairs),
        sum(repeats_itself(tuned.tokens) for _, tuned in pairs),
        tuple((prompt, native.text, tuned.text) for prompt, (native, tuned) in zip(asked, pairs, strict=True)),
    )


def _objections(results: Sequence[TaskResult], daily: DailyUse) -> list[str]:
    found = []
    for result in results:
        difference = result.difference
        place = f"{result.task} at {result.length:,} tokens"
        span = f"{difference.value:+.3f} nats per token, 95 % from {difference.low:+.3f} to {difference.high:+.3f}"
        if not result.summary.reliable:
            found.append(f"{place}: too few contexts to tell ({result.summary.groups})")
        elif result.trained and difference.high >= 0:
            found.append(f"{place} is not better: {span}")
        elif difference.low > 0:
            found.append(f"{place} is worse: {span}")
    if daily.tuned_loss > daily.native_loss * _LARGEST_LOSS_RATIO:
        found.append(
            f"plain text is less likely: {daily.tuned_loss:.3f} against {daily.native_loss:.3f} nats per token"
        )
    if daily.tuned_repeating > daily.native_repeating:
        found.append(
            f"{daily.tuned_repeating} of {daily.prompts} everyday answers repeat themselves, "
            f"{daily.native_repeating} without the gains"
        )
    return found
