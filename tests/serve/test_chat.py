"""POST /v1/chat/completions: what it answers, whole and streamed, and what it refuses."""

from __future__ import annotations

import json
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import abcli
from abcli.chat.answer import Piece
from abcli.chat.calls.events import ArgumentsText, CallBegun, CallDropped, CallFinished
from abcli.chat.messages import ToolCall
from abcli.serve.app import make_app
from abcli.serve.chat_shapes import Chunks
from abcli.serve.service import Service
from tests.serve.conftest import MESSAGES, USUAL

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


def test_the_beginning_of_an_answer_is_continued(client: TestClient) -> None:
    prompt = client.post("/apply-template", json={"messages": MESSAGES}).json()["prompt"]
    raw = client.post("/v1/completions", json={"prompt": prompt + "It is"}).json()["choices"][0]["text"]
    begun = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    for more in ({}, {"continue_final_message": True}):
        answer = client.post(PATH, json={"messages": begun, **more}).json()
        assert answer["choices"][0]["message"]["content"] == raw
    for more in ({"continue_final_message": False}, {"add_generation_prompt": True}):
        other = client.post(PATH, json={"messages": begun, **more}).json()
        assert other["usage"]["prompt_tokens"] > answer["usage"]["prompt_tokens"]


@pytest.mark.parametrize(
    ("answers", "more", "field"),
    [
        ([], {"continue_final_message": True}, "continue_final_message"),
        (["a"], {"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        (["a", "b"], {}, "messages"),
    ],
)
def test_what_cannot_be_continued(client: TestClient, answers: list[str], more: dict[str, Any], field: str) -> None:
    messages = [*MESSAGES, *({"role": "assistant", "content": text} for text in answers)]
    response = client.post(PATH, json={"messages": messages, **more})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


def test_calls_are_told_once_and_counted() -> None:
    wires = Chunks(lambda choices: {"choices": choices}, 0, (), {})
    pieces = [
        Piece("", events=(CallBegun(0, "id-0", "add"), ArgumentsText(0, '{"a"'))),
        Piece("", events=(ArgumentsText(0, ": 1}"), CallFinished(0, ToolCall("add", '{"a": 1}', "id-0")))),
        Piece("", events=(CallBegun(1, "id-1", "sub"), ArgumentsText(1, '{"b"'), CallDropped(1))),
        Piece("", events=(CallBegun(1, "id-2", "mul"), ArgumentsText(1, "{}"))),
    ]
    deltas = [chunk["choices"][0]["delta"] for piece in pieces for chunk in wires.add(piece, ())]
    calls = [call for delta in deltas for call in delta["tool_calls"]]
    # Id, type and name once, in the first delta; one that was none has an index that no other has.
    begun = [call for call in calls if "id" in call]
    assert [(call["index"], call["id"], call["type"], call["function"]["name"]) for call in begun] == [
        (0, "id-0", "function", "add"),
        (1, "id-1", "function", "sub"),
        (2, "id-2", "function", "mul"),
    ]
    texts = ["", "", ""]
    for call in calls:
        texts[call["index"]] += call["function"]["arguments"]
    assert texts == ['{"a": 1}', '{"b"', "{}"]


def test_an_answer_follows_a_schema_or_grammar(client: TestClient) -> None:
    schema = {"type": "object", "properties": {"x": {"const": 5}}, "required": ["x"], "additionalProperties": False}
    wanted = {"messages": MESSAGES, "ignore_eos": False, "max_tokens": 100}
    for form in (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}},
        {"response_format": {"type": "json_object", "schema": schema}},
        {"json_schema": schema},
    ):
        choice = client.post(PATH, json={**wanted, **form}).json()["choices"][0]
        assert json.loads(choice["message"]["content"]) == {"x": 5}
    answer = client.post(PATH, json={**wanted, "grammar": 'root ::= "yes"'}).json()
    assert answer["choices"][0]["message"]["content"] == "yes"


def test_what_constraints_need_is_made_before_a_request_comes(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        abcli.load(tiny_model, buckets=1, ctx_size=512, threads=1) as llm,
        closing(Service(llm, USUAL)) as service,
        TestClient(make_app(service), base_url="http://localhost") as client,
    ):
        monkeypatch.delattr("llguidance.LLTokenizer")
        response = client.post(PATH, json={"messages": MESSAGES, "json_schema": {"type": "boolean"}})
        assert response.status_code == 200


@pytest.mark.parametrize("value", ["true", "1" + "0" * 400, "1e999", "NaN", '"1"', "[]"])
@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "seed", "max_tokens", "n", "logit_bias", "min_p"])
def test_a_number_that_is_none_is_refused(client: TestClient, name: str, value: str) -> None:
    field = f'{{"5": {value}}}' if name == "logit_bias" else value
    response = client.post(PATH, content=f'{{"messages": {json.dumps(MESSAGES)}, "{name}": {field}}}')
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)


def test_tools_beside_a_grammar_are_blamed(client: TestClient) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    response = client.post(PATH, json={"messages": MESSAGES, "tools": [tool], "grammar": 'root ::= "a"'})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")


def test_a_bias_forbids_or_forces(client: TestClient, served_llm: Any) -> None:
    (token,) = served_llm.tokenize("q", add_special=False)
    for bias in ({str(token): 1000}, [[token, 1000]], [["q", 1000]]):
        answer = client.post(PATH, json={"messages": MESSAGES, "logit_bias": bias}).json()
        assert answer["choices"][0]["message"]["content"] == "q" * 8
    request = {"messages": MESSAGES, "logprobs": True}
    chosen = client.post(PATH, json=request).json()["choices"][0]["logprobs"]["content"][0]["id"]
    other = client.post(PATH, json={**request, "logit_bias": [[chosen, False]]}).json()["choices"][0]["logprobs"]
    assert all(token["id"] != chosen for token in other["content"])


def test_another_merge_rule_for_one_answer(client: TestClient) -> None:
    for rule, wanted in (("mean", {0.5}), ("max", {0.0, 1.0})):
        own = {"show_buckets": True, "merge": rule}
        request = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 1, "abcli": own}
        answer = client.post(PATH, json=request).json()
        tokens = answer["choices"][0]["logprobs"]["content"]
        assert {view["weight"] for token in tokens for view in token["buckets"]} == wanted
        assert answer["abcli"]["merge"] == rule


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"])
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_tells_the_bases_it_was_made_with(
    client: TestClient, served_llm: Any, path: str, stream: bool
) -> None:
    prompt = {"/v1/completions": {"prompt": "Hello"}, "/v1/responses": {"input": "Hello"}}
    request = {**prompt.get(path, {"messages": MESSAGES}), "stream": stream}
    for own, bases in (({}, list(served_llm.bases)), ({"buckets": 1}, [10_000.0])):
        response = client.post(path, json={**request, "abcli": {**own, "merge": "mean"}})
        # What a stream ends with tells it, too.
        text = response.text.rpartition('"abcli":')[2]
        found = json.JSONDecoder().raw_decode(text)[0] if stream else response.json()["abcli"]
        assert (found["bases"], found["merge"]) == (bases, "mean")
        assert found["asked"] == (0 if own else 1)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_a_stream_tells_its_progress_and_timings_where_that_is_wanted(client: TestClient, path: str) -> None:
    text = "a prompt of this test alone " * 8
    request = {"messages": [{"role": "user", "content": text}], "prompt": text, "stream": True, "n": 2}
    wanted = {"return_progress": True, "timings_per_token": True}
    chunks = chunks_of(client.post(path, json={**request, **wanted}).text)
    for number in range(2):
        mine = [chunk for chunk in chunks if chunk["choices"][0]["index"] == number]
        told = [chunk["prompt_progress"] for chunk in mine if "prompt_progress" in chunk]
        assert told[0]["processed"] == told[0]["cache"] < told[-1]["processed"] == told[-1]["total"]
        assert all(before["processed"] < after["processed"] for before, after in pairwise(told))
        assert all(progress["time_ms"] >= 0 for progress in told)
        timings = [chunk["timings"] for chunk in mine if "timings" in chunk]
        assert timings[-1]["predicted_n"] == 8
        counts = [item["predicted_n"] for item in timings]
        assert len(counts) > 2
        assert counts == sorted(counts)
        assert timings[-1]["prompt_n"] + timings[-1]["cache_n"] == told[-1]["total"]
    # Nobody else gets them, nor what is no stream.
    chunks = chunks_of(client.post(path, json=request).text)
    assert not any("prompt_progress" in chunk for chunk in chunks)
    assert sum("timings" in chunk for chunk in chunks) == 2
    answer = client.post(path, json={**request, **wanted, "stream": False})
    assert answer.status_code == 200
    assert client.post(path, json={**request, "return_progress": 1}).json()["error"]["param"] == "return_progress"
