"""POST /v1/chat/completions: what it answers, whole and streamed, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.serve.conftest import MESSAGES

PATH = "/v1/chat/completions"


def chunks_of(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream, after a check that it ends as it should."""
    events = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def test_an_answer_is_openais_object(client: TestClient) -> None:
    answer = client.post(PATH, json={"messages": MESSAGES}).json()
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    (choice,) = answer["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert len(answer["abcli"]["bases"]) == 2
    assert 0 <= answer["abcli"]["agreement"] <= 1


@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_says_the_same_in_pieces(client: TestClient, usage: bool) -> None:
    whole = client.post(PATH, json={"messages": MESSAGES}).json()
    request = {"messages": MESSAGES, "stream": True, "stream_options": {"include_usage": usage}}
    response = client.post(PATH, json=request)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = chunks_of(response.text)
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}
    assert ("usage" in chunks[-1]) == usage
    if usage:
        last = chunks.pop()
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 8)
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][-2:] == [None, "length"]


def test_several_choices_of_one_request(client: TestClient) -> None:
    request = {"messages": MESSAGES, "n": 4, "temperature": 1.5, "top_k": 0, "top_p": 1, "min_p": 0, "seed": 7}
    answer = client.post(PATH, json=request).json()
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert len(set(texts)) == 4
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 32
    again = client.post(PATH, json=request).json()
    assert [choice["message"]["content"] for choice in again["choices"]] == texts
    chunks = chunks_of(client.post(PATH, json={**request, "stream": True}).text)
    streamed = [""] * 4
    for chunk in chunks:
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["delta"].get("content") or ""
    assert streamed == texts


def test_log_probabilities_of_every_token(client: TestClient) -> None:
    request = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 3, "abcli": {"show_buckets": True}}
    choice = client.post(PATH, json=request).json()["choices"][0]
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == 8
    for token in tokens:
        # Greedy: what is chosen is the likeliest.
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] <= 0
        assert [likely["logprob"] for likely in token["top_logprobs"]] == sorted(
            (likely["logprob"] for likely in token["top_logprobs"]), reverse=True
        )
        assert sum(view["weight"] for view in token["buckets"]) == pytest.approx(1, abs=1e-5)
        assert 0 <= token["agreement"] <= 1
    streamed = chunks_of(client.post(PATH, json={**request, "stream": True}).text)
    told = [
        token
        for chunk in streamed
        if (found := chunk["choices"][0]["logprobs"]) is not None
        for token in found["content"]
    ]
    assert told == tokens


@pytest.mark.parametrize(
    ("field", "request_fields"),
    [
        ("temperature", {"temperature": "hot"}),
        ("top_p", {"top_p": 2}),
        ("n", {"n": 0}),
        ("stop", {"stop": [""]}),
        ("messages", {"messages": []}),
        ("messages", {"messages": [{"role": "king", "content": "x"}]}),
        ("messages", {"messages": "Hello"}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("logit_bias", {"logit_bias": {"x": 1, "5": "2"}}),
        ("response_format.type", {"response_format": {"type": "xml"}}),
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 7}}}}),
        ("grammar", {"grammar": "root = "}),
        ("tools", {"tools": [{"type": "function", "function": {"name": ""}}]}),
        ("tool_choice", {"tool_choice": "required"}),
        ("stream", {"stream": "yes"}),
        ("max_tokens", {"max_tokens": 1.5}),
        ("abcli.buckets", {"abcli": {"buckets": 3}}),
        ("abcli.merge", {"abcli": {"merge": "vote"}}),
        ("abcli.profile", {"abcli": {"profile": "mine"}}),
    ],
)
def test_a_wrong_field_is_named(client: TestClient, field: str, request_fields: dict[str, Any]) -> None:
    for stream in (False, True):
        response = client.post(PATH, json={"messages": MESSAGES, "stream": stream, **request_fields})
        error = response.json()["error"]
        assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", field)


def test_unknown_fields_are_passed_over(client: TestClient) -> None:
    message = {"role": "assistant", "content": "x", "annotations": [], "audio": None, "function_call": None}
    response = client.post(PATH, json={"messages": [*MESSAGES, message, *MESSAGES], "store": True, "user": "me"})
    assert response.status_code == 200


def test_one_bucket_decides_alone_where_that_is_wanted(client: TestClient) -> None:
    answer = client.post(PATH, json={"messages": MESSAGES, "abcli": {"buckets": 1}}).json()
    assert answer["abcli"]["asked"] == 0


def test_a_prompt_that_does_not_fit_is_refused_before_a_stream_begins(client: TestClient) -> None:
    for stream in (False, True):
        messages = [{"role": "user", "content": "word " * 600}]
        response = client.post(PATH, json={"messages": messages, "stream": stream})
        error = response.json()["error"]
        assert response.status_code == 400
        assert (error["code"], error["type"]) == ("context_length_exceeded", "exceed_context_size_error")
        assert error["n_ctx"] == 512 < error["n_prompt_tokens"]
        assert "maximum context length is 512 tokens" in error["message"]
