"""Grammars in which every call names a tool and has the arguments that it wants."""

from __future__ import annotations

from dataclasses import replace

import pytest

from abcli.chat.calls.format import HERMES, Thoughts
from abcli.chat.calls.grammar import Choice, call_grammar
from abcli.errors import UsageError
from abcli.grammar.constraint import Constraint
from abcli.grammar.guidance import Matchers
from tests.chat.calls.conftest import CLOCK, TOOLS, WEATHER
from tests.grammar.conftest import BYTES, END, in_bytes, writes

__all__ = ["in_bytes"]

FORM = replace(HERMES, thoughts=Thoughts("<think>", "</think>"))
OSLO = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
NOON = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'


def allowed(matchers: Matchers, text: str, choice: Choice, *, parallel: bool = True, opened: bool = False) -> bool:
    grammar = call_grammar(FORM, TOOLS, choice, parallel, {}, thought_opened=opened)
    return writes(matchers, Constraint("lark", grammar), text)


def test_a_call_can_be_required(in_bytes: Matchers) -> None:
    for text in (OSLO, NOON, f"{OSLO}\n{NOON}", f"<think>\nHm.\n</think>\n\n{NOON}"):
        assert allowed(in_bytes, text, "required")
    for text in ("", "Hello", NOON[:-3], NOON.replace("clock", "click"), OSLO.replace('"Oslo"', "7"), f"A {NOON}"):
        assert not allowed(in_bytes, text, "required")
    assert not allowed(in_bytes, OSLO.replace('"Oslo"', '"Oslo", "x": 1'), "required")


def test_a_function_can_be_required(in_bytes: Matchers) -> None:
    assert allowed(in_bytes, NOON, CLOCK)
    assert not allowed(in_bytes, OSLO, CLOCK)
    assert not allowed(in_bytes, f"{NOON}\n{NOON}", CLOCK, parallel=False)


def test_calls_can_be_left_to_the_model(in_bytes: Matchers) -> None:
    for text in ("", "Hello <tool>", OSLO, f"I'll look.\n{OSLO}", f"<think>a</think>A {OSLO}\n{NOON}"):
        assert allowed(in_bytes, text, "auto")
    for text in (f"A {NOON[:-3]}", NOON.replace("clock", "click"), f"A {NOON} B"):
        assert not allowed(in_bytes, text, "auto")


def test_a_thought_that_the_prompt_has_opened_comes_first(in_bytes: Matchers) -> None:
    assert allowed(in_bytes, f"Hm.</think>{OSLO}", "required", opened=True)
    assert not allowed(in_bytes, OSLO, "required", opened=True)


def test_special_tokens_are_tokens(in_bytes: Matchers) -> None:
    grammar = call_grammar(FORM, TOOLS, WEATHER, False, {"<tool_call>": END + 1})
    matcher = in_bytes.start(Constraint("lark", grammar))
    assert not matcher.allows(ord("x"))
    matcher.accept(END + 1)
    for byte in OSLO.removeprefix("<tool_call>").encode():
        matcher.accept(byte)
    assert matcher.finished or matcher.allows(END)
    assert BYTES.special_tokens == {"<end>": END, "<unused>": END + 1}


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_no_tools_are_refused(choice: Choice) -> None:
    with pytest.raises(UsageError):
        call_grammar(FORM, (), choice, True, {})


def test_a_hundred_tools_are_not_too_many(in_bytes: Matchers) -> None:
    long = {"type": "object", "properties": {"a": {"type": "string", "description": "words " * 200}}, "required": ["a"]}
    tools = [replace(WEATHER, name=f"f{number}", parameters=long) for number in range(100)]
    grammar = call_grammar(FORM, tools, "required", False, {})
    assert len(grammar) > 1 << 16
    call = '<tool_call>\n{"name": "f99", "arguments": {"a": "b"}}\n</tool_call>'
    assert writes(in_bytes, Constraint("lark", grammar), call)
    assert not writes(in_bytes, Constraint("lark", grammar), call.replace("f99", "f100"))
