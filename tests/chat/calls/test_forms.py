"""Formats of every kind: whatever is written in them is read, in pieces of any size, and nothing else fails."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.chat.calls.find import find_format
from abcli.chat.calls.find_calls import find_calls
from abcli.chat.calls.format import HERMES, NUMBER, CallFormat, Tags, Thoughts
from abcli.chat.calls.known_formats import KNOWN_FORMATS
from abcli.chat.calls.probes import Probes
from abcli.chat.messages import Tool
from abcli.errors import TemplateError
from tests.chat.calls.conftest import TOOLS, parse, pieces

LINES = CallFormat(
    "tags on lines",
    call_begin="<tool_call>\n<function=",
    name_end=">\n",
    call_end="</function>\n</tool_call>",
    between="\n",
    tags=Tags("<parameter=", ">\n", "\n</parameter>\n"),
)
KIMI = CallFormat(
    "name and JSON",
    section_begin="<|calls|>",
    call_begin="<|call|>functions.",
    name_end=f":{NUMBER}<|argument|>",
    call_end="<|end|>",
    section_end="<|calls_end|>",
)
BARE = replace(HERMES, call_begin='{"name": "', call_end="}", several=False, bare_begin="<|python_tag|>")
LISTED = KNOWN_FORMATS["<|/tool_call|>"]
PYTHON = KNOWN_FORMATS["<|tool_call_start|>["]
GEMMA = replace(KNOWN_FORMATS["<|tool_call>call:"], thoughts=Thoughts("<|channel>thought", "<channel|>"))
NESTED = KNOWN_FORMATS["]<]minimax[>[<tool_call>"]
HARMONY = KNOWN_FORMATS["<|start|>assistant to=functions."]
MUSE = KNOWN_FORMATS["<atem:function_calls>"]
FUNCTIONARY = KNOWN_FORMATS[">>>${recipient}"]

OSLO = ("get_weather", {"city": "Os'lo", "days": 2})
# One answer with a call in each.
ANSWERS: dict[str, tuple[CallFormat, str]] = {
    "lines": (
        LINES,
        "A\n<tool_call>\n<function=get_weather>\n<parameter=city>\nOs'lo\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n</tool_call>",
    ),
    "kimi": (
        KIMI,
        'A<|calls|><|call|>functions.get_weather:0<|argument|>{"city": "Os\'lo", "days": 2}<|end|><|calls_end|>',
    ),
    "bare": (BARE, 'A <|python_tag|>{"name": "get_weather", "parameters": {"city": "Os\'lo", "days": 2}}'),
    "listed": (
        LISTED,
        'A<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Os\'lo", "days": 2}}]<|/tool_call|>',
    ),
    "python": (PYTHON, "A<|tool_call_start|>[get_weather(city='Os\\'lo', days=2)]<|tool_call_end|>"),
    "gemma": (GEMMA, 'A<|tool_call>call:get_weather{city:<|"|>Os\'lo<|"|>,days:2}<tool_call|>'),
    "nested": (
        NESTED,
        'A]<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="get_weather">]<]minimax[>[<city>Os\'lo]<]minimax[>['
        "</city>]<]minimax[>[<days>2]<]minimax[>[</days>]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>",
    ),
    "harmony": (
        HARMONY,
        "<|channel|>final<|message|>A<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary json"
        '<|message|>{"city": "Os\'lo", "days": 2}<|call|>',
    ),
    "muse": (
        MUSE,
        " to=user<|message|>A<|eom|><|start|>assistant to=get_weather<|message|><atem:function_calls>\n"
        '<atem:invoke name="get_weather">\n<atem:parameter name="city">Os\'lo</atem:parameter>\n'
        '<atem:parameter name="days">2</atem:parameter>\n</atem:invoke>\n</atem:function_calls><|eot|>',
    ),
    "functionary": (FUNCTIONARY, 'all\nA>>>get_weather\n{"city": "Os\'lo", "days": 2}'),
}


def chunks(text: str, sizes: list[int]) -> list[str]:
    found, start = [], 0
    while start < len(text):
        size = sizes[len(found) % len(sizes)]
        found.append(text[start : start + size])
        start += size
    return found


@pytest.mark.parametrize("name", ANSWERS)
@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_a_call_is_read(name: str, size: int) -> None:
    form, text = ANSWERS[name]
    parsed = parse(form, pieces(text, size))
    assert parsed.said.strip() == "A"
    assert [(name, json.loads(arguments)) for name, arguments in parsed.calls] == [OSLO]


@pytest.mark.parametrize("name", ANSWERS)
def test_a_call_that_is_cut_off_is_dropped(name: str) -> None:
    form, text = ANSWERS[name]
    for length in range(len(text)):
        parsed = parse(form, [text[:length]], cut=True)
        assert [(name, json.loads(arguments)) for name, arguments in parsed.calls] in ([], [OSLO])
        assert parsed.said.strip()[:1] in ("", "A")
        assert "get_weather" not in parsed.said


@pytest.mark.parametrize("name", ANSWERS)
@settings(max_examples=40)
@given(data=st.data())
def test_pieces_make_no_difference_and_nothing_fails(name: str, data: st.DataObject) -> None:
    form, text = ANSWERS[name]
    cuts = [text[start:end] for start in range(0, len(text), 9) for end in (start + 9, start + 30)]
    words = st.sampled_from([*cuts, *"<>[]{}\"'\\\n ,:=()aé7", "<think>", "</think>", text])
    written = "".join(data.draw(st.lists(words, max_size=12)))
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=8))
    cut = data.draw(st.booleans())
    whole = parse(form, [written], cut=cut)
    assert parse(form, chunks(written, sizes), cut=cut) == whole
    for _, arguments in whole.calls:
        assert isinstance(json.loads(arguments.encode()), dict)


@pytest.mark.parametrize(
    ("written", "schema", "read"),
    [
        ("7", {"type": "string"}, "7"),
        ("7", {"type": "integer"}, 7),
        ("7", {}, 7),
        ("seven", {"type": "integer"}, "seven"),
        ("true", {"type": "boolean"}, True),
        ("True", {"type": "boolean"}, True),
        ("true", {"type": ["string", "integer"]}, "true"),
        ("null", {"anyOf": [{"type": "string"}, {"type": "null"}]}, None),
        ("7", {"$ref": "#/$defs/t"}, "7"),
        ("{'a': [1, None]}", {"type": "object"}, {"a": [1, None]}),
        ("{broken", {"type": "object"}, "{broken"),
        ("<![CDATA[a<b]]>", {"type": "string"}, "a<b"),
        ("[" * 5000, {"type": "array"}, "[" * 5000),
        ("7", {"enum": ["7", "8"]}, "7"),
    ],
)
def test_a_value_is_what_its_schema_says(written: str, schema: dict[str, object], read: object) -> None:
    parameters = {"type": "object", "properties": {"v": schema}, "$defs": {"t": {"type": "string"}}}
    text = f"<tool_call>\n<function=f>\n<parameter=v>\n{written}\n</parameter>\n</function>\n</tool_call>"
    ((_, arguments),) = parse(LINES, [text], [Tool("f", "", parameters)]).calls
    assert json.loads(arguments) == {"v": read}


def test_what_models_leave_out_is_not_missed() -> None:
    full = "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
    for missing in ("<tool_call>\n", "\n</parameter>", "\n</tool_call>", "</function>\n</tool_call>"):
        parsed = parse(LINES, [full.replace(missing, "", 1)])
        assert parsed.calls == [("get_weather", '{"city": "Oslo"}')], missing


def test_values_may_contain_what_ends_them() -> None:
    text = ANSWERS["lines"][1].replace("Os'lo", "a </parameter> b </function> <parameter=x> c")
    ((_, arguments),) = parse(LINES, [text]).calls
    assert json.loads(arguments)["city"] == "a </parameter> b </function> <parameter=x> c"


def test_json_that_names_no_tool_is_said_where_calls_are_bare() -> None:
    for text in ('{"name": "Bob", "arguments": {}}', '{"a": 1}', "{"):
        assert (parse(BARE, [text]).said, parse(BARE, [text]).calls) == (text, [])


def test_a_slow_template_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("abcli.chat.calls.probes._SECONDS", -1.0)
    calls: list[object] = []
    assert find_calls(Probes(lambda *arguments, **variables: calls.append(1) or ""), ()) is None
    assert calls == []


def test_messages_to_others_than_the_tools_are_not_calls() -> None:
    text = '<|channel|>commentary to=python <|constrain|>code<|message|>print("hello")'
    parsed = parse(HARMONY, [text], TOOLS)
    assert (parsed.said, parsed.thought, parsed.calls) == ("", "", [])


@pytest.mark.parametrize("form", [HARMONY, MUSE, FUNCTIONARY])
@pytest.mark.parametrize("text", ["Hello", "Hello there.\nHow are you?", "Sure\nthing", ""])
def test_a_model_that_writes_no_messages_is_heard(form: CallFormat, text: str) -> None:
    for size in (1, 100):
        assert parse(form, pieces(text, size)).said.strip() == text
        assert parse(form, pieces(text, size), cut=True).said.strip() in (text, "")


def test_thoughts_whose_beginning_only_the_prompt_has() -> None:
    def render(messages: Sequence[Mapping[str, Any]], *_: object, **variables: Any) -> str:
        text = ""
        for message in messages:
            thought = message.get("reasoning_content")
            text += f"<|{message['role']}|>" + (f"{thought}</thinking>" if thought else "") + (message["content"] or "")
        return text + ("<|assistant|><thinking>" if variables.get("add_generation_prompt") else "")

    assert find_format(render).thoughts == Thoughts("<thinking>", "</thinking>")


def test_a_template_that_fails_has_the_fallback() -> None:
    def render(*_: object, **variables: object) -> str:
        raise TemplateError("it fails", "choose another")

    assert find_format(render) == replace(HERMES, fallback=True)
