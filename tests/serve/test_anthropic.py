"""Requests for messages of Anthropic's as chat requests, and pieces of answers as its events."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from abcli.chat.answer import Piece
from abcli.chat.calls.events import ArgumentsText, CallBegun, CallDropped
from abcli.chat.message_format import read_messages
from abcli.errors import UsageError
from abcli.serve.anthropic.events import MessageEvents
from abcli.serve.anthropic.request import chat_request
from tests.serve.conftest import MESSAGES, events_in
from tests.serve.pieces import call_pieces, last_piece
from tests.serve.schemas import check

WEATHER = {"name": "weather", "description": "Tells.", "input_schema": {"type": "object", "properties": {}}}
HI = [{"role": "user", "content": "Hi"}]


def test_settings_are_named_as_a_chats() -> None:
    request = chat_request(
        {
            "model": "m",
            "max_tokens": 20,
            "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
            "messages": HI,
            "stop_sequences": ["\n\n"],
            "tools": [WEATHER, {"type": "web_search_20260209", "name": "web_search"}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
            "output_config": {"effort": "low"},
            "metadata": {"user_id": "x"},
            "top_k": 5,
        }
    )
    assert request == {
        "model": "m",
        "max_tokens": 20,
        "messages": [{"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, *HI],
        "stop": ["\n\n"],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "weather",
                    "description": "Tells.",
                    "parameters": {"type": "object", "properties": {}},
                },
            }
        ],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "enable_thinking": True,
        "thinking_budget_tokens": 1024,
        "reasoning_effort": "low",
        "top_k": 5,
    }


def test_blocks_become_the_messages_of_a_chat() -> None:
    blocks = [
        {"role": "user", "content": [{"type": "text", "text": "Rain?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "Look.", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "a", "name": "weather", "input": {"city": "Köln"}},
                {"type": "tool_use", "id": "b", "name": "weather", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "a", "content": "rain"},
                {"type": "tool_result", "tool_use_id": "b", "content": [{"type": "text", "text": "sun"}]},
                {"type": "tool_result", "tool_use_id": "c", "is_error": True},
                {"type": "text", "text": "And then?"},
                {"type": "document", "title": "T", "source": {"type": "text", "data": "Wind."}},
            ],
        },
    ]
    messages = read_messages(chat_request({"messages": blocks})["messages"])
    assert [(message.role, message.content, message.reasoning_content) for message in messages] == [
        ("user", "Rain?", ""),
        ("assistant", "I look.", "Look."),
        ("tool", "rain", ""),
        ("tool", "sun", ""),
        ("tool", "", ""),
        ("user", "And then?\nT\nWind.", ""),
    ]
    assert [(call.id, call.arguments) for call in messages[1].tool_calls] == [("a", '{"city": "Köln"}'), ("b", "{}")]
    assert [message.tool_call_id for message in messages[2:5]] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("thinking", "found"),
    [
        ({"type": "disabled"}, {"enable_thinking": False}),
        ({"type": "enabled"}, {"enable_thinking": True}),
        ({"type": "adaptive"}, {}),
    ],
)
def test_thinking_can_be_switched(thinking: dict[str, Any], found: dict[str, Any]) -> None:
    assert chat_request({"messages": HI, "thinking": thinking}) == {"messages": HI, **found}


def test_a_form_is_a_response_format() -> None:
    form = {"type": "json_schema", "schema": {"type": "object"}}
    found = chat_request({"messages": HI, "output_config": {"format": form}})
    assert found["response_format"]["json_schema"]["schema"] == {"type": "object"}


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["x"]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0].tool_use_id",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "name": "x", "id": "a"}]}]},
            "messages[0].content[0].input",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "document", "source": {"type": "base64"}}]}]},
            "messages[0].content[0].source.type",
        ),
        ({"messages": HI, "system": 3}, "system"),
        ({"messages": HI, "stop_sequences": "x"}, "stop_sequences"),
        ({"messages": HI, "stop_sequences": [3]}, "stop_sequences[0]"),
        ({"messages": HI, "tools": {}}, "tools"),
        ({"messages": HI, "tool_choice": "auto"}, "tool_choice"),
        ({"messages": HI, "tool_choice": {"type": "all"}}, "tool_choice.type"),
        ({"messages": HI, "thinking": {"type": "hard"}}, "thinking.type"),
        ({"messages": HI, "thinking": {"type": "enabled", "budget_tokens": "1"}}, "thinking.budget_tokens"),
        ({"messages": HI, "output_config": {"format": {"type": "xml"}}}, "output_config.format.type"),
    ],
)
def test_what_is_wrong_is_named(body: dict[str, Any], place: str) -> None:
    with pytest.raises(UsageError) as caught:
        chat_request(body)
    assert caught.value.setting == place
    assert f"`{place}`" in caught.value.message


def events_of(pieces: list[Piece], **body: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of an answer, all of which the schemas allow, and the message."""
    told = MessageEvents({"messages": HI, "max_tokens": 7, **body}, "m")
    events = [*told.begin(12), *(event for piece in pieces for event in told.add(piece))]
    for event in events:
        # It is in Anthropic's documentation, not in its schemas.
        if event["type"] != "ping":
            check(event, "anthropic", "MessageStreamEvent")
    check(told.message, "anthropic", "Message")
    return events, told.message


def test_a_text_has_the_events_that_anthropic_sends() -> None:
    events, message = events_of([Piece("Hel"), Piece(""), Piece("lo"), last_piece()])
    assert [event["type"] for event in events] == [
        "message_start",
        "ping",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["input_tokens"] == 12
    assert message["content"] == [{"type": "text", "text": "Hello", "citations": None}]
    assert (message["stop_reason"], message["stop_sequence"]) == ("end_turn", None)
    assert message["usage"] == events[-2]["usage"]
    counts = ("input_tokens", "cache_read_input_tokens", "output_tokens")
    assert [message["usage"][name] for name in counts] == [8, 4, 7]


def test_thought_text_and_calls_are_blocks_in_their_order() -> None:
    pieces = [
        Piece("", reasoning="Hm"),
        Piece("", reasoning="m."),
        Piece("\n\n"),
        *call_pieces(0, "weather", '{"city":', ' "Bonn"}'),
        *call_pieces(1, "weather", "{}"),
        last_piece("tool_calls"),
    ]
    events, message = events_of(pieces)
    thought, *calls = message["content"]
    assert thought == {"type": "thinking", "thinking": "Hmm.", "signature": ""}
    assert [(call["id"], call["name"], call["input"]) for call in calls] == [
        ("call00000", "weather", {"city": "Bonn"}),
        ("call00001", "weather", {}),
    ]
    assert message["stop_reason"] == "tool_use"
    starts = [event["index"] for event in events if event["type"] == "content_block_start"]
    assert starts == [event["index"] for event in events if event["type"] == "content_block_stop"] == [0, 1, 2]
    parts = [event["delta"]["partial_json"] for event in events if event.get("index") == 1 and "delta" in event]
    assert parts == ['{"city":', ' "Bonn"}']


def test_a_call_that_was_cut_is_not_in_the_message() -> None:
    cut = [Piece("", events=(CallBegun(0, "a", "weather"),)), Piece("", events=(ArgumentsText(0, '{"ci'),))]
    events, message = events_of([Piece("So."), *cut, Piece("", events=(CallDropped(0),)), last_piece("length")])
    assert message["content"] == [{"type": "text", "text": "So.", "citations": None}]
    assert message["stop_reason"] == "max_tokens"
    assert events[-3] == {"type": "content_block_stop", "index": 1}


def test_a_full_context_is_told_from_a_limit() -> None:
    _events, message = events_of([Piece("So."), last_piece("length")], max_tokens=8)
    assert message["stop_reason"] == "model_context_window_exceeded"


def test_an_answer_to_which_nothing_was_said_is_an_empty_text() -> None:
    _events, message = events_of([Piece("\n"), last_piece()])
    assert message["content"] == [{"type": "text", "text": "", "citations": None}]


def test_a_message_is_answered(client: TestClient) -> None:
    request = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6}
    whole = client.post("/v1/messages", json=request).json()
    check(whole, "anthropic", "Message")
    assert (whole["model"], whole["stop_reason"]) == ("tiny", "max_tokens")
    assert whole["usage"]["output_tokens"] == 6
    chat = client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 6}).json()
    (block,) = whole["content"]
    assert block["text"] == chat["choices"][0]["message"]["content"]


def test_a_stream_says_the_same(client: TestClient) -> None:
    request = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6}
    whole = client.post("/v1/messages", json=request).json()
    response = client.post("/v1/messages", json={**request, "stream": True})
    events = events_in(response.text)
    assert [name for name, _event in events] == [event["type"] for _name, event in events]
    texts = [event["delta"]["text"] for name, event in events if name == "content_block_delta"]
    assert "".join(texts) == whole["content"][0]["text"]
    started, ended = events[0][1]["message"]["usage"], events[-2][1]["usage"]
    assert started["input_tokens"] == ended["input_tokens"] + ended["cache_read_input_tokens"]
    assert ended["output_tokens"] == 6


def test_errors_have_anthropics_shape(client: TestClient) -> None:
    response = client.post("/v1/messages", json={"messages": [{"role": "user", "content": [{"type": "image"}]}]})
    assert response.status_code == 400
    check(response.json(), "anthropic", "ErrorResponse")
    assert "messages[0].content[0].type" in response.json()["error"]["message"]
    long = client.post("/v1/messages", json={"messages": [{"role": "user", "content": "long " * 600}]})
    assert long.status_code == 400
    assert long.json()["error"]["type"] == "invalid_request_error"
    assert long.json()["error"]["message"].startswith("prompt is too long: ")


def test_tokens_are_counted(client: TestClient) -> None:
    request = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6, "system": "Be brief."}
    counted = client.post("/v1/messages/count_tokens", json=request).json()
    usage = client.post("/v1/messages", json=request).json()["usage"]
    assert counted == {"input_tokens": usage["input_tokens"] + usage["cache_read_input_tokens"]}
    long = {"messages": [{"role": "user", "content": "long " * 600}]}
    assert client.post("/v1/messages/count_tokens", json=long).json()["input_tokens"] > 600


def test_the_stop_sequence_that_ended_it_is_named(client: TestClient) -> None:
    request = {"model": "tiny", "messages": MESSAGES, "max_tokens": 6}
    text = client.post("/v1/messages", json=request).json()["content"][0]["text"]
    stop = text[2:4]
    message = client.post("/v1/messages", json={**request, "stop_sequences": ["never", stop]}).json()
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", stop)
    assert message["content"][0]["text"] == text[: text.index(stop)]
