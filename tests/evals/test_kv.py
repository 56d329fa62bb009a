"""Key-value questions: valid objects that fill the length, answers and depths that are true, the same every time."""

from __future__ import annotations

import json
import re
from itertools import groupby, islice
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.errors import UsageError
from abcli.evals.kv import ANSWER_START, INSTRUCTION, kv
from abcli.evals.placement import QUESTIONS_PER_CONTEXT
from abcli.evals.questions import Question, TaskSettings
from tests.evals.counting import count_bytes, count_pieces, nearest
from tests.support.models import open_model


def pairs_of(question: Question) -> dict[str, str]:
    assert question.context.startswith(INSTRUCTION)
    return json.loads(question.context.removeprefix(INSTRUCTION))


def key_of(question: Question) -> str:
    found = re.fullmatch(r'Key: "([0-9a-f-]{36})"\nCorresponding value:', question.text)
    assert found
    return found[1]


@pytest.mark.parametrize(("length", "depths"), [(500, 5), (1024, 5), (1024, 9), (1500, 1), (2500, 2), (700, 8)])
def test_every_question_is_answered_by_its_context(length: int, depths: int) -> None:
    questions = list(kv(TaskSettings(length, 90, depths=depths), count_pieces))
    assert len(questions) == 90
    asked: dict[str, set[str]] = {}
    for question in questions:
        pairs = pairs_of(question)
        assert all(UUID(text).version == 4 for pair in pairs.items() for text in pair)
        key = key_of(question)
        assert question.answer_start == ANSWER_START
        assert pairs[key].startswith(question.answer + "-")
        assert len(question.answer) == 8
        assert question.depth == list(pairs).index(key) / (len(pairs) - 1)
        assert question.length == length
        assert key not in asked.setdefault(question.group, set())
        asked[question.group].add(key)
    numbers = [0] * depths
    for number, question in enumerate(questions):
        assert nearest(question.depth, depths) == number % depths
        numbers[number % depths] += 1
    assert max(numbers) - min(numbers) <= 1


@pytest.mark.parametrize("count", [count_pieces, count_bytes])
def test_contexts_are_full_but_not_above_their_length(count) -> None:
    length = 1000
    for _, group in groupby(islice(kv(TaskSettings(length, 80), count), 80), key=lambda question: question.group):
        context = next(group).context
        assert count(context) <= length
        longer = context.removesuffix("}") + ',\n "' + "-".join(["0" * 36] * 2) + '"}'
        assert count(longer) > length


def test_questions_of_a_context_follow_each_other() -> None:
    questions = list(kv(TaskSettings(2000, 50), count_pieces))
    groups = [(name, list(group)) for name, group in groupby(questions, key=lambda question: question.group)]
    assert len({name for name, _ in groups}) == len(groups) == 7
    for name, group in groups:
        assert len({question.context for question in group}) == 1
        assert [question.identifier for question in group] == [f"{name}/{number}" for number in range(len(group))]
    assert [len(group) for _, group in groups] == [QUESTIONS_PER_CONTEXT] * 6 + [2]
    assert groups[3][0] == "kv/2000/0003"
    assert len({question.context for question in questions}) == 7


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(600, 2000),
    limit=st.integers(1, 40),
    more=st.integers(0, 30),
    seed=st.integers(-5, 2**40),
    depths=st.integers(1, 5),
)
def test_more_questions_begin_with_the_same(length: int, limit: int, more: int, seed: int, depths: int) -> None:
    few = list(kv(TaskSettings(length, limit, seed, depths), count_pieces))
    many = list(kv(TaskSettings(length, limit + more, seed, depths), count_pieces))
    assert len(few) == limit
    assert many[:limit] == few


def test_other_seeds_and_lengths_give_other_objects() -> None:
    keys = [
        set(pairs_of(next(kv(TaskSettings(length, 1, seed), count_pieces))))
        for length, seed in ((1000, 0), (1000, 1), (1001, 0))
    ]
    assert not keys[0] & keys[1] | keys[0] & keys[2] | keys[1] & keys[2]


@pytest.mark.parametrize("depths", [1, 2, 5, 12])
@pytest.mark.parametrize("count", [count_pieces, count_bytes])
def test_the_least_length_is_said_and_true(count, depths: int) -> None:
    with pytest.raises(UsageError, match=f"a context of 20 tokens is too short for {max(depths, 2)} ") as raised:
        kv(TaskSettings(20, 40, depths=depths), count)
    found = re.search(r"at least (\d+) tokens", raised.value.hint)
    assert found
    least = int(found[1])
    with pytest.raises(UsageError):
        kv(TaskSettings(least - 1, 40, depths=depths), count)
    questions = list(kv(TaskSettings(least, 40, depths=depths), count))
    assert {nearest(question.depth, depths) for question in questions} == set(range(depths))


def test_a_counter_that_breaks_the_promise_of_even_sizes_gives_an_error() -> None:
    calls = []

    def count(text: str) -> int:
        calls.append(text)
        return (10 if len(calls) <= 2 else 50) * text.count("4-")

    with pytest.raises(UsageError, match="too short for 2 key-value pairs"):
        list(kv(TaskSettings(90, 3, depths=1), lambda text: count(re.sub("[0-9a-f-]{36}", "4-", text))))


def test_with_the_real_tokenizer(real_model) -> None:
    with open_model(real_model) as model:

        def count(text: str) -> int:
            return len(model.tokenize(text, add_special=False, parse_special=False))

        questions = list(kv(TaskSettings(1024, 40), count))
        sizes = [count(context) for context in dict.fromkeys(question.context for question in questions)]
        # The answer's first token must not depend on what stands before it.
        for question in questions[:8]:
            start = model.tokenize(question.answer_start, add_special=False, parse_special=False)
            whole = model.tokenize(question.answer_start + question.answer, add_special=False, parse_special=False)
            assert whole[: len(start)] == start
    assert len(sizes) == 5
    assert all(1024 - 80 <= size <= 1024 for size in sizes)
    assert [nearest(question.depth, 5) for question in questions] == [number % 5 for number in range(40)]
