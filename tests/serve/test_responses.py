"""Requests for responses as chat requests, and pieces of answers as OpenAI's events."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.testclient import TestClient

from abcli.chat.answer import Piece, Usage
from abcli.chat.calls.events import ArgumentsText, CallBegun, CallDropped
from abcli.chat.message_format import read_messages
from abcli.errors import UsageError
from abcli.serve.responses.events import ResponseEvents
from abcli.serve.responses.request import chat_request
from tests.serve.conftest import MESSAGES, events_in
from tests.serve.pieces import call_pieces, last_piece
from tests.serve.schemas import check, check_response_event

WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": True}


def test_a_text_is_a_message_of_the_user_behind_the_instructions() -> None:
    request = chat_request({"model": "m", "input": "Hi", "instructions": "Be brief.", "max_output_tokens": 20})
    assert request == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "max_completion_tokens": 20,
    }


def test_items_become_the_messages_of_a_chat() -> None:
    items = [
        {"role": "developer", "content": "Use tools."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Rain?"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "Look."}]},
        {"type": "function_call", "call_id": "a", "name": "weather", "arguments": '{"city": "Bonn"}'},
        {"type": "function_call", "call_id": "b", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "a", "output": "rain"},
        {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "sun"}]},
        {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "Say it."}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Both."}]},
        {"type": "message", "role": "user", "content": "Thanks"},
    ]
    messages = read_messages(chat_request({"input": items})["messages"])
    assert [(message.role, message.content, message.reasoning_content) for message in messages] == [
        ("system", "Use tools.", ""),
        ("user", "Rain?", ""),
        ("assistant", "", "Look."),
        ("tool", "rain", ""),
        ("tool", "sun", ""),
        ("assistant", "Both.", "Say it."),
        ("user", "Thanks", ""),
    ]
    assert [(call.id, call.arguments) for call in messages[2].tool_calls] == [("a", '{"city": "Bonn"}'), ("b", "{}")]
    assert [message.tool_call_id for message in messages[3:5]] == ["a", "b"]


def test_settings_are_named_as_a_chats() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    request = chat_request(
        {
            "input": "x",
            "reasoning": {"effort": "low", "summary": "auto"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
            "tools": [WEATHER, {"type": "web_search"}],
            "tool_choice": {"type": "function", "name": "weather"},
            "parallel_tool_calls": False,
            "include": ["message.output_text.logprobs"],
            "top_logprobs": 2,
            "store": True,
            "metadata": {"a": "b"},
            "top_k": 5,
            "abcli": {"buckets": 1},
        }
    )
    assert request["reasoning_effort"] == "low"
    assert request["response_format"]["json_schema"] == {"name": "n", "schema": schema, "strict": True}
    assert [tool["function"]["name"] for tool in request["tools"]] == ["weather"]
    assert request["tool_choice"] == {"type": "function", "function": {"name": "weather"}}
    assert (request["logprobs"], request["top_logprobs"]) == (True, 2)
    assert (request["top_k"], request["abcli"], request["parallel_tool_calls"]) == (5, {"buckets": 1}, False)
    assert not {"store", "metadata", "input", "text", "reasoning", "include"} & set(request)


def test_allowed_tools_are_the_only_ones() -> None:
    choice = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]}
    request = chat_request({"input": "x", "tools": [{**WEATHER, "name": "time"}, WEATHER], "tool_choice": choice})
    assert [tool["function"]["name"] for tool in request["tools"]] == ["weather"]
    assert request["tool_choice"] == "required"


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "critic", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user"}]}, "input[0].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, "input[0].content[0].text"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "name": "x", "arguments": "{}"}]}, "input[0].call_id"),
        ({"input": "x", "instructions": 3}, "instructions"),
        ({"input": "x", "previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": "x", "background": True}, "background"),
        ({"input": "x", "tools": {}}, "tools"),
        ({"input": "x", "tools": [3]}, "tools[0]"),
        ({"input": "x", "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"input": "x", "text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"input": "x", "reasoning": {"effort": 3}}, "reasoning.effort"),
        ({"input": "x", "top_logprobs": 21}, "top_logprobs"),
        ({"input": "x", "include": "all"}, "include"),
    ],
)
def test_what_is_wrong_is_named(body: dict[str, Any], place: str) -> None:
    with pytest.raises(UsageError) as caught:
        chat_request(body)
    assert caught.value.setting == place
    assert f"`{place}`" in caught.value.message


def events_of(pieces: list[Piece], **body: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The events of an answer, all of which the schemas allow, and the response."""
    told = ResponseEvents({"input": "x", **body}, "m")
    events = [*told.begin(), *(event for piece in pieces for event in told.add(piece))]
    for event in events:
        check_response_event(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    check(told.response, "openai_chat", "Response")
    check(told.response, "openresponses", "ResponseResource")
    assert events[-1]["response"] == told.response
    return events, told.response


def test_a_text_has_the_events_that_openai_sends() -> None:
    events, response = events_of([Piece("Hel"), Piece(""), Piece("lo"), last_piece()])
    assert [event["type"] for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert events[2]["item"]["content"] == []
    assert response["status"] == "completed"
    assert response["output"][0]["content"][0]["text"] == "Hello"
    assert response["usage"]["input_tokens_details"]["cached_tokens"] == 4
    assert response["usage"]["total_tokens"] == 19


def test_thought_text_and_calls_are_items_in_their_order() -> None:
    pieces = [
        Piece("", reasoning="Hm"),
        Piece("", reasoning="m."),
        Piece("\n\n"),
        Piece("I look."),
        *call_pieces(0, "weather", '{"city":', ' "Bonn"}'),
        Piece("\n"),
        *call_pieces(1, "weather", "{}"),
        last_piece("tool_calls"),
    ]
    events, response = events_of(pieces, tools=[WEATHER], reasoning={"effort": "low"})
    thought, message, first, second = response["output"]
    assert thought["content"] == [{"type": "reasoning_text", "text": "Hmm."}]
    assert message["content"][0]["text"] == "\n\nI look."
    assert (first["name"], first["arguments"], first["call_id"]) == ("weather", '{"city": "Bonn"}', "call00000")
    assert (second["arguments"], second["call_id"]) == ("{}", "call00001")
    assert {item["status"] for item in response["output"]} == {"completed"}
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] == 2
    done = [event for event in events if event["type"] == "response.function_call_arguments.done"]
    assert [event["arguments"] for event in done] == ['{"city": "Bonn"}', "{}"]
    assert response["tools"][0]["name"] == "weather"


def test_what_was_cut_is_incomplete() -> None:
    cut = [Piece("", events=(CallBegun(0, "a", "weather"),)), Piece("", events=(ArgumentsText(0, '{"ci'),))]
    pieces = [*cut, Piece("", events=(CallDropped(0),)), last_piece("length")]
    events, response = events_of(pieces, tools=[WEATHER], max_output_tokens=16)
    assert events[-1]["type"] == "response.incomplete"
    assert response["incomplete_details"] == {"reason": "max_output_tokens"}
    assert response["completed_at"] is None
    assert [(item["type"], item["status"]) for item in response["output"]] == [("function_call", "incomplete")]


def test_an_answer_to_which_nothing_was_said_is_an_empty_text() -> None:
    _events, response = events_of([Piece("\n"), last_piece(usage=Usage(3, 0, 1))])
    assert response["output"][0]["content"][0]["text"] == ""


def test_an_error_in_the_middle_ends_the_stream() -> None:
    told = ResponseEvents({"input": "x"}, "m")
    events = [*told.begin(), *told.add(Piece("He")), *told.fail("the model failed")]
    check_response_event(events[-1])
    assert events[-1]["type"] == "response.failed"
    assert events[-1]["response"]["error"] == {"code": "server_error", "message": "the model failed"}


def test_the_response_repeats_the_settings_it_was_made_with() -> None:
    form = {"type": "json_schema", "name": "n", "schema": {"type": "object"}}
    body = {"temperature": 0.25, "text": {"format": form}, "metadata": {"a": "b"}, "tool_choice": "none", "top_p": 0.5}
    _events, response = events_of([Piece("{}"), last_piece()], **body)
    assert (response["temperature"], response["top_p"], response["metadata"]) == (0.25, 0.5, {"a": "b"})
    assert response["text"]["format"]["name"] == "n"
    assert response["tool_choice"] == "none"


def test_an_event_tells_what_was_so_then() -> None:
    told = ResponseEvents({"input": "x"}, "m")
    created = next(iter(told.begin()))
    list(told.add(Piece("later")))
    assert created["response"]["output"] == []


PATH = "/v1/responses"


def test_a_response_is_answered(client: TestClient) -> None:
    whole = client.post(PATH, json={"input": "Hello", "max_output_tokens": 6}).json()
    check(whole, "openai_chat", "Response")
    assert (whole["model"], whole["status"]) == ("tiny", "incomplete")
    chat = client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 6}).json()
    assert whole["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]


def test_a_stream_says_the_same(client: TestClient) -> None:
    request = {"input": "Hello", "max_output_tokens": 6}
    whole = client.post(PATH, json=request).json()
    events = events_in(client.post(PATH, json={**request, "stream": True}).text)
    for name, event in events:
        assert name == event["type"]
        check_response_event(event)
    texts = [event["delta"] for name, event in events if name == "response.output_text.delta"]
    assert "".join(texts) == whole["output"][0]["content"][0]["text"]
    assert events[-1][0] == "response.incomplete"


def test_log_probabilities_stand_at_the_text(client: TestClient) -> None:
    request = {"input": "Hello", "top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    (part,) = client.post(PATH, json=request).json()["output"][0]["content"]
    assert len(part["logprobs"]) == 8
    for token in part["logprobs"]:
        assert token["logprob"] == token["top_logprobs"][0]["logprob"]
        assert 0 <= token["agreement"] <= 1
    events = events_in(client.post(PATH, json={**request, "stream": True}).text)
    deltas = [event for name, event in events if name == "response.output_text.delta"]
    assert [token["token"] for event in deltas for token in event["logprobs"]] == [
        token["token"] for token in part["logprobs"]
    ]


def test_a_wrong_field_is_named_before_anything_is_streamed(client: TestClient) -> None:
    response = client.post(PATH, json={"input": [{"role": "user"}], "stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input[0].content"


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions"])
def test_tokens_are_counted(client: TestClient, path: str) -> None:
    request: dict[str, Any] = {"input": "Hello"} if path == PATH else {"messages": MESSAGES}
    counted = client.post(f"{path}/input_tokens", json=request).json()["input_tokens"]
    usage = client.post(PATH, json={"input": "Hello"}).json()["usage"]
    assert counted == usage["input_tokens"]


def test_a_stream_tells_its_progress_and_timings_where_that_is_wanted(client: TestClient) -> None:
    request = {"input": "another prompt of this test alone", "stream": True}
    wanted = {"return_progress": True, "timings_per_token": True}
    events = [value for _name, value in events_in(client.post("/v1/responses", json={**request, **wanted}).text)]
    told = [event["prompt_progress"] for event in events if "prompt_progress" in event]
    assert told[0]["processed"] == told[0]["cache"] < told[-1]["processed"] == told[-1]["total"]
    assert {event["type"] for event in events if "prompt_progress" in event} == {"response.in_progress"}
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert all("timings" in event for event in deltas)
    assert events[-1]["timings"]["predicted_n"] == 8
    events = [value for _name, value in events_in(client.post("/v1/responses", json=request).text)]
    assert not any("timings" in event or "prompt_progress" in event for event in events)
