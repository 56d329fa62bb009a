"""Traces: what is kept of the buckets' distributions, what is computed for it, and files that are damaged."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from abcli.errors import NativeError
from abcli.evals.traces import KEPT_TOKENS, Node, Trace, load, save, trace
from tests.evals.random_engine import BASES, RandomEngine

PROMPT = (1, 2, 3, 4, 5)
# Few different tokens, so that continuations share beginnings, and some are beginnings of others.
continuations = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4).map(tuple), min_size=1, max_size=6)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    exact = logits.astype(np.float64)
    shifted = exact - exact.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def is_same(one: Trace, other: Trace) -> bool:
    return ((one.bases, one.paths, len(one.nodes)) == (other.bases, other.paths, len(other.nodes))) and all(
        left.dtype == right.dtype and np.array_equal(left, right)
        for node, twin in zip(one.nodes, other.nodes, strict=True)
        for left, right in (
            (node.tokens, twin.tokens),
            (node.log_probabilities, twin.log_probabilities),
            (node.entropies, twin.entropies),
        )
    )


@given(continuations)
@settings(max_examples=30, deadline=None)
def test_every_node_is_what_the_engine_says_there(answers: list[tuple[int, ...]]) -> None:
    engine = RandomEngine()
    found = trace(engine, 0, PROMPT, answers)
    assert found.bases == BASES
    assert len(found.paths) == len(answers)
    for answer, path in zip(answers, found.paths, strict=True):
        assert tuple(token for _, token in path) == answer
        for at, (number, token) in enumerate(path):
            node = found.nodes[number]
            exact = log_softmax(engine.rows((*PROMPT, *answer[:at])))
            assert token in node.tokens
            np.testing.assert_array_equal(node.tokens, np.unique(node.tokens))
            np.testing.assert_allclose(node.log_probabilities, exact[:, node.tokens], atol=1e-5)
            np.testing.assert_allclose(node.entropies, -(np.exp(exact) * exact).sum(axis=1), atol=1e-4)
            likeliest = np.argsort(-exact, axis=1)[:, :KEPT_TOKENS]
            assert set(likeliest.ravel().tolist()) <= set(node.tokens.tolist())


@given(continuations)
@settings(max_examples=50, deadline=None)
def test_common_beginnings_are_computed_once(answers: list[tuple[int, ...]]) -> None:
    engine = RandomEngine()
    found = trace(engine, 0, PROMPT, answers)
    beginnings = {answer[:at] for answer in answers for at in range(len(answer))}
    assert len(found.nodes) == len(beginnings)
    assert engine.prefills == [len(PROMPT)]
    assert len(engine.step_sizes) == len(beginnings) - 1


def test_one_prefill_serves_all_questions_of_a_context() -> None:
    engine = RandomEngine()
    context, first, second = tuple(range(100)), (7, 7, 7), (7, 8)
    trace(engine, 0, context + first, [(1, 2)])
    trace(engine, 0, context + second, [(3,)])
    assert engine.prefills == [103, 1]
    assert len(engine.step_sizes) == 1
    # The same question again: the logits after its last token are needed once more.
    trace(engine, 0, context + second, [(3,)])
    assert engine.prefills == [103, 1, 1]


def test_the_last_token_can_be_computed_alone() -> None:
    together, apart = RandomEngine(), RandomEngine()
    assert is_same(trace(together, 0, PROMPT, [(1,)]), trace(apart, 0, PROMPT, [(1,)], last_alone=True))
    assert (together.prefills, apart.prefills) == ([5], [4, 1])
    trace(apart, 0, PROMPT, [(1,)], last_alone=True)
    trace(apart, 0, (9,), [(1,)], last_alone=True)
    assert apart.prefills == [4, 1, 1, 1]


def test_a_small_vocabulary_is_kept_whole() -> None:
    (node,) = trace(RandomEngine(vocabulary=20), 0, PROMPT, [(3,)]).nodes
    assert node.tokens.tolist() == list(range(20))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0, 1e4])
def test_the_likeliest_tokens_are_kept_however_flat_the_distribution(scale: float) -> None:
    engine = RandomEngine(scale=scale)
    (node,) = trace(engine, 0, PROMPT, [(3,)]).nodes
    exact = log_softmax(engine.rows(PROMPT))
    others = np.setdiff1d(np.arange(engine.vocabulary_size), node.tokens)
    for row in exact:
        kept = np.sort(row[node.tokens])[-KEPT_TOKENS:]
        assert row[others].max() <= kept.min()
    assert len(node.tokens) >= KEPT_TOKENS
    np.testing.assert_allclose(node.entropies, -(np.exp(exact) * exact).sum(axis=1), atol=1e-4)


class BrokenEngine(RandomEngine):
    """One bucket's logits are `value`, all of them or one."""

    def __init__(self, value: float, *, whole: bool) -> None:
        super().__init__()
        self._value = value
        self._tokens_broken = slice(None) if whole else slice(17, 18)

    def row(self, tokens: Sequence[int], base: float) -> NDArray[np.float32]:
        row = super().row(tokens, base)
        if base == BASES[1]:
            row[self._tokens_broken] = self._value
        return row


@pytest.mark.parametrize(
    ("value", "whole"),
    [(np.nan, False), (np.nan, True), (np.inf, False), (-np.inf, True)],
)
def test_a_base_without_a_distribution_is_named(value: float, whole: bool) -> None:
    with pytest.raises(NativeError, match="base 10000 "):
        trace(BrokenEngine(value, whole=whole), 0, PROMPT, [(1,)])


def test_a_forbidden_token_has_no_probability() -> None:
    found = trace(BrokenEngine(-np.inf, whole=False), 0, PROMPT, [(17,)])
    (node,) = found.nodes
    place = node.tokens.tolist().index(17)
    assert np.isfinite(node.log_probabilities[[0, 2], place]).all()
    assert node.log_probabilities[1, place] == -np.inf
    assert np.isfinite(node.entropies).all()


def test_rows_are_selected_in_the_order_asked_for() -> None:
    found = trace(RandomEngine(), 0, PROMPT, [(1,)])
    assert found.select((2e4, 5e3)) == [2, 0]
    assert found.select((1e4, 1e4)) == [1, 1]
    with pytest.raises(KeyError):
        found.select((3e4,))


@given(continuations, st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_a_trace_is_read_back_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, answers: list[tuple[int, ...]], buckets: int
) -> None:
    path = tmp_path_factory.mktemp("trace") / "a.npz"
    item = trace(RandomEngine(BASES[:buckets]), 0, PROMPT, answers)
    save(path, item)
    found = load(path)
    assert found is not None
    assert is_same(found, item)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trace]:
    path = tmp_path_factory.mktemp("sound") / "a.npz"
    item = trace(RandomEngine(), 0, PROMPT, [(1, 2, 3), (1, 2), (2,)])
    save(path, item)
    return path, item


def test_a_file_that_ends_early_is_absent(sound: tuple[Path, Trace], tmp_path: Path) -> None:
    data, path = sound[0].read_bytes(), tmp_path / "a.npz"
    for size in [*range(0, len(data), 97), len(data) - 1]:
        path.write_bytes(data[:size])
        assert load(path) is None


@pytest.mark.parametrize("flipped", [0x01, 0xFF])
def test_a_file_with_a_wrong_byte_is_absent_or_still_right(
    sound: tuple[Path, Trace], tmp_path: Path, flipped: int
) -> None:
    data, path = sound[0].read_bytes(), tmp_path / "a.npz"
    # Every header of the archive and of an array begins and ends near one of these.
    near = {at for mark in (b"PK", b"NUMPY") for at in range(len(data)) if data[at : at + len(mark)] == mark}
    places = {place for at in near for place in range(at, at + 50, 3)} | set(range(0, len(data), 131))
    absent = 0
    for place in sorted(places):
        if place >= len(data):
            continue
        path.write_bytes(data[:place] + bytes([data[place] ^ flipped]) + data[place + 1 :])
        found = load(path)
        absent += found is None
        assert found is None or is_same(found, sound[1])
    assert absent > len(places) // 2


def test_a_damaged_header_of_a_large_array_is_seen_before_it_is_read(tmp_path: Path) -> None:
    """numpy would warn of what it cannot make sense of, or reserve as much memory as the header asks for."""
    path = tmp_path / "a.npz"
    save(path, trace(RandomEngine(), 0, PROMPT, [range(12)]))
    data = path.read_bytes()
    start = data.index(b"NUMPY", data.index(b"log_probabilities.npy")) - 1
    assert len(data) - start > 8192
    for place in range(start, start + 90):
        for flipped in (0x01, 0x08, 0x10, 0xFF):
            path.write_bytes(data[:place] + bytes([data[place] ^ flipped]) + data[place + 1 :])
            assert load(path) is None


def stored_arrays(path: Path) -> dict[str, Any]:
    with np.load(path) as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": np.array(2)},
        {"format": None},
        {"format": np.array([1, 1])},
        {"entropies": None},
        {"bases": np.array([1e4])},
        {"bases": np.array(1e4)},
        {"sizes": np.array([10**6], np.int32)},
        {"sizes": np.array([], np.int32)},
        {"path_sizes": np.array([1], np.int32)},
        {"path_sizes": np.array([7, -1], np.int32)},
        {"paths": np.array([[9, 1]] * 6, np.int32)},
        {"paths": np.array([[-1, 1]] * 6, np.int32)},
        {"paths": np.array([[0, 9999]] * 6, np.int32)},
        {"paths": np.zeros((6, 3), np.int32)},
        {"log_probabilities": np.zeros((3, 2), np.float32)},
        {"tokens": np.array(["a", "b"])},
        {"tokens": np.zeros((3, 3), np.int32)},
    ],
    ids=lambda changes: "-".join(f"{name}-{getattr(value, 'shape', None)}" for name, value in changes.items()),
)
def test_arrays_that_do_not_fit_together_are_no_trace(
    sound: tuple[Path, Trace], tmp_path: Path, changes: dict[str, Any]
) -> None:
    arrays = stored_arrays(sound[0]) | changes
    path = tmp_path / "a.npz"
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    assert load(path) is None
    np.savez(path, **stored_arrays(sound[0]))
    assert load(path) is not None


def test_what_is_no_archive_of_arrays_is_absent(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    assert load(path) is None
    assert load(tmp_path) is None
    for data in (b"", b"no archive", b"PK\x03\x04", b"\x80\x04."):
        path.write_bytes(data)
        assert load(path) is None
    with path.open("wb") as file:
        np.save(file, np.zeros(3))
    assert load(path) is None
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("format.npy", "no array")
    assert load(path) is None
    # Objects would be unpickled, and so could do anything.
    np.savez(path, format=np.array([{}], object))
    assert load(path) is None


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    item = Trace(
        (1e4,), (Node(np.array([1], np.int32), np.zeros((1, 1), np.float32), np.zeros(1, np.float32)),), (((0, 1),),)
    )
    with pytest.raises(OSError, match="missing"):
        save(tmp_path / "missing" / "a.npz", item)
    assert list(tmp_path.iterdir()) == []
