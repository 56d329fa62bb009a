"""Messages of OpenAI's clients are read as they are meant, and what cannot be is named."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.chat.message_format import message_fields, read_messages
from abcli.chat.messages import Message, ToolCall
from abcli.errors import PromptError
from tests.chat.strategies import MESSAGES

CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


@settings(max_examples=50)
@given(st.lists(MESSAGES, min_size=1))
def test_what_is_written_is_read_back(messages: list[Message]) -> None:
    written = json.loads(json.dumps([message_fields(message) for message in messages]))
    assert read_messages(written) == tuple(messages)


def test_a_conversation_with_tools_is_read() -> None:
    messages = read_messages(
        [
            {"role": "developer", "content": "s"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "me"},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "t", "refusal": None},
            {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "1"},
        ]
    )
    assert messages == (
        Message("system", "s"),
        Message("user", "a\nb"),
        Message("assistant", "", "t", (ToolCall("f", '{"a": 1}', "c1"),)),
        Message("tool", "1", tool_call_id="c1", name="f"),
    )


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ("hi", "message 2 is"),
        ({"role": "robot", "content": ""}, "has the role"),
        ({"role": "user"}, "the content of message 2 is missing"),
        ({"role": "user", "content": "", "tool_calls": [CALL]}, 'the field "tool_calls" is not known'),
        ({"role": "user", "content": "\ud800"}, "half a character"),
        ({"role": "user", "content": [{"type": "image_url"}]}, "a part of type"),
        ({"role": "assistant", "tool_calls": CALL}, "the tool_calls of message 2"),
        ({"role": "assistant", "tool_calls": ["f"]}, "message 2 has a call"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "", "arguments": "{}"}}]}, "message 2 has a call"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]},
            "message 2 has a call",
        ),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}, "message 2 has a call"),
        ({"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[" * 99999}}]}, "has a call"),
        ({"role": "assistant", "tool_calls": [{"id": 5, "function": {"name": "f"}}]}, "the id of a call in message 2"),
        ({"role": "tool", "content": "x", "tool_call_id": 5}, "the tool_call_id of message 2"),
    ],
)
def test_what_cannot_be_read_is_named(message: object, problem: str) -> None:
    with pytest.raises(PromptError, match=problem) as raised:
        read_messages([{"role": "user", "content": "x"}, message])
    assert raised.value.hint
