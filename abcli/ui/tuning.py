"""What a tuning came to, in plain lines."""

from __future__ import annotations

from collections.abc import Iterator

from abcli.evals.statistics import NATIVE, Estimate
from abcli.text import counted
from abcli.tune.judgement import TUNED, Judgement, TaskResult, task_name
from abcli.tune.settings import Step
from abcli.ui.everyday import everyday_lines


def step_line(what: str, step: Step) -> str:
    """A point of the curves of losses."""
    apart = " and ".join(f"{divergence:.4f}" for divergence in step.divergences)
    changes = " and ".join(f"{change:+.4f}" for change in step.changes)
    others = f"other texts: divergence {apart}, loss {changes}"
    return f"{what}: step {step.number}, {step.share:.0%}, loss {step.loss:.3f}, {others}"


def result_lines(judgement: Judgement) -> Iterator[str]:
    """What the tuning, and the controls, are worth on each task, and what becomes of everything else."""
    for result in judgement.results:
        yield from _task_lines(result)
    for what, found in everyday_lines(judgement.everyday):
        yield f"{what}: {found}"
    for reason in judgement.left_out:
        yield f"not judged: {reason}"


def verdict_lines(judgement: Judgement) -> list[str]:
    """What speaks against the tuning, or that nothing does."""
    if not judgement.objections:
        return ["the tuning helps where it was learned, and harms nothing that was measured"]
    return [f"against it: {objection}" for objection in judgement.objections]


def answer_lines(judgement: Judgement) -> Iterator[str]:
    """The everyday prompts with the untuned and the tuned answers, where these differ."""
    for prompt, native, tuned in judgement.answers:
        if native != tuned:
            yield from ("", f"prompt:  {prompt}", f"untuned: {native.strip()}", f"tuned:   {tuned.strip()}")


def _task_lines(result: TaskResult) -> Iterator[str]:
    native = result.of(NATIVE).measures
    summary = result.summary
    yield (
        f"{task_name(result.task)}, {result.length:,} tokens{'' if result.trained else ' (not learned)'}, "
        f"{counted(summary.questions, 'question')} on {counted(summary.groups, 'context')}: untuned "
        f"{native.accuracy.value:.1%} exact, NLL {native.nll.value:.3f}"
    )
    for item in summary.summaries:
        if item.difference is not None and item.configuration != NATIVE:
            name = TUNED if item.configuration == TUNED else f"control, {item.configuration}"
            yield (
                f"  {name}: {item.measures.accuracy.value:.1%} exact ({_points(item.difference.accuracy)}), "
                f"NLL {_change(item.difference.nll)}"
            )


def _points(found: Estimate) -> str:
    return f"{100 * found.value:+.1f} ± {100 * found.error:.1f} points"


def _change(found: Estimate) -> str:
    return f"{found.value:+.3f} ± {found.error:.3f}"
