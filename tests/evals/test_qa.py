"""Questions on documents: one document answers, the others do not, and it stands where it was asked for."""

from __future__ import annotations

import json
import random
import re
import string
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.errors import AbcliError, EvaluationDataError, UsageError
from abcli.evals.qa import qa, spelling_in
from abcli.evals.questions import Question, TaskSettings

LINES = 40
# How long an example takes says nothing about the code on a busy machine.
relaxed = settings(deadline=None)


def words(text: str) -> int:
    return len(text.split())


def context(title: str, text: str, isgold: bool = True, **fields: Any) -> dict[str, Any]:
    return {"title": title, "text": text, "isgold": isgold, "hasanswer": isgold, **fields}


def made_lines() -> Iterator[dict[str, Any]]:
    """Questions whose answers are no part of each other; documents of 6 to 30 words."""
    generator = random.Random("lines")
    for number in range(LINES):
        answer = f"Place{number:02d}end"
        filler = " ".join(generator.choices(["rain", "stone", "wind", "sea"], k=generator.randint(0, 24)))
        yield {
            "question": f"where is thing {number}",
            "answers": ["unheard of", answer.lower()],
            "ctxs": [context(f"Thing {number}", f"It is in {answer}, {filler}.")],
        }


def write(path: Path, lines: Iterable[object]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("qa") / "data.jsonl", made_lines())


def documents(question: Question) -> list[str]:
    found = re.findall(r"^Document \[(\d+)\]\(Title: .*$", question.context, re.MULTILINE)
    assert [int(number) for number in found] == list(range(1, len(found) + 1))
    return question.context.split("\n")


@relaxed
@given(length=st.integers(80, 600), seed=st.integers(0, 5), depths=st.integers(1, 7), limit=st.integers(1, LINES))
def test_every_question_has_one_answer_where_it_was_asked_for(
    file: Path, length: int, seed: int, depths: int, limit: int
) -> None:
    questions = list(qa(TaskSettings(length, limit, seed, depths, data=file), words))
    assert len(questions) == limit
    assert len({question.text for question in questions}) == limit
    for number, question in enumerate(questions):
        assert question.identifier == question.group == f"qa/{length}/{number:04d}"
        parts = documents(question)
        assert words(question.context) <= length == question.length
        assert len(set(parts)) == len(parts) >= 2
        holding = [index for index, part in enumerate(parts) if question.answer.strip() in part]
        assert len(holding) == 1
        thing = question.text.split()[-1]
        assert f"(Title: Thing {thing})" in parts[holding[0]]
        assert question.answer == f" Place{int(thing):02d}end"
        assert question.depth == holding[0] / (len(parts) - 1)
        asked = number % depths / max(depths - 1, 1)
        assert abs(question.depth - asked) <= 0.5 / (len(parts) - 1) + 1e-9
        assert question.answer_start == "The answer is"
        assert question.candidates == ()


@relaxed
@given(few=st.integers(1, 10), more=st.integers(0, 20), seed=st.integers(0, 3))
def test_a_larger_limit_begins_with_the_same_questions(file: Path, few: int, more: int, seed: int) -> None:
    small = list(qa(TaskSettings(200, few, seed, data=file), words))
    large = list(qa(TaskSettings(200, few + more, seed, data=file), words))
    assert large[:few] == small


def test_the_global_generator_has_no_part_in_it(file: Path) -> None:
    settings = TaskSettings(200, 10, data=file)
    random.seed(1)
    state = random.getstate()
    first = list(qa(settings, words))
    assert random.getstate() == state
    random.seed(2)
    assert list(qa(settings, words)) == first


def test_seeds_make_other_questions(file: Path) -> None:
    first, second = (list(qa(TaskSettings(200, 10, seed, data=file), words)) for seed in (0, 1))
    assert [question.text for question in first] != [question.text for question in second]


def test_a_longer_context_holds_more_documents(file: Path) -> None:
    counts = [
        [len(documents(question)) for question in qa(TaskSettings(length, 20, data=file), words)]
        for length in (100, 300)
    ]
    assert all(short < long for short, long in zip(*counts, strict=True))


def test_a_lines_own_documents_come_first_and_none_with_an_answer_comes(tmp_path: Path) -> None:
    own = [context(f"Own {number}", "some words", isgold=False) for number in range(3)]
    line = {
        "question": "which",
        "answers": ["Zürich", "Rome"],
        "ctxs": [
            *own,
            context("In rome, by title", "some words", isgold=False),
            context("By text", "ZÜRICH is it", isgold=False),
            context("By another spelling", "Zu\u0308rich is it", isgold=False),
            context("By the search of others", "some words", isgold=False, hasanswer=True),
            context("Needed", "It is  ROME,\nnot another"),
            context("Needed too", "It is the eternal city", hasanswer=False),
        ],
    }
    file = write(tmp_path / "data", [line, *made_lines()])
    (question,) = (
        question for question in qa(TaskSettings(400, LINES, data=file), words) if question.text.endswith("which")
    )
    titles = re.findall(r"\(Title: (.*?)\)", question.context)
    assert [title for title in titles if not title.startswith("Thing")] != []
    assert {title for title in titles if not title.startswith("Thing")} == {"Own 0", "Own 1", "Own 2", "Needed"}
    assert "It is ROME, not another" in question.context
    assert question.answer == " ROME"


def test_a_line_without_the_optional_flag_is_accepted(tmp_path: Path) -> None:
    lines = list(made_lines())
    for line in lines:
        del line["ctxs"][0]["hasanswer"]
    assert len(list(qa(TaskSettings(200, 5, data=write(tmp_path / "data", lines)), words))) == 5


@pytest.mark.parametrize(
    ("passage", "answers", "spelling"),
    [
        ("The Rome of old", ["rome"], "Rome"),
        ("In 2014, 14 came", ["14"], "14"),
        ("Romeo in Rome", ["rome"], "Rome"),
        ("Romeo", ["rome"], "Rome"),
        ("Romeo met Juliet", ["rome", "juliet"], "Juliet"),
        ("b and a", ["x", "a", "b"], "a"),
        ("It is C++ (1998).", ["c++"], "C++"),
        ("a.c", ["a?c"], None),
        ("東京都に住む", ["東京"], "東京"),
        ("", ["a"], None),
    ],
)
def test_the_spelling_of_the_passage_counts(passage: str, answers: list[str], spelling: str | None) -> None:
    assert spelling_in(passage, answers) == spelling


@relaxed
@given(st.text(string.ascii_letters + " .*", max_size=30), st.data())
def test_what_is_in_a_passage_is_found_there(passage: str, draw: st.DataObject) -> None:
    start = draw.draw(st.integers(0, len(passage)))
    answer = passage[start : draw.draw(st.integers(start, len(passage)))]
    found = spelling_in(passage, [answer.swapcase()])
    assert found is not None
    assert found in passage
    assert found.lower() == answer.lower()


GOOD = {"question": "where", "answers": ["a"], "ctxs": [context("T", "a b")]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": None}, "question is not a string"),
        ({"question": " "}, "question is empty"),
        ({"answers": []}, "answers is empty"),
        ({"answers": "a"}, "answers is not a list"),
        ({"answers": [3]}, r"answers\[0\] is not a string"),
        ({"answers": ["a", ""]}, r"answers\[1\] is not a string"),
        ({"answers": ["absent"]}, "none of the answers .'absent'."),
        ({"ctxs": []}, "ctxs is empty"),
        ({"ctxs": {}}, "ctxs is not a list"),
        ({"ctxs": ["a"]}, r"ctxs\[0\] is not an object"),
        ({"ctxs": [{"title": "T", "isgold": True}]}, r"ctxs\[0\].text is missing"),
        ({"ctxs": [{"title": "T", "text": "a"}]}, r"ctxs\[0\].isgold is missing"),
        ({"ctxs": [context("T", "a", isgold=1)]}, r"ctxs\[0\].isgold is not true or false"),  # type: ignore[arg-type]
        ({"ctxs": [context("T", "a", hasanswer="no")]}, r"ctxs\[0\].hasanswer is not true or false"),
        ({"ctxs": [context("T", "a", isgold=False)]}, "isgold"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write(tmp_path / "data.jsonl", [GOOD, {**GOOD, **change}])
    with pytest.raises(EvaluationDataError, match=rf"data\.jsonl, line 2: .*{message}"):
        qa(TaskSettings(100, 1, data=file), words)


JUNK = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just([]) | st.just({})


@relaxed
@given(st.data())
def test_any_value_anywhere_is_accepted_or_refused(file: Path, draw: st.DataObject) -> None:
    line = json.loads(json.dumps(GOOD))
    target = draw.draw(st.sampled_from([line, line["ctxs"][0]]))
    target[draw.draw(st.sampled_from(sorted(target)))] = draw.draw(JUNK | st.lists(JUNK, max_size=2))
    try:
        list(qa(TaskSettings(100, 1, data=write(file.parent / "junk", [line, *made_lines()])), words))
    except AbcliError as error:
        assert ", line 1: " in error.message  # noqa: PT017


@pytest.mark.parametrize(
    "settings", [TaskSettings(0, 1), TaskSettings(9, 0), TaskSettings(9, -1), TaskSettings(9, 1, depths=0)]
)
def test_settings_without_sense_are_wrong_usage(settings: TaskSettings) -> None:
    with pytest.raises(UsageError):
        qa(settings, words)


def test_a_missing_file_is_wrong_usage_that_names_flag_and_source(tmp_path: Path) -> None:
    for path in (None, tmp_path / "missing.jsonl"):
        with pytest.raises(UsageError) as caught:
            qa(TaskSettings(100, 1, data=path), words)
        assert "`data` FILE" in caught.value.hint
        assert "lost-in-the-middle" in caught.value.hint


def test_too_few_questions_and_too_short_contexts_are_errors_at_once(file: Path) -> None:
    with pytest.raises(EvaluationDataError, match=f"{LINES} of the {LINES} questions"):
        qa(TaskSettings(300, LINES + 1, data=file), words)
    with pytest.raises(EvaluationDataError, match=f"0 of the {LINES} questions .* 10 tokens"):
        qa(TaskSettings(10, 1, data=file), words)


def test_depths_get_equal_numbers_of_questions(file: Path) -> None:
    questions = qa(TaskSettings(600, 20, depths=5, data=file), words)
    assert set(Counter(round(question.depth * 4) for question in questions).values()) == {4}
