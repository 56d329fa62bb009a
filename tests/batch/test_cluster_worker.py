"""A cluster's worker in this process, on a tiny model."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from abcli.batch.cluster.pool import Done, Opened, Refusal, WorkerSetup
from abcli.batch.cluster.worker import Worker
from abcli.batch.jobs import Job, Result
from abcli.batch.task import InputParts, Task
from abcli.chat.messages import Message
from abcli.config import ContextConfig, Tuning
from abcli.prepare import Prepared
from abcli.sampling import GenerationConfig, SamplingConfig
from tests.support.models import buckets_at, checked_model

PATIENCE = 60


def job(index: int, tokens: int = 4, text: str = "") -> Job:
    generation = GenerationConfig(SamplingConfig(seed=index), max_tokens=tokens, ignore_eos=True)
    return Job(index, index + 1, str(index), (Message("user", text or f"prompt {index}"),), generation)


@pytest.fixture(scope="module")
def setup(tiny_model: Path) -> WorkerSetup:
    identity = checked_model(tiny_model).fingerprint
    context, buckets = ContextConfig(context_size=256, threads=1), buckets_at(1e4)
    return WorkerSetup(str(tiny_model), identity, -1, (), context, buckets, None, 2)


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker()
    yield made
    made.close()


def results_of(worker: Worker, count: int) -> list[Result]:
    found: list[Result] = []
    deadline = time.monotonic() + PATIENCE
    while len(found) < count:
        assert time.monotonic() < deadline
        found += worker.exchange([]).results
    return found


def test_it_answers_what_comes_whenever_it_comes(setup: WorkerSetup, worker: Worker) -> None:
    opened = worker.open(setup, 1, 1)
    assert isinstance(opened, Opened)
    assert opened.slots == 2
    assert opened.plan.startswith("2 slots of 256 tokens for 1 bucket")
    assert worker.exchange([]).results == []
    first = [*worker.exchange([job(index) for index in range(5)]).results]
    found = [*first, *results_of(worker, 5 - len(first))]
    assert sorted(item.index for item in found) == [0, 1, 2, 3, 4]
    # It has been idle, and goes on.
    done = worker.exchange([job(5), job(6, text="x" * 900)])
    found = [*done.results, *results_of(worker, 2 - len(done.results))]
    assert sorted((item.index, bool(item.error)) for item in found) == [(5, False), (6, True)]
    totals = worker.exchange([]).totals
    assert (totals.answered, totals.errors, totals.completion_tokens) == (6, 1, 24)


def test_it_tunes_its_model_as_the_others(tiny_model: Path, setup: WorkerSetup, worker: Worker) -> None:
    tuning = Tuning(((0.2, 1.0, 1.75, 0.0),) * 2, ((0.2, 5.0),) * 2)
    tuned = checked_model(tiny_model).with_tuning(tuning).fingerprint
    assert isinstance(worker.open(replace(setup, fingerprint=tuned, tuning=tuning), 1, 1), Opened)
    plain = Worker()
    try:
        assert isinstance(plain.open(setup, 1, 1), Opened)
        texts = []
        for each in (worker, plain):
            first = [*each.exchange([job(0, tokens=20)]).results]
            texts.append([item.text for item in (first or results_of(each, 1))])
    finally:
        plain.close()
    assert texts[0] != texts[1]


def test_workers_are_told_of_the_tuning(tiny_model: Path) -> None:
    tuned = checked_model(tiny_model).with_tuning(Tuning(multipliers=((0.2, 5.0),) * 2))
    found = Prepared(tuned, ContextConfig(), buckets_at(1e4))
    parts = InputParts("auto", None, None, "", None, None)
    told = Task(tiny_model, parts, GenerationConfig(), found, None).worker_setup(str(tiny_model), None)
    assert checked_model(tiny_model).with_tuning(told.tuning).fingerprint == told.fingerprint


def test_it_finishes_what_is_begun_when_it_is_stopped(setup: WorkerSetup, worker: Worker) -> None:
    worker.open(setup, 1, 1)
    found = [*worker.exchange([job(index, tokens=150) for index in range(9)]).results]
    done = Done([], worker.exchange([], stop=True).totals)
    deadline = time.monotonic() + PATIENCE
    while not done.ended:
        assert time.monotonic() < deadline
        done = worker.exchange([], stop=True)
        found += done.results
    assert done.failure == ""
    assert len(found) < 9
    assert all(item.completion_tokens == 150 for item in found)


def test_an_idle_worker_stops(setup: WorkerSetup, worker: Worker) -> None:
    worker.open(setup, 1, 1)
    worker.exchange([], stop=True)
    time.sleep(0.1)
    assert worker.exchange([], stop=True).ended


def test_a_missing_model_is_refused(setup: WorkerSetup, worker: Worker) -> None:
    refusal = worker.open(replace(setup, model="/no/where.gguf"), 1, 1)
    assert isinstance(refusal, Refusal)
    assert refusal.message == "there is no file /no/where.gguf"
    assert "every machine" in refusal.hint


def test_another_model_of_the_same_name_is_refused(setup: WorkerSetup, worker: Worker) -> None:
    refusal = worker.open(replace(setup, fingerprint="0" * 64), 1, 1)
    assert isinstance(refusal, Refusal)
    assert "another model" in refusal.message


def test_slots_that_do_not_fit_are_refused(setup: WorkerSetup, worker: Worker) -> None:
    context = replace(setup.context, context_size=90_000_000)
    refusal = worker.open(replace(setup, context=context, slots=200), 1, 1)
    assert isinstance(refusal, Refusal)
    assert "more than there is" in refusal.message


def test_what_ends_the_thread_is_told(setup: WorkerSetup, worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abcli.generate.Generator.step", lambda _self: 1 / 0)
    worker.open(setup, 1, 1)
    deadline = time.monotonic() + PATIENCE
    done = worker.exchange([job(0)])
    while not done.failure:
        assert time.monotonic() < deadline
        done = worker.exchange([])
    assert done.failure == "ZeroDivisionError: division by zero"


def test_what_a_template_makes_of_messages_is_told_with_the_results(setup: WorkerSetup, worker: Worker) -> None:
    source = (
        "{% for m in messages %}{{ raise_exception('no system') if m.role == 'system' else m.content }}{% endfor %}"
    )
    opened = worker.open(replace(setup, template=source), 1, 1)
    assert isinstance(opened, Opened)
    assert opened.warnings == []
    asked = replace(job(0), messages=(Message("system", "be brief"), Message("user", "hello")))
    done = [worker.exchange([asked, replace(asked, index=1)])]
    deadline = time.monotonic() + PATIENCE
    while sum(len(item.results) for item in done) < 2:
        assert time.monotonic() < deadline
        done.append(worker.exchange([]))
    done.append(worker.exchange([]))
    (warning,) = [text for item in done for text in item.warnings]
    assert "does not take this conversation as it is" in warning


def test_the_template_comes_with_the_setup(setup: WorkerSetup, worker: Worker) -> None:
    worker.open(replace(setup, template="{{ raise_exception('not for me') }}"), 1, 1)
    done = worker.exchange([job(0)])
    (found,) = [*done.results, *results_of(worker, 1 - len(done.results))]
    assert "not for me" in found.error
