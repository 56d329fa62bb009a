"""Tools from JSON, as OpenAI's clients write them, and from Python functions."""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, TypedDict

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.chat.functions import as_tools, tool_of_function
from abcli.chat.messages import Tool
from abcli.chat.tools import read_tools, read_tools_file, without_notes
from abcli.errors import PromptError

SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": SCHEMA}}
NAMES = st.text("abcXYZ019_.:/-", min_size=1, max_size=20).filter(lambda name: name not in ("auto", "none"))


def test_a_list_of_tools_is_read() -> None:
    bare = {"name": "stop", "parameters": None}
    tools = read_tools([WEATHER, bare, {"type": "function", "function": {"name": "go", "strict": True}}])
    assert tools == (Tool("get_weather", "Weather", SCHEMA), Tool("stop"), Tool("go"))
    assert read_tools({"tools": [WEATHER]}) == tools[:1]


@given(st.lists(st.builds(Tool, NAMES, st.text(st.characters(exclude_categories=["Cs"]))), unique_by=lambda t: t.name))
def test_what_is_written_is_read_back(tools: list[Tool]) -> None:
    assert read_tools(json.loads(json.dumps([tool.fields for tool in tools]))) == tuple(tools)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (None, "tools is missing"),
        ("x", 'tools is "x"'),
        ({"name": "f"}, "tools is"),
        (["f"], 'tools[0] is "f"'),
        ([{"type": "web_search"}], "tools[0].name is missing"),
        ([{"type": "custom", "function": {}}], 'tools[0].type is "custom"'),
        ([WEATHER, {"type": "function"}], "tools[1].function is missing"),
        ([WEATHER, {"type": "function", "function": {}}], "tools[1].function.name is missing"),
        ([{"name": 3}], "tools[0].name is 3"),
        ([{"name": "f\ud800"}], "tools[0].name has half a character"),
        ([{"name": "f", "description": 1}], "tools[0].description is 1"),
        ([{"name": "f", "parameters": []}], "tools[0].parameters is []"),
        ([{"name": "f", "parameters": {"type": "string"}}], 'tools[0].parameters.type is "string"'),
        ([{"name": "f", "parameters": {"properties": []}}], "tools[0].parameters.properties is []"),
        ([{"name": "a b"}], 'tools[0] cannot have the name "a b"'),
        ([{"name": ""}], 'tools[0] cannot have the name ""'),
        ([{"name": "<|im_end|>"}], "tools[0] cannot have the name"),
        ([{"name": "auto"}], 'tools[0] cannot have the name "auto"'),
        ([WEATHER, WEATHER], 'tools[1] has the name "get_weather", as tools[0] has'),
        ([{"name": f"f{number}"} for number in range(513)], "there are 513 tools"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(value: Any, problem: str) -> None:
    with pytest.raises(PromptError) as caught:
        read_tools(value)
    assert caught.value.message.startswith(problem)
    assert caught.value.hint


def test_a_grammar_needs_no_notes() -> None:
    inner = {"type": "string", "description": "d", "enum": ["description", {"title": 1}], "default": "a"}
    schema = {
        "type": "object",
        "title": "t",
        "properties": {"description": inner, "properties": {"properties": {"title": inner}}, "l": {"items": inner}},
        "$defs": {"default": {"anyOf": [inner, True]}},
        "required": ["description"],
    }
    bare = {"type": "string", "enum": ["description", {"title": 1}]}
    assert without_notes(Tool("f", "Long.", schema)) == Tool(
        "f",
        "",
        {
            "type": "object",
            "properties": {"description": bare, "properties": {"properties": {"title": bare}}, "l": {"items": bare}},
            "$defs": {"default": {"anyOf": [bare, True]}},
            "required": ["description"],
        },
    )


@pytest.mark.parametrize(("text", "problem"), [("[", "is not JSON"), ("[]", "has no tools"), ("[1]", "tools[0] is 1")])
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "tools.json"
    file.write_text(text)
    with pytest.raises(PromptError) as caught:
        read_tools_file(file)
    assert str(file) in caught.value.message
    assert problem in caught.value.message
    file.write_text(json.dumps([WEATHER]))
    assert read_tools_file(file) == read_tools([WEATHER])


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.0


class Box(TypedDict, total=False):
    corner: Point


def draw(
    title: str,
    corners: list[Point],
    colour: Colour = Colour.RED,
    size: Annotated[int, "in points"] = 3,
    style: Literal["solid", "dotted"] | None = None,
    box: Optional[Box] = None,  # noqa: UP045 - people write both
    labels: dict[str, tuple[int, ...]] = {},  # noqa: B006 - never called
    pair: tuple[int, str] = (1, ""),
    anything: Any = None,
) -> None:
    """Draw something
    on a sheet.

    Longer.

    Args:
        title: What stands above,
            in one line.
        colour (Colour, optional): Of the line.

    Returns:
        title: nothing
    """


def test_a_function_says_all_a_tool_needs() -> None:
    tool = tool_of_function(draw)
    assert (tool.name, tool.description) == ("draw", "Draw something on a sheet. Longer.")
    schema = tool.parameters
    assert schema["required"] == ["title", "corners"]
    properties = schema["properties"]
    assert properties["title"] == {"type": "string", "description": "What stands above, in one line."}
    assert properties["colour"] == {"enum": ["red", "blue"], "description": "Of the line."}
    assert properties["size"] == {"type": "integer", "description": "in points"}
    right: dict[str, Any] = {"title": "t", "corners": [{"x": 1}], "box": {"corner": {"x": 1, "y": 2}}, "pair": [1, "a"]}
    right |= {"style": "dotted", "labels": {"a": [1, 2]}, "anything": {"b": [None]}}
    jsonschema.validate(right, schema)
    for wrong in ({"title": 1}, {"corners": [{}]}, {"style": "x"}, {"pair": [1]}, {"pair": ["a", 1]}, {"other": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate({**right, **wrong}, schema)


def test_other_ways_to_write_a_docstring() -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers.

        :param a: the first,
            of two
        :param int b: the second
        :return: the sum
        """
        return a + b

    tool = tool_of_function(add)
    assert tool.description == "Add two numbers."
    assert [item["description"] for item in tool.parameters["properties"].values()] == [
        "the first, of two",
        "the second",
    ]


def untyped(value):  # type: ignore[no-untyped-def]
    pass


def positional(value: int, /) -> None:
    pass


def many(*values: int) -> None:
    pass


def strange(value: bytes) -> None:
    pass


def unknown(value: "Nowhere") -> None:  # type: ignore[name-defined]  # noqa: F821, UP037
    pass


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (positional, "positional(value) cannot be given by its name"),
        (many, "many(values) cannot"),
        (strange, "strange(value) has the type bytes"),
        (unknown, "unknown cannot be a tool"),
    ],
)
def test_what_cannot_be_a_tool(function: Callable[..., Any], problem: str) -> None:
    with pytest.raises(PromptError) as caught:
        as_tools([function])
    assert caught.value.message.startswith(problem)


def test_callers_may_mix_what_is_a_tool() -> None:
    tools: Sequence[Any] = (Tool("a"), {"name": "b"}, untyped)
    assert [tool.name for tool in as_tools(tools)] == ["a", "b", "untyped"]
    with pytest.raises(PromptError, match="has the name"):
        as_tools([Tool("a"), {"name": "a"}])
