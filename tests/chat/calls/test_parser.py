"""Answers read as they come: said, thought, called."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.chat.calls.format import HERMES, Thoughts
from abcli.chat.calls.parser import AnswerParser
from tests.chat.calls.conftest import TOOLS, Parsed, parse, pieces

FORM = replace(HERMES, thoughts=Thoughts("<think>", "</think>"))
OSLO = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Os\\"}lo", "days": 2}}\n</tool_call>'
CLOCK = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
ANSWER = f"<think>\nHm <b>.\n</think>\n\nLet me <look.\n{OSLO}\n{CLOCK}"
OSLO_CALL = ("get_weather", '{"city": "Os\\"}lo", "days": 2}')


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
def test_an_answer_is_told_apart(size: int) -> None:
    assert parse(FORM, pieces(ANSWER, size)) == Parsed("Let me <look.", "Hm <b>.", [OSLO_CALL, ("clock", "{}")])


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "said", "calls"),
    {
        "nothing": ("", "", []),
        "plain": (" Hello <tool> \n", " Hello <tool> \n", []),
        "another order and spacing": (
            '<tool_call>{"arguments":{"city":"A"},"x":[1],"name":"get_weather"}</tool_call>',
            "",
            [("get_weather", '{"city":"A"}')],
        ),
        "arguments as a text": (
            '<tool_call>\n{"name": "get_weather", "arguments": "{\\"city\\": \\"A\\"}"}\n</tool_call>',
            "",
            [("get_weather", '{"city": "A"}')],
        ),
        "no arguments": ('<tool_call>{"name": "clock"}</tool_call>', "", [("clock", "{}")]),
        "a line's end in a text": (
            '<tool_call>{"name": "get_weather", "arguments": {"city": "A\nB"}}</tool_call>',
            "",
            [("get_weather", '{"city": "A\\nB"}')],
        ),
        "text between calls": (f"A {CLOCK} B\n{CLOCK}", "A  B", [("clock", "{}")] * 2),
        "no end": (OSLO.removesuffix("</tool_call>"), "", [OSLO_CALL]),
        "no JSON": ("A <tool_call>none</tool_call> B", "A <tool_call>none</tool_call> B", []),
        "no name": ('<tool_call>{"arguments": {}}</tool_call>', '<tool_call>{"arguments": {}}</tool_call>', []),
        "an unfinished call": ('<tool_call>{"name": "clock"', '<tool_call>{"name": "clock"', []),
        "a thought that is reopened": (f"<think>a</think>b<think>c</think>{CLOCK}", "b", [("clock", "{}")]),
    }.values(),
)
def test_what_models_make_of_it(text: str, said: str, calls: list[tuple[str, str]], size: int) -> None:
    parsed = parse(FORM, pieces(text, size))
    assert (parsed.said, parsed.calls) == (said, calls)


def test_a_thought_that_the_prompt_has_opened() -> None:
    assert Thoughts("<think>", "</think>").opened_by("<|im_start|>assistant\n<think>\n")
    assert parse(FORM, ["Hm.\n</think>\n\nYes"], opened=True) == Parsed("Yes", "Hm.", [])
    assert parse(FORM, ["Hm.\n"], opened=True, cut=True) == Parsed("", "Hm.", [])


def test_without_tools_nothing_is_a_call() -> None:
    assert parse(FORM, [OSLO], tools=()) == Parsed(OSLO, "", [])


def test_a_name_comes_once_and_arguments_as_they_come() -> None:
    parser = AnswerParser(FORM, TOOLS)
    assert parser.feed('<tool_call>\n{"name": "get_wea') == []
    kinds = [type(event).__name__ for event in parser.feed('ther", "arguments": {"city"')]
    assert kinds == ["CallBegun", "ArgumentsText"]


@given(st.integers(0, len(ANSWER)))
def test_a_call_that_is_cut_off_is_dropped(length: int) -> None:
    parsed = parse(FORM, [ANSWER[:length]], cut=True)
    assert parsed.calls == [OSLO_CALL, ("clock", "{}")][: len(parsed.calls)]
    assert "tool_call>" not in parsed.said
    assert "{" not in parsed.said
    # The end marker may be missing: all of the call is there.
    assert len(parsed.calls) >= ANSWER[:length].count("</tool_call>")


@given(
    st.lists(st.sampled_from([*'<>/{}"\\ \na', "<think>", "</think>", "<tool_call>", "</tool_call>", OSLO, CLOCK])),
    st.lists(st.integers(1, 9), min_size=1),
    st.booleans(),
)
def test_the_pieces_make_no_difference(parts: list[str], sizes: list[int], cut: bool) -> None:
    text = "".join(parts)
    chunks, start = [], 0
    while start < len(text):
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(text[start : start + size])
        start += size
    assert parse(FORM, chunks, cut=cut) == parse(FORM, [text], cut=cut)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists), st.booleans())
def test_any_argument_comes_back(value: object, escaped: bool) -> None:
    arguments = json.dumps({"city": value}, ensure_ascii=escaped)
    text = f'<tool_call>\n{{"name": "get_weather", "arguments": {arguments}}}\n</tool_call>'
    ((name, found),) = parse(FORM, pieces(text, 3)).calls
    assert (name, found) == ("get_weather", arguments)


def test_without_thoughts_in_the_format_all_is_said() -> None:
    assert parse(replace(FORM, thoughts=None), ["<think>Hm.</think>Yes"]) == Parsed("<think>Hm.</think>Yes", "", [])
