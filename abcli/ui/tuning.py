"""What a tuning came to, in plain lines for standard error."""

from __future__ import annotations

from abcli.text import counted
from abcli.tune.judgement import Judgement, TaskResult
from abcli.tune.tuning import Learned


def report_lines(learned: Learned, judgement: Judgement) -> list[str]:
    """How it was learned, what the gains are worth on each task, what they do elsewhere, and the verdict."""
    daily = judgement.daily
    lines = []
    if learned.steps:
        first, last = learned.steps[0], learned.steps[-1]
        lines.append(f"learned in {counted(last.number, 'step')}: loss {first.loss:.3f} to {last.loss:.3f}")
    lines += [_result_line(result) for result in judgement.results]
    lines += [
        f"plain text: {daily.native_loss:.3f} to {daily.tuned_loss:.3f} nats per token",
        f"{counted(daily.prompts, 'everyday prompt')}: {daily.equal} answers are the same; {daily.native_repeating} "
        f"repeated themselves, {daily.tuned_repeating} do now",
    ]
    if not judgement.objections:
        return [*lines, "the gains help where they were learned, and harm nothing that was measured"]
    return [*lines, *(f"against it: {objection}" for objection in judgement.objections)]


def _result_line(result: TaskResult) -> str:
    native, tuned, difference = result.native.measures, result.tuned.measures, result.difference
    return (
        f"{result.task}, {result.length:,} tokens{'' if result.trained else ' (not learned)'}: right "
        f"{native.accuracy.value:.1%} to {tuned.accuracy.value:.1%}, NLL {difference.value:+.3f} "
        f"(95 % {difference.low:+.3f} to {difference.high:+.3f}), {counted(result.summary.questions, 'question')}"
    )
