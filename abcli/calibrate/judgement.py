"""Judges a choice on questions that it was not made by, and turns it into a profile with the evidence for it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import Enum

from abcli.calibrate.calibration import CALIBRATED, Calibration
from abcli.calibrate.gates import lowest_gate
from abcli.evals.evidence import evidence, untuned_profile
from abcli.evals.model_under_test import Subject
from abcli.evals.scores import Score as AnswerScore
from abcli.evals.statistics import Estimate, LengthSummary, summarise
from abcli.evals.tools import CALIBRATED_ON
from abcli.profiles.profile import Evidence, Profile


class Verdict(Enum):
    """What a calibration comes to."""

    CALIBRATED = "calibrated"
    """The choice is better than the native base and than the default spread, both beyond the error."""
    UNDECIDED = "undecided"
    """It is better than the native base, but not, beyond the error, than the default spread."""
    SPREAD = "spread"
    """The default spread is better than the native base; the choice is not."""
    ONE_BUCKET = "one bucket"
    """Neither is better than the native base."""
    TOO_FEW = "too few contexts"
    """There are too few contexts to tell."""


@dataclass(frozen=True)
class Judgement:
    """The statistics of the questions held out. Differences are those of NLL; below 0 the first is better."""

    summary: LengthSummary
    verdict: Verdict
    to_native: Estimate
    to_spread: Estimate
    spread_to_native: Estimate


def judge(calibration: Calibration) -> Judgement:
    """Compare the choice with the native base and the default spread, by paired bootstrap over contexts.

    Raises EvaluationDataError for a likelihood that is no finite number.
    """
    settings, held_out = calibration.settings, calibration.held_out
    spread = f"spread{settings.buckets}"

    def summarised(scores: dict[str, tuple[AnswerScore, ...]]) -> LengthSummary:
        return summarise(held_out.questions, scores, settings.depths, seed=settings.seed)[0]

    summary = summarised(dict(held_out.scores))
    # Without the native base, the first one is the baseline.
    among = summarised({name: held_out.scores[name] for name in (spread, CALIBRATED)})
    to_native, to_spread = _difference(summary, CALIBRATED), _difference(among, CALIBRATED)
    spread_to_native = _difference(summary, spread)
    verdict = decide(to_native, to_spread, spread_to_native, reliable=summary.reliable)
    return Judgement(summary, verdict, to_native, to_spread, spread_to_native)


def decide(to_native: Estimate, to_spread: Estimate, spread_to_native: Estimate, *, reliable: bool) -> Verdict:
    """The verdict on differences of NLL, each of which counts only if its 95 % interval lies below 0."""
    if not reliable:
        return Verdict.TOO_FEW
    if to_native.high < 0:
        return Verdict.CALIBRATED if to_spread.high < 0 else Verdict.UNDECIDED
    return Verdict.SPREAD if spread_to_native.high < 0 else Verdict.ONE_BUCKET


def make_profile(name: str, calibration: Calibration, judgement: Judgement, subject: Subject) -> Profile:
    """The choice as a profile called `name` of the model of `subject`."""
    chosen, settings = calibration.chosen, calibration.settings
    task = CALIBRATED_ON if settings.task == "tools" else settings.task
    scores = tuple(evidence(item, item.configuration) for item in judgement.summary.summaries)
    found = Evidence(judgement.summary.questions, CALIBRATED, scores)
    return replace(
        untuned_profile(name, subject, task, settings.length, found),
        bases=chosen.bases,
        merge=chosen.merge,
        weights=chosen.weights,
        prefill=chosen.prefill,
        prefill_base=chosen.prefill_base,
        gate=lowest_gate(calibration.gates) if calibration.gates else None,
    )


def about(calibration: Calibration, judgement: Judgement) -> dict[str, object]:
    """What a report says of how the choice came about, ready for JSON; losses are in nats per token."""
    settings = calibration.settings
    tried = [
        {
            "merge": item.rule,
            "buckets": item.buckets,
            "given": item.given,
            "cross_validated_nll": item.mean,
            "worst_depth_nll": item.worst,
        }
        for item in calibration.tried
    ]
    return {
        "verdict": judgement.verdict.value,
        "nll_to_native": asdict(judgement.to_native),
        "nll_to_spread": asdict(judgement.to_spread),
        "questions": calibration.questions,
        "contexts": calibration.contexts,
        "buckets": settings.buckets,
        "rules": list(settings.rules),
        "bases": list(calibration.bases),
        "tried": tried,
        "prefill_bases": [asdict(trial) for trial in calibration.prefills],
        "gates": [asdict(trial) for trial in calibration.gates],
        "chosen": asdict(calibration.chosen),
    }


def _difference(summary: LengthSummary, name: str) -> Estimate:
    found = next(item for item in summary.summaries if item.configuration == name)
    if found.difference is None:
        raise ValueError(f"{name} is what the others are compared with")
    return found.difference.nll
