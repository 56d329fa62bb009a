"""What a calibration tried, chose and found out, in plain lines for standard error."""

from __future__ import annotations

from collections.abc import Sequence

from abcli.calibrate.calibration import Calibration
from abcli.calibrate.gates import lowest_gate
from abcli.calibrate.judgement import Judgement, Verdict
from abcli.calibrate.selection import Outcome
from abcli.evals.configurations import Configuration
from abcli.evals.statistics import CONFIDENCE, Estimate
from abcli.text import counted

# More would hide the table of the result.
_MOST_TRIED = 6


def tried_lines(calibration: Calibration) -> list[str]:
    """The best that was tried, and what came of other bases for the prefill and of gates."""
    lines = [
        f"tried on {counted(calibration.questions, 'question')}, {counted(calibration.contexts, 'context')} "
        "(cross-validated NLL of the answer, nats per token):",
        *_outcome_lines(calibration.tried[:_MOST_TRIED]),
    ]
    lines += [
        f"  prefill under base {trial.base:g}: {trial.difference:+.3f} ±{trial.error:.3f}"
        f"{', taken' if trial.taken else ''}"
        for trial in calibration.prefills
    ]
    lines += [
        f"  gate {trial.gate:g}: {trial.difference:+.4f} ±{trial.error:.4f}, all buckets asked for {trial.asked:.0%}"
        f"{', taken for --gate auto' if trial.gate == lowest_gate(calibration.gates) else ''}"
        for trial in calibration.gates
    ]
    return [*lines, f"chosen: {choice_text(calibration.chosen)}"]


def choice_text(chosen: Configuration) -> str:
    """The chosen buckets in the flags' words, as in "--bases 50000,100000 --merge mean"."""
    parts = [f"--bases {_listed(chosen.bases)}"]
    if len(chosen.bases) > 1:
        parts.append(f"--merge {chosen.merge}")
    if chosen.weights:
        parts.append(f"--weights {','.join(f'{weight:.4f}' for weight in chosen.weights)}")
    if chosen.prefill_base is not None:
        parts.append(f"--prefill-base {chosen.prefill_base:g}")
    return " ".join(parts)


def verdict_text(judgement: Judgement, spread: str) -> str:
    """The verdict in a sentence with its numbers; `spread` is the name of the default spread."""
    own, other = interval_text(judgement.to_native), interval_text(judgement.to_spread)
    default = interval_text(judgement.spread_to_native)
    if judgement.verdict is Verdict.CALIBRATED:
        return f"the calibrated set is better than one bucket ({own}) and than {spread} ({other})"
    if judgement.verdict is Verdict.UNDECIDED:
        return f"the calibrated set is better than one bucket ({own}), but not clearly better than {spread} ({other})"
    if judgement.verdict is Verdict.SPREAD:
        return f"the default spread, {spread}, is better than one bucket ({default}); the calibrated set is not ({own})"
    if judgement.verdict is Verdict.ONE_BUCKET:
        return (
            f"one bucket (--buckets 1) is as good or better: to it the calibrated set has {own}, {spread} has {default}"
        )
    groups = judgement.summary.groups
    return f"{counted(groups, 'context')} held out: too few to tell whether the calibrated set is better"


def interval_text(estimate: Estimate) -> str:
    """A difference as in "NLL -0.050, 95 % -0.070..-0.030"."""
    return f"NLL {estimate.value:+.3f}, {100 * CONFIDENCE:.0f} % {estimate.low:+.3f}..{estimate.high:+.3f}"


def _outcome_lines(outcomes: Sequence[Outcome]) -> list[str]:
    return [
        f"  {outcome.rule:<10} {counted(outcome.buckets, 'bucket'):>10}  mean {outcome.mean:.3f}  "
        f"worst depth {outcome.worst:.3f}{'  (a set given beforehand)' if outcome.given else ''}"
        for outcome in outcomes
    ]


def _listed(bases: Sequence[float]) -> str:
    return ",".join(f"{base:g}" for base in bases)
