"""The engine on a backend of lists: what every slot holds and waits for, whatever happens, and how work is cut."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from abcli.engine.engine import Engine
from abcli.engine.prompt_cache import CacheKey, PromptCache
from abcli.errors import CancelledError, ContextFullError, NativeError
from tests.support.fakes import VOCABULARY, FakeBackend

CONTEXT = 40
SLOTS = 3
BASES = (1e4, 2e4, 3e4)


def answer(tokens: Sequence[int], column: int) -> int:
    """Another token for nearly every text and column."""
    return zlib.crc32(repr((list(tokens), column)).encode()) % VOCABULARY


class NarrowBackend(FakeBackend):
    """A batch has room for fewer tokens the more columns compute them."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.outputs = self.piece(self.buckets)

    def piece(self, columns: int) -> int:
        return max(1, super().piece(columns) // columns)


def make(backend: FakeBackend, *, context_size: int = CONTEXT, cache: PromptCache | None = None) -> Engine:
    return Engine(
        backend,
        slots=len(backend.held[0]),
        context_size=context_size,
        vocabulary_size=VOCABULARY,
        least_shared=3,
        cache=cache,
    )


def check(engine: Engine, backend: FakeBackend, found: dict[int, Any]) -> None:
    """Some column holds what the engine says, and none more; those that gave logits, all of it, and these are its."""
    for slot in range(engine.slots):
        held = list(engine.tokens(slot))
        there = [backend.held[column][slot] for column in range(len(backend.bases))]
        assert held in there
        assert all(some == held[: len(some)] for some in there)
    for slot, logits in found.items():
        buckets = range(backend.buckets) if len(logits) == backend.buckets else [backend.native]
        assert all(backend.held[bucket][slot] == engine.tokens(slot) for bucket in buckets)
        assert [row.argmax() for row in logits] == [answer(engine.tokens(slot), b) for b in buckets]


TOKEN = st.integers(0, 250)
SLOT = st.integers(0, SLOTS - 1)
PROMPT = st.lists(TOKEN, min_size=1, max_size=20)


class Slots(RuleBasedStateMachine):
    """What each slot holds and waits for as two lists, beside the engine."""

    @initialize(
        data=st.data(),
        shared=st.booleans(),
        piece=st.integers(1, 9),
        kind=st.sampled_from([FakeBackend, NarrowBackend]),
    )
    def make(self, data: st.DataObject, shared: bool, piece: int, kind: type[FakeBackend]) -> None:
        buckets = data.draw(st.integers(1 + shared, 3))
        leader = data.draw(st.sampled_from([None, 1.5e4])) if shared else None
        self.backend = kind(
            answer,
            BASES[:buckets],
            SLOTS,
            native=data.draw(st.integers(0, buckets - (not leader))),
            leader=leader,
            shared=shared,
            piece=piece,
            forgets_parts=shared or data.draw(st.booleans()),
        )
        self.engine = make(self.backend)
        self.held: list[list[int]] = [[] for _ in range(SLOTS)]
        self.waiting: list[list[int]] = [[] for _ in range(SLOTS)]

    @rule(slot=SLOT, prompt=PROMPT)
    def begin(self, slot: int, prompt: list[int]) -> None:
        if self.waiting[slot]:
            return
        if len(self.held[slot]) + len(prompt) > CONTEXT:
            with pytest.raises(ContextFullError):
                self.engine.begin(slot, prompt)
            return
        assert self.engine.begin(slot, prompt) == len(prompt)
        self.waiting[slot] = list(prompt)

    def rows(self, tokens: dict[int, int]) -> dict[int, int]:
        """The slots of `tokens` that can be named in a step."""
        return {i: t for i, t in tokens.items() if not self.waiting[i] and len(self.held[i]) < CONTEXT}

    @rule(tokens=st.dictionaries(SLOT, TOKEN), gates=st.dictionaries(SLOT, st.booleans()))
    def step(self, tokens: dict[int, int], gates: dict[int, bool]) -> None:
        rows = self.rows(tokens)
        if not (rows or any(self.waiting)):
            return
        calls = len(self.backend.calls)
        before = [len(item) for item in self.waiting]
        asked: dict[int, int] = {}

        def gate(slot: int, logits: Any) -> bool:
            asked[slot] = int(logits.argmax())
            return gates[slot]

        found = self.engine.step(rows, gates={slot: partial(gate, slot) for slot in gates})
        assert asked.keys() <= found.keys() & gates.keys()
        assert rows.keys() & gates.keys() <= asked.keys() or self.backend.buckets == 1
        for slot, logits in found.items():
            decided = slot in asked and gates[slot] and self.backend.buckets > 1
            assert len(logits) == (1 if decided else self.backend.buckets)
        for slot, token in rows.items():
            self.held[slot].append(token)
        for slot in range(SLOTS):
            done = before[slot] - self.engine.waiting(slot)
            self.held[slot] += self.waiting[slot][:done]
            del self.waiting[slot][:done]
        assert set(found) == set(rows) | {i for i in range(SLOTS) if before[i] and not self.waiting[i]}
        assert any(before) == (before != [len(item) for item in self.waiting])
        work = [
            sum(sizes) / self.backend.piece(1 if kind == "lead" else self.backend.buckets)
            for kind, sizes in self.backend.calls[calls:]
            if kind in ("piece", "lead")
        ]
        assert sum(work) <= 1.001
        for slot, token in asked.items():
            assert token == answer(self.engine.tokens(slot), self.backend.native)
        check(self.engine, self.backend, found)

    @rule(
        tokens=st.dictionaries(SLOT, TOKEN),
        gates=st.dictionaries(SLOT, st.booleans()),
        error=st.sampled_from([NativeError, CancelledError]),
        late=st.booleans(),
    )
    def failing_step(self, tokens: dict[int, int], gates: dict[int, bool], error: type[Exception], late: bool) -> None:
        rows = self.rows(tokens)
        if not (rows or any(self.waiting)):
            return
        calls = 0

        def fail(_verb: str) -> None:
            nonlocal calls
            calls += 1
            if calls > (late and bool(rows) and any(self.waiting)):
                self.engine.cancel() if error is CancelledError else self.raise_(error)

        self.backend.fail = fail
        with pytest.raises(error):
            self.engine.step(rows, gates={slot: lambda _logits, let=let: let for slot, let in gates.items()})
        self.backend.fail = lambda _verb: None
        for slot in range(SLOTS):
            kept = list(self.engine.tokens(slot))
            assert kept == self.held[slot] or not (kept or self.backend.forgets_parts)
            # What was lost of a prompt waits again.
            if self.waiting[slot]:
                self.waiting[slot] = [*self.held[slot], *self.waiting[slot]][len(kept) :]
            self.held[slot] = kept

    @staticmethod
    def raise_(error: type[Exception]) -> None:
        raise error("out of order")

    @rule(tokens=st.dictionaries(SLOT, st.lists(TOKEN, min_size=1, max_size=4), min_size=1))
    def read(self, tokens: dict[int, list[int]]) -> None:
        taken: dict[int, list[int]] = {}
        for slot, wanted in tokens.items():
            room = min(CONTEXT - len(self.held[slot]), self.engine.outputs - sum(map(len, taken.values())))
            if not self.waiting[slot] and room > 0:
                taken[slot] = wanted[:room]
        if not taken:
            return
        found = self.engine.read(taken)
        assert list(found) == list(taken)
        for slot, added in taken.items():
            for token, logits in zip(added, found[slot], strict=True):
                self.held[slot].append(token)
                assert [row.argmax() for row in logits] == [
                    answer(self.held[slot], bucket) for bucket in range(self.backend.buckets)
                ]
        check(self.engine, self.backend, {slot: found[slot][-1] for slot in taken})

    @rule(slot=SLOT, length=st.integers(0, CONTEXT))
    def truncate(self, slot: int, length: int) -> None:
        kept = min(length, len(self.held[slot]))
        if kept < len(self.held[slot]) and not self.backend.forgets_parts:
            kept = 0
        assert self.engine.truncate(slot, length) == kept
        del self.held[slot][kept:]
        self.waiting[slot] = []

    @rule(slot=SLOT, other=SLOT)
    def copy(self, slot: int, other: int) -> None:
        self.engine.copy(slot, other)
        if slot != other:
            self.held[other], self.waiting[other] = list(self.held[slot]), []

    @rule(slot=SLOT)
    def drop(self, slot: int) -> None:
        self.engine.drop(slot)
        self.waiting[slot] = []

    @rule(slot=SLOT, prompt=PROMPT)
    def prefill(self, slot: int, prompt: list[int]) -> None:
        if any(self.waiting) or len(self.held[slot]) + len(prompt) > CONTEXT:
            return
        seen: list[int] = []
        found = {slot: self.engine.prefill(slot, prompt, lambda done, _total: seen.append(done))}
        self.held[slot] += prompt
        assert seen == sorted(set(seen))
        assert seen[-1] == len(prompt)
        check(self.engine, self.backend, found)

    @invariant()
    def is_equal(self) -> None:
        if hasattr(self, "engine"):
            assert [list(self.engine.tokens(slot)) for slot in range(SLOTS)] == self.held
            assert [self.engine.waiting(slot) for slot in range(SLOTS)] == list(map(len, self.waiting))
            check(self.engine, self.backend, {})


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=100, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("shared", [False, True])
def test_the_oldest_and_the_shortest_prompt_take_turns(shared: bool) -> None:
    backend = FakeBackend(answer, BASES, SLOTS, shared=shared, piece=8)
    engine = make(backend)
    engine.begin(0, list(range(30)))
    engine.begin(1, list(range(20)))
    engine.begin(2, list(range(5)))
    left = []
    while any(engine.waiting(slot) for slot in range(SLOTS)):
        engine.step({})
        left.append([engine.waiting(slot) for slot in range(SLOTS)])
    assert left[:4] == [[22, 20, 5], [22, 20, 0], [14, 20, 0], [6, 20, 0]]
    assert left[4:] == ([[0, 20, 0], [0, 12, 0], [0, 4, 0], [0, 0, 0]])


def test_where_a_prompt_is_cut_does_not_depend_on_the_others() -> None:
    cuts = []
    for others in ((), (3, 4), (50, 1)):
        backend = FakeBackend(answer, BASES, 3, piece=7)
        engine = make(backend, context_size=100)
        for slot, length in enumerate(others, start=1):
            engine.begin(slot, [1] * length)
        engine.begin(0, list(range(40)))
        ends = []
        while engine.waiting(0):
            engine.step({})
            ends.append(len(engine.tokens(0)))
        cuts.append([end for end in dict.fromkeys(ends) if end])
    assert cuts[0] == cuts[1] == cuts[2] == [7, 14, 21, 28, 35, 40]


def test_an_answer_goes_on_while_a_long_prompt_comes() -> None:
    backend = FakeBackend(answer, BASES, 2, shared=True, piece=8)
    engine = make(backend)
    engine.prefill(0, [1, 2, 3])
    engine.begin(1, list(range(33)))
    found = [set(engine.step({0: 7})) for _ in range(5)]
    assert found == [{0}, {0}, {0}, {0, 1}, {0}]
    assert list(engine.tokens(0)) == [1, 2, 3, 7, 7, 7, 7, 7]


def test_wrong_calls_are_refused() -> None:
    engine = make(FakeBackend(answer, BASES, 2))
    engine.begin(0, [1] * 9)
    for wrong in (
        lambda: engine.begin(0, [1]),
        lambda: engine.begin(1, []),
        lambda: engine.step({0: 1}),
        lambda: engine.prefill(1, [1]),
        lambda: make(FakeBackend(answer, BASES, 2)).step({}),
    ):
        with pytest.raises(ValueError, match=r"slot|token|waiting"):
            wrong()
    assert (engine.waiting(0), list(engine.tokens(0)), list(engine.tokens(1))) == (9, [], [])


def test_what_on_progress_raises_leaves_the_slot_as_it_was() -> None:
    engine = make(FakeBackend(answer, BASES, 1))
    engine.prefill(0, [1, 2])

    def progress(done: int, _total: int) -> None:
        if done > 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.prefill(0, list(range(20)), progress)
    assert (list(engine.tokens(0)), engine.waiting(0)) == ([1, 2], 0)
    assert engine.prefill(0, [3]).argmax(axis=1).tolist() == [answer([1, 2, 3], bucket) for bucket in range(3)]


def test_closing_closes_the_backend() -> None:
    backend = FakeBackend(answer)
    with make(backend):
        assert not backend.closed
    assert backend.closed


DOCUMENT = [index * 7 % 250 for index in range(400)]


def cached(directory: Path, warnings: list[str], backend: FakeBackend) -> Engine:
    key = CacheKey("model", 1e4, "none", "f16", "f16", "auto", "lists")
    return make(backend, context_size=1000, cache=PromptCache(directory, key, 1 << 30, warnings.append))


@pytest.mark.parametrize("leader", [None, 1.5e4])
def test_stored_prompts_are_begun_where_the_disk_ends(tmp_path: Path, leader: float | None) -> None:
    warnings: list[str] = []
    for piece, left, tokens in ((64, 400, DOCUMENT), (50, 1, DOCUMENT), (90, 41, [*DOCUMENT[:200], *range(40), 3])):
        backend = FakeBackend(answer, BASES, 2, leader=leader, shared=True, piece=piece)
        engine = cached(tmp_path, warnings, backend)
        assert engine.begin(1, tokens) == left
        found: dict[int, Any] = {}
        while not found:
            found = engine.step({})
        assert list(engine.tokens(1)) == tokens
        check(engine, backend, found)
    assert warnings == []


def test_a_stored_piece_that_a_slot_has_no_room_for_is_left_out(tmp_path: Path) -> None:
    cached(tmp_path, [], FakeBackend(answer, BASES, 1, shared=True, piece=64)).prefill(0, DOCUMENT)
    backend = FakeBackend(answer, BASES, 1, shared=True, piece=64)
    engine = cached(tmp_path, [], backend)
    engine.context_size = 220
    assert engine.begin(0, DOCUMENT[:210]) == 210 - 3 * 64
    while not engine.step({}):
        pass
    check(engine, backend, {})


@pytest.mark.parametrize(("piece", "kept"), [(1, 0), (2, 20)])
@pytest.mark.parametrize("error", [NativeError("out of order"), CancelledError(), KeyboardInterrupt()])
def test_a_failure_while_reading_concerns_its_slot_alone(
    tmp_path: Path, error: BaseException, piece: int, kept: int
) -> None:
    backend = FakeBackend(answer, BASES, 2, shared=True, piece=64)
    engine = cached(tmp_path, [], backend)
    engine.prefill(0, DOCUMENT)
    engine.prefill(1, DOCUMENT[:20])
    verbs = []

    def fail(verb: str) -> None:
        verbs.append(verb)
        if verbs.count("append_cells") == piece:
            raise error

    backend.fail = fail
    with pytest.raises(type(error)):
        engine.begin(1, DOCUMENT[20:])
    backend.fail = lambda _verb: None
    assert (list(engine.tokens(1)), engine.waiting(1)) == (DOCUMENT[:kept], 0)
    assert list(engine.tokens(0)) == DOCUMENT
    check(engine, backend, {})


def test_bytes_of_another_form_are_computed_instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend(answer, BASES, 1, shared=True, piece=64)
    engine = cached(tmp_path, [], backend)
    engine.prefill(0, DOCUMENT)
    engine.truncate(0, 0)
    calls = 0
    append = backend.append_cells

    def other(slot: int, start: int, tokens: Sequence[int], data: np.ndarray) -> None:
        nonlocal calls
        calls += 1
        append(slot, start, tokens, data[: len(data) - 2 * (calls == 3)])

    monkeypatch.setattr(backend, "append_cells", other)
    assert engine.begin(0, DOCUMENT) == len(DOCUMENT) - 2 * 64
    while not engine.step({}):
        pass
    check(engine, backend, {})
    assert list(engine.tokens(0)) == DOCUMENT
