"""Whole evaluations of a tiny model: the same questions for all, one pass for each way of prefilling."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from abcli.config import ContextConfig
from abcli.errors import CancelledError, EvaluationDataError, UsageError
from abcli.evals import model_under_test as subject_module
from abcli.evals.configurations import Configuration
from abcli.evals.model_under_test import Subject
from abcli.evals.runner import NEEDS_DATA, TASKS, Evaluation, EvaluationSettings, describe, evaluate, make_questions
from abcli.evals.scoring import score
from tests.support.models import checked_model

NATIVE = 1e4
SETTINGS = EvaluationSettings("kv", (400, 500), limit=6, depths=3)
ONE = Configuration("native", (NATIVE,))
TWO = Configuration("two", (5e3, NATIVE))
THREE = Configuration("three", (5e3, NATIVE, 2e4), merge="pool", weights=(1.4, -0.6, 0.2))
EXACT = replace(TWO, name="exact", prefill="exact")
ELSEWHERE = replace(TWO, name="elsewhere", prefill_base=5e3)


@pytest.fixture(scope="module")
def subject(tiny_model: Path) -> Iterator[Subject]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject_module, "ensure_loadable", lambda *_: None)
        # One thread: how many there are decides about the last bits, and they follow the number of buckets.
        with Subject(checked_model(tiny_model), ContextConfig(threads=1)) as opened:
            yield opened


@pytest.fixture
def storing(subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Subject:
    monkeypatch.setattr(subject, "_scores", tmp_path)
    return subject


def test_every_configuration_answers_the_same_questions(subject: Subject) -> None:
    found = evaluate(SETTINGS, [THREE, ONE, TWO], subject)
    assert list(found.questions) == make_questions(SETTINGS, subject)
    assert [question.length for question in found.questions] == [400] * 6 + [500] * 6
    assert found.configurations == (THREE, ONE, TWO)
    assert list(found.scores) == ["three", "native", "two"]
    tokenized = [subject.prompts.tokenize(question) for question in found.questions]
    traces = subject.trace(tokenized, THREE.bases, subject.prefill("auto", None))
    for item in found.configurations:
        assert found.scores[item.name] == tuple(score(trace, item) for trace in traces)
    assert len(set(found.scores.values())) == 3


def test_a_configuration_does_not_depend_on_its_company(subject: Subject) -> None:
    compared = [ONE, TWO, THREE, EXACT, ELSEWHERE]
    together = evaluate(SETTINGS, compared, subject)
    for item in compared:
        assert evaluate(SETTINGS, [item], subject).scores[item.name] == together.scores[item.name]
    assert len(set(together.scores.values())) == len(compared)


def test_progress_counts_a_question_for_each_way_of_prefilling(subject: Subject) -> None:
    seen: list[tuple[int, int]] = []
    evaluate(SETTINGS, [ONE, EXACT, TWO, ELSEWHERE], subject, lambda done, whole: seen.append((done, whole)))
    assert {whole for _, whole in seen} == {36}
    assert [done for done, _ in seen] == [*range(13), *range(12, 25), *range(24, 37)]


class Interruption:
    """Interrupts an evaluation after `questions`."""

    def __init__(self, questions: int) -> None:
        self._questions = questions

    def __call__(self, done: int, _whole: int) -> None:
        if done == self._questions:
            raise CancelledError


@pytest.mark.parametrize("after", [3, 8, 12, 19])
def test_an_interrupted_evaluation_goes_on(storing: Subject, tmp_path: Path, after: int) -> None:
    whole = evaluate(SETTINGS, [TWO, EXACT], storing)
    for path in tmp_path.glob("*/*"):
        path.unlink()
    with pytest.raises(CancelledError):
        evaluate(SETTINGS, [TWO, EXACT], storing, Interruption(after))
    stored = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*")}
    assert len(stored) == after
    resumed = evaluate(SETTINGS, [TWO, EXACT], storing)
    assert all(path.stat().st_mtime_ns == time for path, time in stored.items())
    assert len(list(tmp_path.glob("*/*"))) == 24
    check_near(whole, resumed)


def check_near(whole: Evaluation, resumed: Evaluation) -> None:
    """Where it goes on, a context is computed in other pieces, which changes the last bits of what is to come."""
    assert whole.questions == resumed.questions
    for name, of in whole.scores.items():
        for one, other in zip(of, resumed.scores[name], strict=True):
            assert one.nll == pytest.approx(other.nll, abs=0.02)


def test_a_second_evaluation_computes_only_what_is_new(storing: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    first = evaluate(SETTINGS, [THREE], storing)
    opened = []
    engine = subject_module.make_engine

    def counting(*arguments: object) -> object:
        opened.append(arguments)
        return engine(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(subject_module, "make_engine", counting)
    again = evaluate(SETTINGS, [ONE, TWO, THREE, replace(THREE, name="mean", merge="mean", weights=())], storing)
    assert opened == []
    assert again.scores["three"] == first.scores["three"]
    evaluate(SETTINGS, [THREE, EXACT], storing)
    assert len(opened) == 1
    evaluate(replace(SETTINGS, limit=7), [THREE], storing)
    assert len(opened) == 2


def test_what_makes_no_evaluation_is_refused(subject: Subject, tmp_path: Path) -> None:
    for compared in ([], [ONE, ONE], [ONE, replace(TWO, name="native")]):
        with pytest.raises(UsageError, match="not distinct"):
            evaluate(SETTINGS, compared, subject)
    with pytest.raises(UsageError, match="luck") as caught:
        make_questions(replace(SETTINGS, task="luck"), subject)
    assert all(task in caught.value.hint for task in TASKS)
    with pytest.raises(UsageError, match="no length"):
        make_questions(replace(SETTINGS, lengths=()), subject)
    for task in NEEDS_DATA:
        with pytest.raises((UsageError, EvaluationDataError)):
            make_questions(replace(SETTINGS, task=task), subject)
        with pytest.raises(UsageError, match="missing"):
            make_questions(
                replace(SETTINGS, task=task, data=tmp_path / "missing", answers=tmp_path / "missing"), subject
            )


@pytest.mark.parametrize("settings", [SETTINGS, EvaluationSettings("needle", (600,), limit=3, seed=5)])
def test_the_same_settings_make_the_same_questions(subject: Subject, settings: EvaluationSettings) -> None:
    assert make_questions(settings, subject) == make_questions(settings, subject)
    assert make_questions(settings, subject) != make_questions(replace(settings, seed=6), subject)


def test_what_is_recorded_is_ready_for_json(subject: Subject) -> None:
    about = describe(subject, make_questions(SETTINGS, subject))
    assert json.loads(json.dumps(about)) == about
    assert {"abcli", "llama.cpp", "cache_type_k", "cache_type_v", "ubatch_size"} <= about.keys()
    assert evaluate(replace(SETTINGS, limit=1), [ONE], subject).about == about
