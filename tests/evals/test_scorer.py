"""The store of traces: what it finds again, what it does not mistake for it, and how a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from abcli.config import MergeRule
from abcli.errors import CancelledError
from abcli.evals.prompts import TokenizedQuestion
from abcli.evals.scorer import TraceStore, traces
from abcli.evals.traces import Trace, trace
from tests.evals.random_engine import BASES, RandomEngine
from tests.evals.test_traces import is_same

CONTEXT = tuple(range(40))
QUESTIONS = tuple(
    TokenizedQuestion((*CONTEXT, 100 + number, 200), ((number, 7), (number, 8), (9,))) for number in range(6)
)


class Opener:
    """Opens engines for `traces` and counts them."""

    def __init__(self, bases: Sequence[float] = BASES) -> None:
        self.engines: list[RandomEngine] = []
        self._bases = tuple(bases)

    def __call__(self) -> RandomEngine:
        self.engines.append(RandomEngine(self._bases))
        return self.engines[-1]


def one_trace(question: TokenizedQuestion, bases: Sequence[float] = BASES) -> Trace:
    return trace(RandomEngine(bases), 0, question.prompt, question.continuations)


def found(store: TraceStore, question: TokenizedQuestion, bases: Sequence[float]) -> Trace:
    item = store.get(question, bases)
    assert item is not None
    return item


def test_a_trace_is_found_for_all_of_its_bases_and_no_other(tmp_path: Path) -> None:
    store, item = TraceStore(tmp_path / "a" / "b"), one_trace(QUESTIONS[0])
    assert store.get(QUESTIONS[0], BASES) is None
    store.put(QUESTIONS[0], item)
    for bases in (BASES, BASES[::-1], BASES[1:], [BASES[2]], []):
        assert is_same(found(store, QUESTIONS[0], bases), item)
    assert store.get(QUESTIONS[0], [*BASES, 3e4]) is None
    assert store.get(QUESTIONS[0], [BASES[0] + 1]) is None


def test_traces_of_several_sets_of_bases_are_kept_beside_each_other(tmp_path: Path) -> None:
    store = TraceStore(tmp_path)
    few, others = one_trace(QUESTIONS[0], BASES[:2]), one_trace(QUESTIONS[0], (3e4, 4e4))
    store.put(QUESTIONS[0], few)
    store.put(QUESTIONS[0], others)
    assert is_same(found(store, QUESTIONS[0], BASES[:1]), few)
    assert is_same(found(store, QUESTIONS[0], [4e4]), others)
    assert store.get(QUESTIONS[0], [BASES[0], 4e4]) is None


@pytest.mark.parametrize(
    "other",
    [
        TokenizedQuestion((*QUESTIONS[0].prompt, 1), QUESTIONS[0].continuations),
        TokenizedQuestion(QUESTIONS[0].prompt, QUESTIONS[0].continuations[::-1]),
        TokenizedQuestion(QUESTIONS[0].prompt, QUESTIONS[0].continuations[:1]),
    ],
)
def test_questions_that_differ_anywhere_are_different_questions(tmp_path: Path, other: TokenizedQuestion) -> None:
    store = TraceStore(tmp_path)
    store.put(QUESTIONS[0], one_trace(QUESTIONS[0]))
    assert store.get(other, BASES) is None


def test_a_damaged_file_is_computed_again(tmp_path: Path) -> None:
    store, opener = TraceStore(tmp_path), Opener()
    store.put(QUESTIONS[0], one_trace(QUESTIONS[0]))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    (item,) = traces(QUESTIONS[:1], BASES, store, opener)
    assert len(opener.engines) == 1
    assert is_same(item, one_trace(QUESTIONS[0]))
    assert is_same(found(store, QUESTIONS[0], BASES), item)
    assert list(tmp_path.iterdir()) == [path]


def test_no_engine_is_opened_where_all_is_stored(tmp_path: Path) -> None:
    store, opener = TraceStore(tmp_path), Opener()
    first = list(traces(QUESTIONS, BASES, store, opener))
    again = list(traces(QUESTIONS, BASES[1:], store, opener))
    assert len(opener.engines) == 1
    assert all(map(is_same, first, again))
    assert list(traces([], BASES, store, opener)) == []


def test_one_prefill_serves_all_questions_of_a_context(tmp_path: Path) -> None:
    opener = Opener()
    list(traces(QUESTIONS, BASES, TraceStore(tmp_path), opener))
    (engine,) = opener.engines
    assert engine.prefills == [len(CONTEXT) + 2, *[2] * (len(QUESTIONS) - 1)]


def test_a_store_without_a_directory_keeps_nothing() -> None:
    store, opener = TraceStore(None), Opener()
    for _ in range(2):
        list(traces(QUESTIONS[:1], BASES, store, opener))
    assert len(opener.engines) == 2


class InterruptedEngine(RandomEngine):
    """The user interrupts in the middle of an answer."""

    def step(self, tokens: Mapping[int, int], merge: MergeRule | None = None) -> dict[int, NDArray[np.float32]]:
        if len(self.step_sizes) == 3:
            raise CancelledError
        return super().step(tokens, merge)


def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = list(traces(QUESTIONS, BASES, TraceStore(None), Opener()))
    store, opener, done = TraceStore(tmp_path), Opener(), []
    with pytest.raises(CancelledError):
        done.extend(traces(QUESTIONS, BASES, store, InterruptedEngine))
    assert 0 < len(done) < len(QUESTIONS)
    assert len(list(tmp_path.iterdir())) == len(done)
    resumed = list(traces(QUESTIONS, BASES, store, opener))
    assert all(map(is_same, whole, resumed))
    (engine,) = opener.engines
    assert len(engine.prefills) == len(QUESTIONS) - len(done)


def test_each_trace_is_stored_before_the_next_is_computed(tmp_path: Path) -> None:
    for number, _ in enumerate(traces(QUESTIONS, BASES, TraceStore(tmp_path), Opener()), start=1):
        assert len(list(tmp_path.iterdir())) == number


def test_a_store_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    place = tmp_path / "file"
    place.write_text("not a directory")
    with pytest.raises(OSError, match="file"):
        list(traces(QUESTIONS[:1], BASES, TraceStore(place), Opener()))


def test_the_last_token_is_computed_alone_if_asked_for() -> None:
    opener = Opener()
    list(traces(QUESTIONS[:1], BASES, TraceStore(None), opener, last_alone=True))
    assert opener.engines[0].prefills == [len(CONTEXT) + 1, 1]
