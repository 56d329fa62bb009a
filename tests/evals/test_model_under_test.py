"""The model under test: what it refuses, which traces it takes for its own, and that company changes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from abcli.config import (
    ENV_HOME,
    Buckets,
    ContextConfig,
    PrefillMode,
    evaluations_directory,
    prompt_cache_directory,
)
from abcli.errors import AbcliError, ContextFullError, OutOfMemoryError, TemplateError, UnsupportedModelError
from abcli.evals import model_under_test as subject_module
from abcli.evals.model_under_test import Prefill, Subject
from abcli.evals.prompts import TokenizedQuestion
from abcli.evals.questions import Question
from abcli.gguf.checked import CheckedModel
from tests.evals.test_traces import is_same
from tests.support.models import checked_model
from tests.support.tiny_gguf import write_tiny_mamba, write_tiny_model

NATIVE = 1e4
BASES = (5e3, NATIVE, 2e4)
# One thread: how many there are decides about the last bits, and they follow the number of buckets.
THREADS = 1
QUESTIONS = tuple(
    TokenizedQuestion((*(token % 250 for token in range(90)), 100 + number, 60), ((number, 7), (number, 8)))
    for number in range(4)
)


def subject_of(path: Path, gpu_layers: int = -1, **options: Any) -> Subject:
    """The model of a file under test; `options` are those of a context, or of the subject."""
    own = {name: options.pop(name) for name in ("chat_template", "scores") if name in options}
    return Subject(checked_model(path, gpu_layers), ContextConfig(**{"threads": THREADS, **options}), **own)


@pytest.fixture(scope="module", autouse=True)
def _no_trials() -> Iterator[None]:
    """Trying a model in a process of its own is tested elsewhere, and takes longer than all the rest here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject_module, "ensure_loadable", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def subject(tiny_model: Path) -> Iterator[Subject]:
    with subject_of(tiny_model) as opened:
        yield opened


def stored_in(opened: Subject, prefill: Prefill | None = None) -> Path:
    directory = opened._store(prefill or opened.prefill("auto", None)).directory
    assert directory is not None
    return directory


@pytest.mark.parametrize("make", [lambda path: write_tiny_model(path, architecture="gpt2"), write_tiny_mamba])
def test_a_model_without_bases_is_refused(tmp_path: Path, make: Callable[[Path], Path]) -> None:
    path = make(tmp_path / "model.gguf")
    with pytest.raises(UnsupportedModelError, match="no RoPE base") as caught:
        subject_of(path)
    assert caught.value.hint


def test_what_cannot_be_loaded_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    with pytest.raises(AbcliError, match="missing"):
        subject_of(tmp_path / "missing.gguf")
    with pytest.raises(TemplateError):
        subject_of(tiny_model, chat_template="no-such-template")


def test_the_template_is_that_of_the_model_or_the_users_or_none(tmp_path: Path, tiny_model: Path) -> None:
    bare = write_tiny_model(tmp_path / "bare.gguf", chat_template=None)
    question = Question("q", "q", "context", "text", "start", "answer", 0.0, 1)
    prompts = {}
    for name, path, template in (("own", tiny_model, None), ("plain", bare, None), ("chosen", bare, "chatml")):
        with subject_of(path, chat_template=template) as opened:
            tokens = opened.prompts.tokenize(question).prompt
            prompts[name] = b"".join(opened.model.piece(token, special=True) for token in tokens)
    assert prompts["plain"] == b"context\n\ntext\nstart"
    assert prompts["own"].startswith(b"<|im_start|>user\n")
    assert prompts["chosen"] == prompts["own"]


def test_prefills_that_are_computed_alike_are_equal(subject: Subject) -> None:
    shared = Prefill("shared", NATIVE)
    assert subject.native_base == NATIVE
    for alike in (("auto", None), ("shared", None), ("auto", NATIVE), ("shared", NATIVE)):
        assert subject.prefill(*alike) == shared
    assert subject.prefill("shared", 5e3) == Prefill("shared", 5e3)
    assert subject.prefill("exact", None) == subject.prefill("exact", 5e3) == Prefill("exact", NATIVE)


def test_a_question_longer_than_the_trained_context_is_refused(tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "short.gguf", context_length=64)
    fitting, longer = (TokenizedQuestion(tuple(range(length)), ((1, 2, 3, 4),)) for length in (60, 61))
    with subject_of(path) as opened:
        assert len(opened.trace([fitting], [NATIVE], opened.prefill("auto", None))) == 1
        with pytest.raises(ContextFullError) as caught:
            opened.trace([fitting, longer], [NATIVE], opened.prefill("auto", None))
    assert (caught.value.used, caught.value.available) == (65, 64)
    assert "`length`" in caught.value.hint
    assert "ctx_size" not in caught.value.hint


def test_memory_is_checked_before_contexts_are_made(monkeypatch: pytest.MonkeyPatch, subject: Subject) -> None:
    seen: list[tuple[ContextConfig, Buckets]] = []

    def refuse(_model: CheckedModel, context: ContextConfig, buckets: Buckets) -> None:
        seen.append((context, buckets))
        raise OutOfMemoryError("too much")

    monkeypatch.setattr(subject_module, "check_memory", refuse)
    with pytest.raises(OutOfMemoryError):
        subject.trace(QUESTIONS, BASES, subject.prefill("shared", 5e3))
    ((context, buckets),) = seen
    assert (buckets.bases, context.slots, context.prefill, buckets.prefill_base) == (BASES, 1, "shared", 5e3)
    assert context.context_size == 94


def test_stored_traces_are_those_of_one_model_and_one_way_of_computing(tiny_model: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other.gguf", seed=1)
    ways: tuple[tuple[PrefillMode, float | None], ...] = (
        ("auto", None),
        ("shared", 5e3),
        ("shared", 2e4),
        ("exact", None),
    )
    with subject_of(other, scores=tmp_path) as opened:
        directories = [stored_in(opened)]
    changed: tuple[dict[str, Any], ...] = (
        {},
        {"cache_type_k": "f32"},
        {"cache_type_v": "f32"},
        {"flash_attention": "off"},
        {"ubatch_size": 64},
        {"gpu_layers": 0},
    )
    for changes in changed:
        with subject_of(tiny_model, scores=tmp_path, **changes) as opened:
            directories += [stored_in(opened, opened.prefill(*way)) for way in ways]
    assert len(set(directories)) == len(directories)
    assert {directory.parent for directory in directories} == {tmp_path}


def test_a_renamed_model_and_other_sizes_of_the_engine_have_the_same_traces(tiny_model: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "renamed.gguf"
    renamed.write_bytes(tiny_model.read_bytes())
    directories = set()
    sizes = {"threads": 2, "context_size": 99, "slots": 3, "prompt_cache": tmp_path}
    for path, changes in ((tiny_model, {}), (renamed, {}), (tiny_model, sizes)):
        with subject_of(path, scores=tmp_path, **changes) as opened:
            directories.add(stored_in(opened))
    assert len(directories) == 1


def test_traces_are_stored_and_then_read(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    with subject_of(tiny_model, scores=tmp_path) as opened:
        prefill = opened.prefill("auto", None)
        first = opened.trace(QUESTIONS, BASES, prefill, lambda done, whole: seen.append((done, whole)))
    assert seen == [(done, len(QUESTIONS)) for done in range(len(QUESTIONS) + 1)]
    assert len(list(stored_in(opened).iterdir())) == len(QUESTIONS)

    def refuse(*_: object) -> None:
        raise AssertionError("nothing is left to compute")

    monkeypatch.setattr(subject_module, "make_engine", refuse)
    with subject_of(tiny_model, scores=tmp_path) as opened:
        assert all(map(is_same, first, opened.trace(QUESTIONS, BASES[::-1], prefill)))
        assert opened.trace([], BASES, prefill) == []
        with pytest.raises(AssertionError):
            opened.trace(QUESTIONS, [*BASES, 3e4], prefill)


def test_results_are_kept_beside_the_prompt_cache(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluations_directory() == own_home / "evaluations"
    monkeypatch.delenv(ENV_HOME)
    assert evaluations_directory().parts[-2:] == ("abcli", "evaluations")
    assert evaluations_directory().parent == prompt_cache_directory().parent


def test_without_a_directory_nothing_is_written(subject: Subject, own_home: Path, tmp_path: Path) -> None:
    subject.trace(QUESTIONS[:1], BASES, subject.prefill("auto", None))
    assert not (own_home / "evaluations").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["shared", "exact"])
def test_a_base_alone_is_what_it_is_in_company(subject: Subject, mode: PrefillMode) -> None:
    """Bit for bit: the prompts are computed in the same pieces."""
    prefill = subject.prefill(mode, None)
    together = subject.trace(QUESTIONS, BASES, prefill)
    alone = subject.trace(QUESTIONS, [NATIVE], prefill)
    pair = subject.trace(QUESTIONS, [NATIVE, 2e4], prefill)
    for many, few, one in zip(together, pair, alone, strict=True):
        for left, middle, right in zip(many.nodes, few.nodes, one.nodes, strict=True):
            places = [left.tokens.tolist().index(token) for token in right.tokens.tolist()]
            assert left.log_probabilities[1, places].tolist() == right.log_probabilities[0].tolist()
            assert left.entropies[1] == middle.entropies[0] == right.entropies[0]


def test_ways_of_prefilling_differ(subject: Subject) -> None:
    entropies = {
        prefill: subject.trace(QUESTIONS[:1], BASES, prefill)[0].nodes[0].entropies.tolist()
        for prefill in (subject.prefill("exact", None), subject.prefill("auto", None), subject.prefill("shared", 5e3))
    }
    assert len({tuple(values) for values in entropies.values()}) == 3
