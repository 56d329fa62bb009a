"""Needle questions: facts at their depths in prose that fills the length, the same every time."""

from __future__ import annotations

import re
from itertools import groupby, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.errors import EvaluationDataError, UsageError
from abcli.evals.needle import ADJECTIVES, ANIMALS, FACTS_PER_1000_TOKENS, LEAST_FACTS, arrange, needle, spread
from abcli.evals.placement import QUESTIONS_PER_CONTEXT, asked_depths, depth_range
from abcli.evals.questions import Question, TaskSettings
from tests.evals.counting import count_bytes, count_pieces, nearest
from tests.support.models import open_model

FACT = re.compile(r"The secret code of the ([a-z]+ [a-z]+) is (\d{5})\.")


def count_words(text: str) -> int:
    return len(text.split())


def facts_of(question: Question) -> dict[str, str]:
    found = FACT.findall(question.context)
    assert len({name for name, _ in found}) == len({code for _, code in found}) == len(found)
    return dict(found)


def name_of(question: Question) -> str:
    found = re.search(r"What is the secret code of the ([a-z]+ [a-z]+)\?$", question.text)
    assert found
    return found[1]


def test_the_word_lists_have_no_doubles() -> None:
    assert len(set(ADJECTIVES)) == len(set(ANIMALS)) == len(ADJECTIVES) == len(ANIMALS) == 64
    assert not set(ADJECTIVES) & set(ANIMALS)
    assert all(re.fullmatch("[a-z]+", word) for word in (*ADJECTIVES, *ANIMALS))


@pytest.mark.parametrize(
    ("length", "depths"), [(256, 5), (512, 5), (1024, 5), (1024, 9), (700, 1), (700, 2), (4096, 11)]
)
def test_every_question_is_answered_by_its_context(length: int, depths: int) -> None:
    questions = list(needle(TaskSettings(length, 90, depths=depths), count_pieces))
    assert len(questions) == 90
    asked: dict[str, set[str]] = {}
    for number, question in enumerate(questions):
        facts = facts_of(question)
        assert len(facts) == max(LEAST_FACTS, length * FACTS_PER_1000_TOKENS // 1000)
        name = name_of(question)
        assert question.answer == f" {facts[name]}"
        sentence = f"{question.answer_start}{question.answer}."
        assert question.context.count(sentence) == 1
        before = question.context.index(sentence)
        assert question.depth == pytest.approx(before / (len(question.context) - len(sentence)), abs=1e-12)
        assert nearest(question.depth, depths) == number % depths
        assert abs(question.depth - number % depths / max(depths - 1, 1)) < 0.15 or depths <= 2
        assert question.length == length
        assert name not in asked.setdefault(question.group, set())
        asked[question.group].add(name)


def test_facts_are_spread_over_the_whole_context() -> None:
    for _, group in groupby(needle(TaskSettings(1024, 80), count_pieces), key=lambda question: question.group):
        context = next(group).context
        starts = [match.start() / len(context) for match in FACT.finditer(context)]
        assert starts[0] == 0
        assert FACT.fullmatch(context, context.rindex("The secret"))
        assert max(after - before for before, after in pairwise(starts)) < 0.15


@pytest.mark.parametrize("count", [count_words, count_pieces, count_bytes])
@pytest.mark.parametrize("length", [700, 2000])
def test_contexts_are_full_but_not_above_their_length(count, length: int) -> None:
    for _, group in groupby(needle(TaskSettings(length, 40), count), key=lambda question: question.group):
        context = next(group).context
        longest = max(map(count, re.findall(r"[^.]+\.", context)))
        assert length - 2 * longest <= count(context) <= length


def test_at_least_half_of_a_context_is_prose_for_any_tokenizer() -> None:
    question = next(needle(TaskSettings(3000, 1), count_bytes))
    facts = sum(len(match[0]) + 1 for match in FACT.finditer(question.context))
    assert 0.4 < facts / len(question.context) < 0.55


def test_questions_of_a_context_follow_each_other() -> None:
    questions = list(needle(TaskSettings(500, 50), count_pieces))
    groups = [(name, list(group)) for name, group in groupby(questions, key=lambda question: question.group)]
    assert len({name for name, _ in groups}) == len(groups) == 7
    for name, group in groups:
        assert len({question.context for question in group}) == 1
        assert [question.identifier for question in group] == [f"{name}/{number}" for number in range(len(group))]
    assert [len(group) for _, group in groups] == [QUESTIONS_PER_CONTEXT] * 6 + [2]
    assert groups[3][0] == "needle/500/0003"
    assert len({question.context for question in questions}) == 7
    assert len({frozenset(facts_of(question)) for question in questions}) == 7


@settings(deadline=None, max_examples=40)
@given(
    length=st.integers(160, 1500),
    limit=st.integers(1, 40),
    more=st.integers(0, 30),
    seed=st.integers(-5, 2**40),
    depths=st.integers(1, 12),
)
def test_more_questions_begin_with_the_same(length: int, limit: int, more: int, seed: int, depths: int) -> None:
    few = list(needle(TaskSettings(length, limit, seed, depths), count_pieces))
    many = list(needle(TaskSettings(length, limit + more, seed, depths), count_pieces))
    assert len(few) == limit
    assert many[:limit] == few
    assert all(count_pieces(question.context) <= length for question in few)


def test_other_seeds_and_lengths_give_other_facts_and_prose() -> None:
    contexts = [
        next(needle(TaskSettings(length, 1, seed), count_pieces)).context
        for length, seed in ((600, 0), (600, 1), (601, 0))
    ]
    assert len({frozenset(FACT.findall(context)) for context in contexts}) == 3
    assert len({FACT.sub("", context) for context in contexts}) == 3


@pytest.mark.parametrize("count", [count_words, count_pieces, count_bytes])
def test_the_least_length_is_said_and_true(count) -> None:
    with pytest.raises(UsageError, match="a context of 20 tokens is too short for 5 facts") as raised:
        needle(TaskSettings(20, 40), count)
    found = re.search(r"at least (\d+) tokens", raised.value.hint)
    assert found
    least = int(found[1])
    with pytest.raises(UsageError):
        needle(TaskSettings(least - 1, 40), count)
    for question in needle(TaskSettings(least, 40), count):
        assert len(facts_of(question)) == LEAST_FACTS
        assert FACT.sub("", question.context).strip()


def test_a_counter_that_breaks_the_promise_of_even_sizes_gives_an_error() -> None:
    def count(text: str) -> int:
        return 64 if text.count("secret") > LEAST_FACTS else 100

    with pytest.raises(UsageError, match="too short for 5 facts") as raised:
        list(needle(TaskSettings(50, 3), count))
    assert "at least 100 tokens" in raised.value.hint


@given(
    depths=st.integers(1, 30),
    first=st.integers(0, 1000),
    number=st.integers(1, 60),
    data=st.data(),
)
def test_facts_asked_for_stand_at_their_depths_and_the_others_between(
    depths: int, first: int, number: int, data: st.DataObject
) -> None:
    asked = asked_depths(depths, first, data.draw(st.integers(1, min(number, QUESTIONS_PER_CONTEXT))))
    targets, ranks = spread(asked, number, depths)
    assert len(targets) == number
    assert targets == sorted(targets)
    assert targets[0] >= 0
    assert targets[-1] <= 1
    assert len(set(ranks)) == len(ranks) == len(asked)
    for depth, rank in zip(asked, ranks, strict=True):
        low, high = depth_range(depth, depths)
        assert low <= targets[rank] <= high
        if asked.count(depth) == 1:
            assert targets[rank] == pytest.approx(depth)
    # With r facts to spare, no gap need be larger than 1 / (r + 1).
    spare = number - len(asked)
    assert max(after - before for before, after in pairwise([0.0, *targets, 1.0])) <= 1 / (spare + 1) + 1e-9


@given(
    needle_length=st.integers(1, 30),
    lengths=st.lists(st.integers(1, 50), max_size=12),
    target=st.floats(0, 1),
)
def test_a_fact_stands_at_the_sentence_end_nearest_to_its_depth(
    needle_length: int, lengths: list[int], target: float
) -> None:
    sentences = [chr(ord("a") + index) * length for index, length in enumerate(lengths)]
    text, depths = arrange(["#" * needle_length], [target], sentences)
    assert text.replace("#" * needle_length, "").split() == sentences
    last = sum(length + 1 for length in lengths)
    possible = [sum(length + 1 for length in lengths[:used]) / max(last, 1) for used in range(len(lengths) + 1)]
    assert depths == [text.index("#") / max(last, 1)]
    assert abs(depths[0] - target) <= min(abs(depth - target) for depth in possible) + 1e-9


def write_story(path: Path, sentences: int) -> list[str]:
    ordinals = [f"Sentence {'x' * (number % 7 + 1)} {number} of the story ends here." for number in range(sentences)]
    path.write_text("\n".join(ordinals), encoding="utf-8")
    return ordinals


def test_prose_of_a_file_is_kept_in_order_from_a_random_place(tmp_path: Path) -> None:
    story = write_story(tmp_path / "story.txt", 300)
    starts = set()
    for _, group in groupby(
        needle(TaskSettings(600, 80, data=tmp_path / "story.txt"), count_pieces), key=lambda question: question.group
    ):
        context = next(group).context
        found = re.findall(r"Sentence x+ \d+ of the story ends here\.", FACT.sub("", context))
        start = story.index(found[0])
        assert found == (story + story)[start : start + len(found)]
        assert len(FACT.findall(context)) == 12
        assert context.count(".") == len(found) + 12
        starts.add(start)
    assert len(starts) == 10


def test_a_passage_is_passed_over_where_a_long_sentence_leaves_no_place_near_a_depth(tmp_path: Path) -> None:
    long = " ".join(["word"] * 79) + "."
    path = tmp_path / "story.txt"
    path.write_text(" ".join([long, *["A short sentence stands here."] * 30] * 20), encoding="utf-8")
    questions = list(needle(TaskSettings(250, 200, data=path), count_pieces))
    assert any(long in question.context for question in questions)
    assert [nearest(question.depth, 5) for question in questions] == [number % 5 for number in range(200)]


def test_depths_are_true_where_no_passage_has_places_near_the_asked_ones(tmp_path: Path) -> None:
    path = tmp_path / "story.txt"
    path.write_text(" ".join([" ".join(["word"] * 60) + "."] * 30), encoding="utf-8")
    for question in needle(TaskSettings(300, 40, depths=9, data=path), count_pieces):
        sentence = f"{question.answer_start}{question.answer}."
        before = question.context.index(sentence)
        assert question.depth == pytest.approx(before / (len(question.context) - len(sentence)), abs=1e-12)


def test_prose_that_is_just_long_enough_is_never_repeated(tmp_path: Path) -> None:
    story = write_story(tmp_path / "story.txt", 30)
    tokens = count_pieces(" ".join(story))
    for question in needle(TaskSettings(tokens, 40, data=tmp_path), count_pieces):
        found = re.findall(r"Sentence x+ \d+ of the story ends here\.", question.context)
        assert len(found) == len(set(found)) > 10
    with pytest.raises(EvaluationDataError, match=f"has {tokens} tokens, a context needs {tokens + 1}") as raised:
        needle(TaskSettings(tokens + 1, 40, data=tmp_path), count_pieces)
    assert "`length`" in raised.value.hint


def test_data_that_cannot_be_used_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(EvaluationDataError, match="there is no file"):
        needle(TaskSettings(600, 8, data=tmp_path / "missing.txt"), count_pieces)
    (tmp_path / "latin.txt").write_bytes(b"A line.\nCaf\xe9.")
    with pytest.raises(EvaluationDataError, match="line 2"):
        needle(TaskSettings(600, 8, data=tmp_path), count_pieces)


@pytest.mark.parametrize(("length", "depths"), [(256, 5), (1024, 5), (1024, 9)])
def test_with_the_real_tokenizer(real_model, length: int, depths: int) -> None:
    with open_model(real_model) as model:

        def count(text: str) -> int:
            return len(model.tokenize(text, add_special=False, parse_special=False))

        questions = list(needle(TaskSettings(length, 90, depths=depths), count))
        sizes = [count(context) for context in dict.fromkeys(question.context for question in questions)]
        for question in questions[:8]:
            start = model.tokenize(question.answer_start, add_special=False, parse_special=False)
            whole = model.tokenize(question.answer_start + question.answer, add_special=False, parse_special=False)
            assert whole[: len(start)] == start
    assert all(length - 40 <= size <= length for size in sizes)
    assert [nearest(question.depth, depths) for question in questions] == [number % depths for number in range(90)]
    assert all(f"{question.answer_start}{question.answer}." in question.context for question in questions)
