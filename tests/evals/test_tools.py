"""Requests with functions: the right one stands where it was asked for, once, among names that differ."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.errors import AbcliError, EvaluationDataError, UsageError
from abcli.evals.questions import Question, TaskSettings
from abcli.evals.tools import MAX_NESTING, tools

REQUESTS = 24
# How long an example takes says nothing about the code on a busy machine.
relaxed = settings(deadline=None)


def words(text: str) -> int:
    return len(text.split())


def function(name: str, description: str, **properties: Any) -> dict[str, Any]:
    return {"name": name, "description": description, "parameters": {"type": "dict", "properties": properties}}


def request(number: int, functions: list[dict[str, Any]], text: str = "") -> dict[str, Any]:
    question = [[{"role": "user", "content": text or f"please do {number}"}]]
    return {"id": f"request_{number}", "question": question, "function": functions}


def call(number: int, name: str) -> dict[str, Any]:
    return {"id": f"request_{number}", "ground_truth": [{name: {"x": [1]}}]}


def made() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Requests with two to four functions of their own; some names occur in several requests."""
    generator = random.Random("requests")
    for number in range(REQUESTS):
        names = [f"do_{number}", f"shared_{number % 5}", f"undo_{number}", f"check_{number}"]
        names = names[: generator.randint(2, 4)]
        functions = [
            function(
                name,
                f"what {name} is for in {number}",
                size={"type": "integer", "description": "how " * generator.randint(1, 9)},
            )
            for name in names
        ]
        generator.shuffle(functions)
        yield request(number, functions), call(number, f"do_{number}")


def write(path: Path, lines: Iterable[object]) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def files(directory: Path, pairs: Iterable[tuple[object, object]]) -> dict[str, Path]:
    requests, calls = zip(*pairs, strict=True)
    return {"data": write(directory / "data.json", requests), "answers": write(directory / "answers.json", calls)}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return files(tmp_path_factory.mktemp("tools"), made())


def functions_of(question: Question) -> list[dict[str, Any]]:
    return [json.loads(line)["function"] for line in question.context.split("\n")]


@relaxed
@given(length=st.integers(80, 500), seed=st.integers(0, 5), depths=st.integers(1, 7), limit=st.integers(1, REQUESTS))
def test_every_request_has_its_function_where_it_was_asked_for(
    data: dict[str, Path], length: int, seed: int, depths: int, limit: int
) -> None:
    questions = list(tools(TaskSettings(length, limit, seed, depths, **data), words))
    assert len(questions) == len({question.text for question in questions}) == limit
    for number, question in enumerate(questions):
        assert question.identifier == question.group == f"tools/{length}/{number:04d}"
        assert words(question.context) <= length
        names = [item["name"] for item in functions_of(question)]
        assert len(set(names)) == len(names) >= 2
        assert question.candidates == tuple(names) == tuple(tool.name for tool in question.tools)
        wanted = question.text.split()[2]
        assert question.answer == f"do_{wanted}"
        position = question.candidates.index(question.answer)
        assert question.depth == position / (len(names) - 1)
        asked = number % depths / max(depths - 1, 1)
        assert abs(question.depth - asked) <= 0.5 / (len(names) - 1) + 1e-9


@relaxed
@given(few=st.integers(1, 10), more=st.integers(0, 14), seed=st.integers(0, 3))
def test_a_larger_limit_begins_with_the_same_questions(data: dict[str, Path], few: int, more: int, seed: int) -> None:
    small = list(tools(TaskSettings(150, few, seed, **data), words))
    large = list(tools(TaskSettings(150, few + more, seed, **data), words))
    assert large[:few] == small


def test_the_global_generator_has_no_part_in_it(data: dict[str, Path]) -> None:
    random.seed(1)
    state = random.getstate()
    first = list(tools(TaskSettings(150, 10, **data), words))
    assert random.getstate() == state
    random.seed(2)
    assert list(tools(TaskSettings(150, 10, **data), words)) == first


def test_the_requests_own_functions_come_first(data: dict[str, Path]) -> None:
    own = {pair[0]["question"][0][0]["content"]: {item["name"] for item in pair[0]["function"]} for pair in made()}
    for question in tools(TaskSettings(300, REQUESTS, **data), words):
        assert own[question.text] < {item["name"] for item in functions_of(question)}


def test_an_own_function_that_is_too_long_is_left_out_and_so_is_a_request(tmp_path: Path) -> None:
    long = "word " * 200
    pairs = [
        (
            request(0, [function("long_0", long), function("do_0", "short"), function("other_0", "brief")]),
            call(0, "do_0"),
        ),
        (request(1, [function("do_1", long), function("other_1", "short too")]), call(1, "do_1")),
        (request(2, [function("do_2", "small")]), call(2, "do_2")),
    ]
    settings = TaskSettings(60, 2, **files(tmp_path, pairs))
    questions = list(tools(settings, words))
    assert {question.answer for question in questions} == {"do_0", "do_2"}
    assert not any("long_0" in question.context or "do_1" in question.context for question in questions)
    with pytest.raises(EvaluationDataError, match=r"2 of the 3 questions .* 60 tokens, but 3 are wanted"):
        tools(TaskSettings(60, 3, settings.seed, 5, settings.data, settings.answers), words)


def test_a_name_that_a_request_offers_twice_stands_once(tmp_path: Path) -> None:
    own = [function("do", "a"), function("do", "b"), function("other", "c"), function("other", "d")]
    (question,) = tools(TaskSettings(500, 1, **files(tmp_path, [(request(0, own), call(0, "do"))])), words)
    assert [(item["name"], item["description"]) for item in functions_of(question)] == [("do", "a"), ("other", "c")]


def test_strangers_that_might_be_as_right_stay_out(tmp_path: Path) -> None:
    pairs = [
        (request(0, [function("get_weather", "says the weather")]), call(0, "get_weather")),
        (request(1, [function("Sky.getWeather", "tells of the sky")]), call(1, "Sky.getWeather")),
        (request(2, [function("forecast", "says the weather")]), call(2, "forecast")),
        (request(3, [function("boil", "makes hot water")]), call(3, "boil")),
    ]
    questions = tools(TaskSettings(500, 4, **files(tmp_path, pairs)), words)
    names = {question.answer: set(question.candidates) for question in questions}
    assert names["get_weather"] == {"get_weather", "boil"}
    assert names["boil"] == {"get_weather", "Sky.getWeather", "forecast", "boil"}


def test_parameters_are_in_json_schemas_words(tmp_path: Path) -> None:
    nested = {"type": "dict", "properties": {"deep": {"type": "float", "description": "deep one"}}}
    item = function(
        "do_0",
        'with "quotes" and\nlines',
        plain={"type": "string", "description": "a café", "default": "x", "enum": ["x", "y"]},
        nested=nested,
        pair={"type": "tuple", "items": {"type": "any"}},
    )
    pairs = [(request(0, [item, {**function("no_parameters", "d"), "parameters": {}}]), call(0, "do_0"))]
    (question,) = tools(TaskSettings(500, 1, **files(tmp_path, pairs)), words)
    found = {item["name"]: item for item in functions_of(question)}
    assert found["do_0"]["description"] == item["description"]
    assert found["do_0"]["parameters"] == {
        "type": "object",
        "properties": {
            "plain": {"type": "string", "description": "a café", "default": "x", "enum": ["x", "y"]},
            "nested": {"type": "object", "properties": {"deep": {"type": "number", "description": "deep one"}}},
            "pair": {"type": "array", "items": {}},
        },
    }
    assert found["no_parameters"]["parameters"] == {"type": "object"}
    assert [tool.fields["function"] for tool in question.tools] == list(found.values())
    assert "café" in question.context


def test_all_messages_up_to_the_users_last_are_the_request(tmp_path: Path) -> None:
    messages = [
        [{"role": "system", "content": "You help."}, {"role": "user", "content": "First."}],
        [
            {"role": "assistant", "content": "Which?"},
            {"role": "user", "content": "That."},
            {"role": "assistant", "content": "too late"},
        ],
    ]
    item = {**request(0, [function("do", "a"), function("other", "b")]), "question": messages}
    (question,) = tools(TaskSettings(100, 1, **files(tmp_path, [(item, call(0, "do"))])), words)
    assert question.text == "You help.\n\nFirst.\n\nWhich?\n\nThat."


GOOD = request(1, [function("do_1", "a", x={"type": "string"}), function("other_1", "b")])
GOOD_CALL = call(1, "do_1")
PAIRS = list(made())[:1]


def deep(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "dict", "properties": {"inner": schema}}
    return schema


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": 3}, "id is not a string"),
        ({"id": "request_0"}, "'request_0' was there before"),
        ({"id": "unanswered"}, "no answer to 'unanswered'"),
        ({"question": []}, "question is empty"),
        ({"question": ["hello"]}, "list of lists"),
        ({"question": [["hello"]]}, r"question\[0\]\[0\] is not an object"),
        ({"question": [[]]}, "no message of a user"),
        ({"question": [[{"role": "system", "content": "x"}]]}, "no message of a user"),
        ({"question": [[{"role": "user", "content": ""}]]}, r"question\[0\]\[0\].content is empty"),
        ({"function": {}}, "function is not a list"),
        ({"function": [{"name": "do_1"}]}, r"function\[0\].description is missing"),
        ({"function": [{**function("", "b")}]}, r"function\[0\].name is empty"),
        ({"function": [{**function("do_1", "b"), "parameters": []}]}, r"function\[0\].parameters is not an object"),
        ({"function": [{**function("do_1", "b"), "parameters": {"type": "string"}}]}, "are no object's"),
        ({"function": [{**function('do"1', "b")}]}, "cannot have the name"),
        ({"function": [{**function("none", "b")}]}, "cannot have the name 'none'"),
        ({"function": [function("do_1", "b", x=deep(MAX_NESTING))]}, "nested more than"),
        ({"function": [function("do_1", "b", x=deep(200))]}, "nested more than"),
    ],
)
def test_a_bad_request_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    paths = files(tmp_path, [*PAIRS, ({**GOOD, **change}, GOOD_CALL)])
    with pytest.raises(EvaluationDataError, match=rf"data\.json, line 2: .*{message}"):
        tools(TaskSettings(100, 1, **paths), words)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": None}, "id is not a string"),
        ({"id": "request_0"}, "'request_0' was there before"),
        ({"ground_truth": []}, "ground_truth is empty"),
        ({"ground_truth": ["do_1"]}, r"ground_truth\[0\] is not an object"),
        ({"ground_truth": [{}]}, "names 0 functions"),
        ({"ground_truth": [{"do_1": {}}, {"other_1": {}}]}, "names 2 functions"),
        ({"ground_truth": [{"absent": {}}]}, r"'absent' is none of the functions .*data\.json, line 2"),
    ],
)
def test_a_bad_answer_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    paths = files(tmp_path, [*PAIRS, (GOOD, {**GOOD_CALL, **change})])
    with pytest.raises(EvaluationDataError, match=rf"answers\.json, line 2: .*{message}"):
        tools(TaskSettings(100, 1, **paths), words)


JUNK = st.none() | st.booleans() | st.integers() | st.text(max_size=3) | st.just([]) | st.just({})


@relaxed
@given(st.data())
def test_any_value_anywhere_is_accepted_or_refused(data: dict[str, Path], draw: st.DataObject) -> None:
    line = json.loads(json.dumps(GOOD))
    answer = json.loads(json.dumps(GOOD_CALL))
    inner = line["function"][0]
    parts = [line, line["question"][0][0], inner, inner["parameters"], inner["parameters"]["properties"]["x"], answer]
    target = draw.draw(st.sampled_from(parts))
    target[draw.draw(st.sampled_from(sorted(target)))] = draw.draw(JUNK | st.lists(JUNK, max_size=2))
    directory = data["data"].parent / "junk"
    directory.mkdir(exist_ok=True)
    paths = files(directory, [(line, answer), *PAIRS])
    try:
        list(tools(TaskSettings(200, 1, **paths), words))
    except AbcliError as error:
        assert ", line " in error.message  # noqa: PT017


@pytest.mark.parametrize("settings", [TaskSettings(0, 1), TaskSettings(9, 0), TaskSettings(9, 1, depths=0)])
def test_settings_without_sense_are_wrong_usage(settings: TaskSettings) -> None:
    with pytest.raises(UsageError):
        tools(settings, words)


@pytest.mark.parametrize(("name", "setting"), [("data", "`data` FILE"), ("answers", "`answers` FILE")])
@pytest.mark.parametrize("given", [False, True])
def test_a_missing_file_is_wrong_usage_that_names_flag_and_script(
    data: dict[str, Path], tmp_path: Path, name: str, setting: str, given: bool
) -> None:
    paths = {**data, name: tmp_path / "missing" if given else None}
    with pytest.raises(UsageError) as caught:
        tools(TaskSettings(100, 1, **paths), words)
    assert setting in caught.value.hint
    assert "scripts/fetch_evaluation_data.py" in caught.value.hint
