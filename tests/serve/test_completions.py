"""POST /v1/completions: texts and tokens, batches, echoes, log-probabilities in the older shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

import abcli

PATH = "/v1/completions"


def test_prompts_as_texts_tokens_and_batches(client: TestClient, served_llm: abcli.LLM) -> None:
    texts = ["Hello there", "Good day to you"]
    tokens = [served_llm.tokenize(text, parse_special=True) for text in texts]
    found = [client.post(PATH, json={"prompt": prompt}).json()["choices"][0]["text"] for prompt in texts]
    for prompt in (texts, tokens, [[text] for text in texts]):
        answer = client.post(PATH, json={"prompt": prompt}).json()
        assert [choice["text"] for choice in answer["choices"]] == found
        assert answer["usage"]["prompt_tokens"] == sum(map(len, tokens))
    for prompt, text in zip(tokens, found, strict=True):
        assert client.post(PATH, json={"prompt": prompt}).json()["choices"][0]["text"] == text


def test_an_echo_tells_how_likely_the_prompt_is(client: TestClient, served_llm: abcli.LLM) -> None:
    tokens = served_llm.tokenize("How likely is a text, and why?", parse_special=True)
    request = {"prompt": [tokens], "echo": True, "logprobs": 2, "max_tokens": 1}
    choice = client.post(PATH, json=request).json()["choices"][0]
    logprobs = choice["logprobs"]
    assert len(logprobs["tokens"]) == len(tokens) + 1
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    ((*scores,),) = served_llm.score([(tokens[:1], tokens[1:])])
    assert logprobs["token_logprobs"][1:-1] == pytest.approx([score.log_probability for score in scores], abs=1e-4)
    assert choice["text"].startswith("How likely is a text, and why?")
    for token, offset in zip(logprobs["tokens"][:-1], logprobs["text_offset"], strict=False):
        assert choice["text"][offset : offset + len(token)] == token
    for token, logprob, top in list(
        zip(*(logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs")), strict=True)
    )[1:]:
        assert top[token] == logprob


def test_an_echo_of_nothing_but_the_prompt(client: TestClient) -> None:
    request = {"prompt": "Hello there", "echo": True, "max_tokens": 0, "logprobs": 0}
    answer = client.post(PATH, json=request).json()
    choice = answer["choices"][0]
    assert choice["text"] == "Hello there"
    assert answer["usage"]["completion_tokens"] == 0
    assert len(choice["logprobs"]["tokens"]) == answer["usage"]["prompt_tokens"]


def test_scoring_goes_on_beside_answers(client: TestClient) -> None:
    prompts = ["one", "another, longer one that needs more steps", "three"]
    request = {"prompt": prompts, "echo": True, "logprobs": 1, "n": 2, "max_tokens": 3}
    together = client.post(PATH, json=request).json()["choices"]
    for number, prompt in enumerate(prompts):
        alone = client.post(PATH, json={**request, "prompt": prompt, "n": 1}).json()["choices"][0]
        for choice in together[2 * number : 2 * number + 2]:
            assert choice["text"] == alone["text"]
            found, wanted = choice["logprobs"]["token_logprobs"], alone["logprobs"]["token_logprobs"]
            assert found[1:] == pytest.approx(wanted[1:], abs=1e-4)


@pytest.mark.parametrize("prompt", ["Hello there", "Höher als 6 Türme 🙂 " * 12], ids=["short", "long"])
def test_a_stream_says_the_same_in_pieces(client: TestClient, prompt: str) -> None:
    request = {"prompt": prompt, "echo": True, "logprobs": 1}
    whole = client.post(PATH, json=request).json()["choices"][0]
    request.update(stream=True, stream_options={"include_usage": True})
    lines = [line.removeprefix("data: ") for line in client.post(PATH, json=request).text.split("\n\n") if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    assert chunks.pop()["usage"]["completion_tokens"] == 8
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    told = {name: [item for choice in choices for item in choice["logprobs"][name]] for name in whole["logprobs"]}
    for name in ("tokens", "text_offset"):
        assert told[name] == whole["logprobs"][name]
    assert max(len(choice["logprobs"]["tokens"]) for choice in choices) <= 128
    assert told["token_logprobs"][1:] == pytest.approx(whole["logprobs"]["token_logprobs"][1:], abs=1e-4)
    assert [choice["finish_reason"] for choice in choices][-2:] == [None, "length"]


@pytest.mark.parametrize(
    ("field", "request_fields"),
    [
        ("prompt", {}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": [1, -1]}),
        ("prompt", {"prompt": [1, True]}),
        ("prompt", {"prompt": {"a": 1}}),
        ("prompt", {"prompt": ["x"] * 1000}),
        ("prompt", {"prompt": "word " * 600}),
        ("prompt", {"prompt": "\ud800"}),
        ("best_of", {"prompt": "x", "best_of": 2}),
        ("suffix", {"prompt": "x", "suffix": "y"}),
        ("logprobs", {"prompt": "x", "logprobs": True}),
        ("echo", {"prompt": "x", "echo": 1}),
    ],
)
def test_a_wrong_field_is_named(client: TestClient, field: str, request_fields: dict[str, Any]) -> None:
    response = client.post(PATH, content=json.dumps(request_fields))
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)
