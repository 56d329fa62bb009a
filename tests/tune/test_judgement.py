"""A verdict follows from the figures, and a profile carries them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.config import ContextConfig, Tuning
from abcli.evals.model_under_test import Subject
from abcli.evals.prompts import TokenizedQuestion
from abcli.evals.scores import Score
from abcli.evals.statistics import summarise
from abcli.evals.traces import Node, Trace
from abcli.profiles.profile import Everyday, decode, encode
from abcli.tune import everyday
from abcli.tune import judgement as module
from abcli.tune.everyday import Halves
from abcli.tune.judgement import Judgement, TaskResult, _objections, judge, make_profile, sharpened
from abcli.tune.material import Item
from abcli.tune.material import Sources as Files
from abcli.tune.settings import Learned, TuningSettings
from abcli.ui.tuning import result_lines, verdict_lines
from tests.profiles.samples import FINGERPRINT
from tests.support.models import checked_model

SAME = Everyday(1000, 3.0, 3.0, 50, 20, 1, 1)


def result(task: str, change: float, *, trained: bool = True, contexts: int = 20, **controls: float) -> TaskResult:
    """What differences of NLL, nearly the same for all questions, come to."""
    items = [
        Item(str(number // 2), 0.5, 128, (number,), TokenizedQuestion((1,), ((2,),))) for number in range(2 * contexts)
    ]
    noise = np.random.default_rng(0).normal(0, 0.1, len(items))

    def scores(mean: float) -> tuple[Score, ...]:
        return tuple(Score(2 + mean + (0.1 + abs(mean)) * float(of), of > 0) for of in noise)

    native = tuple(replace(score, nll=2.0) for score in scores(0))
    named = {"native": native, "tuned": scores(change), **{name: scores(mean) for name, mean in controls.items()}}
    (summary,) = summarise(items, named, 2)
    return TaskResult(task, 128, trained, summary)


CASES: dict[str, tuple[Sequence[TaskResult], Everyday, list[str]]] = {
    "better": ([result("needle", -0.5)], SAME, []),
    "better, and elsewhere no worse": ([result("needle", -0.5), result("kv", 0.0, trained=False)], SAME, []),
    "not better": ([result("needle", 0.0)], SAME, ["needle at 128 tokens is not better"]),
    "worse": ([result("needle", 0.5)], SAME, ["needle at 128 tokens is not better"]),
    "worse elsewhere": (
        [result("needle", -0.5), result("kv", 0.5, trained=False)],
        SAME,
        ["kv at 128 tokens is worse"],
    ),
    "too few": ([result("needle", -0.5, contexts=9)], SAME, ["too few contexts to tell (9)"]),
    "text a little worse": ([result("needle", -0.5)], replace(SAME, tuned_loss=3.0149), []),
    "text worse": ([result("needle", -0.5)], replace(SAME, tuned_loss=3.016), ["plain text is less likely"]),
    "repetitions": ([result("needle", -0.5)], replace(SAME, tuned_repeating=2), ["2 of 50 everyday answers repeat"]),
}


@pytest.mark.parametrize("case", CASES)
def test_what_speaks_against_a_tuning(case: str) -> None:
    results, everyday, wanted = CASES[case]
    found = _objections(results, everyday)
    assert len(found) == len(wanted)
    assert all(start in objection for start, objection in zip(wanted, found, strict=True))


TUNING = Tuning(((0.5, 1.5), (1.0, 2.0)), ((1.5, 0.5),) * 2)
LEARNED = Learned(TUNING, (), 0.01, {}, {"control": Tuning(((1.1, 1.1),) * 2)})


def subject(**header: Any) -> Subject:
    checked = SimpleNamespace(
        fingerprint=FINGERPRINT, name="model.gguf", header=SimpleNamespace(architecture="llama", **header)
    )
    return cast(Subject, SimpleNamespace(checked=checked, native_base=10_000.0))


def test_a_profile_carries_the_figures() -> None:
    results = (result("needle", -0.5, control=-0.1), result("kv", 0.0, trained=False))
    judgement = Judgement(results, SAME, (("hello", "a", "b"),), ("tools at 128 tokens: no data",), ())
    settings = TuningSettings(("needle", "/somewhere/mine.jsonl"), 128)
    profile = make_profile("mine", settings, LEARNED, judgement, subject())
    assert decode(encode(profile), "it") == profile
    assert profile.task == "needle+mine.jsonl"
    assert profile.tuning == LEARNED.tuning
    assert profile.bases == (10_000.0,)
    assert profile.everyday == SAME
    assert profile.evidence.own.configuration == "needle 128: tuned"
    assert [score.configuration for score in profile.evidence.scores] == [
        "needle 128: native",
        "needle 128: tuned",
        "needle 128: control",
        "kv 128: native",
        "kv 128: tuned",
    ]
    own = profile.evidence.own.difference
    assert own is not None
    assert own.low < own.mean < own.high < 0


def test_a_report_says_it_all() -> None:
    judgement = Judgement((result("needle", -0.5, control=-0.1),), SAME, (), ("tools: no data",), ())
    text = "\n".join(result_lines(judgement))
    assert "needle, 128 tokens, 40 questions on 20 contexts: untuned " in text
    assert "  tuned: " in text
    assert "control, control: " in text
    assert "points)" in text
    assert "plain text: NLL 3.000 to 3.000, 1,000 tokens" in text
    assert "20 of 50 answers are the same; 1 repeated themselves, 1 do now" in text
    assert "not judged: tools: no data" in text
    assert verdict_lines(judgement) == ["the tuning helps where it was learned, and harms nothing that was measured"]
    assert verdict_lines(replace(judgement, objections=("no",))) == ["against it: no"]


@given(
    logits=st.lists(st.floats(-20, 20), min_size=2, max_size=40),
    power=st.floats(1, 4),
)
def test_a_sharpened_distribution_is_the_power_of_it(logits: list[float], power: float) -> None:
    probabilities = np.exp(np.array(logits) - np.logaddexp.reduce(logits))
    rows = np.log(probabilities).astype(np.float32)[None]
    trace = Trace((1e4,), (Node(np.arange(len(logits), dtype=np.int32), rows, np.zeros(1, np.float32)),), (((0, 0),),))
    (node,) = sharpened(trace, power).nodes
    wanted = probabilities**power / (probabilities**power).sum()
    assert np.exp(node.log_probabilities[0].astype(np.float64)) == pytest.approx(wanted, abs=1e-5)


def test_it_judges_in_llama_cpp(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch: what is judged is what `eval` would compare, on both sides."""
    monkeypatch.setattr(module, "prose", lambda _path: Halves((), ("A short passage of plain text.",)))
    monkeypatch.setattr(module, "prompts", lambda: Halves((), ("Hello?", "Who are you?")))
    monkeypatch.setattr(everyday, "ANSWER_TOKENS", 8)
    file = tmp_path / "mine.jsonl"
    file.write_text("".join(f'{{"prompt": "Number {n}?", "answer": "It is {n}."}}\n' for n in range(24)))
    settings = TuningSettings((str(file),), 64, Files(12, 12))
    ones = Tuning(((1.0,) * 4,) * 2, ((1.0,) * 2,) * 2)
    tuning = Tuning(((0.25, 2.0, 1.0, 0.5), (2.0, 0.0, 1.5, 0.5)), ((1.5, 0.5), (0.5, 2.0)))
    told: list[tuple[str, int, int]] = []
    with Subject(checked_model(tiny_model), ContextConfig(threads=1)) as opened:
        learned = Learned(tuning, (), 0.0, {}, {"ones": ones})
        found = judge(settings, learned, opened, lambda *what: told.append(what))
        same = judge(settings, replace(learned, tuning=ones, controls={}), opened)
        (result,) = found.results
        native, tuned = result.of("native").measures, result.of("tuned").measures
        items = settings.sources.held(str(file), 64, opened)
        with everyday.opened(opened, tuning) as llm:
            scores = llm.score([(item.question.prompt, item.question.continuations[0]) for item in items])
    nll = np.mean([-np.mean([token.log_probability for token in answer]) for answer in scores])
    assert tuned.nll.value == pytest.approx(nll, abs=2e-3)
    assert abs(tuned.nll.value - native.nll.value) > 0.05
    assert result.of("ones").measures.nll.value == native.nll.value
    assert result.of("ones").difference is not None
    assert same.results[0].difference.value == 0
    assert same.everyday.native_loss == same.everyday.tuned_loss
    assert same.everyday.equal == same.everyday.prompts == 2
    assert found.everyday.native_loss == same.everyday.native_loss != found.everyday.tuned_loss
    # Contexts of 64 tokens have no room for the facts of the other tasks, and there is no data for two of them.
    assert [reason.partition(":")[0] for reason in found.left_out] == ["needle at 64 tokens", "kv at 64 tokens"]
    assert "mine.jsonl at 64 tokens is not better" in same.objections[0]
    assert {what for what, _, _ in told} == {
        "judging: mine.jsonl, 64 tokens",
        "judging: plain text and everyday prompts",
    }
    assert all(0 <= done <= total for _, done, total in told)


class Sources:
    """Knows which tasks there is data for."""

    def has(self, task: str) -> bool:
        return task in ("needle", "kv", "qa")


@pytest.mark.parametrize(
    ("tasks", "longest", "wanted"),
    [
        (("needle",), 4096, [("needle", 128, True), ("needle", 256, False), ("kv", 128, False), ("qa", 128, False)]),
        (
            ("kv", "x.jsonl"),
            256,
            [("kv", 128, True), ("x.jsonl", 128, True), ("needle", 128, False), ("qa", 128, False)],
        ),
    ],
)
def test_it_judges_what_can_be_asked(
    tasks: tuple[str, ...], longest: int, wanted: list[tuple[str, int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TuningSettings(tasks, 128)
    object.__setattr__(settings, "sources", Sources())
    assert module._asked(settings, longest) == wanted
