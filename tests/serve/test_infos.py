"""What a server tells about itself, its model and its tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from starlette.testclient import TestClient

import abcli
from tests.serve.conftest import MESSAGES

CHAT = "/v1/chat/completions"


def test_a_model_says_how_long_its_context_is(client: TestClient, served_llm: abcli.LLM) -> None:
    for path in ("/v1/models", "/models"):
        (model,) = client.get(path).json()["data"]
        assert (model["id"], model["context_length"], model["max_model_len"], model["meta"]["n_ctx"]) == (
            *("tiny", 512),
            *(512, 512),
        )
        assert model["abcli"]["bases"] == list(served_llm.bases)
    assert client.get("/v1/models/tiny").json() == model
    response = client.get("/v1/models/other")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_properties_and_slots(client: TestClient) -> None:
    properties = client.get("/props").json()
    assert properties["default_generation_settings"]["n_ctx"] == 512
    assert (properties["total_slots"], properties["model_alias"]) == (3, "tiny")
    assert "im_start" in properties["chat_template"]
    slots = client.get("/slots").json()
    assert [(slot["id"], slot["is_processing"]) for slot in slots] == [(0, False), (1, False), (2, False)]


def test_counters_count(client: TestClient) -> None:
    answer = client.post(CHAT, json={"messages": MESSAGES, "cache_prompt": False}).json()
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = dict(re.findall(r"^(abcli:\w+) (\S+)$", response.text, re.MULTILINE))
    assert float(found["abcli:prompt_tokens_total"]) == answer["usage"]["prompt_tokens"]
    assert float(found["abcli:tokens_predicted_total"]) == answer["usage"]["completion_tokens"]
    assert float(found["abcli:answers_total"]) == 1


def test_what_is_not_told(serving: Callable[..., TestClient]) -> None:
    client = serving(show_slots=False, show_metrics=False)
    assert [client.get(path).status_code for path in ("/slots", "/metrics")] == [501, 501]


def test_texts_and_tokens(client: TestClient, served_llm: abcli.LLM) -> None:
    text = "Hello, <|im_start|>wörld"
    for request in ({"content": text}, {"prompt": text, "add_special_tokens": False}):
        tokens = client.post("/tokenize", json=request).json()["tokens"]
        assert tokens == served_llm.tokenize(text, add_special=False, parse_special=True)
    plain = client.post("/tokenize", json={"content": text, "parse_special": False}).json()["tokens"]
    assert plain == served_llm.tokenize(text, add_special=False)
    assert client.post("/detokenize", json={"tokens": plain}).json()["content"] == text
    with_pieces = client.post("/tokenize", json={"content": "ö", "with_pieces": True}).json()["tokens"]
    assert [item["piece"] for item in with_pieces] in (["ö"], [[0xC3], [0xB6]])
    for tokens in ("x", [10**9], [True], [-1]):
        assert client.post("/detokenize", json={"tokens": tokens}).json()["error"]["param"] == "tokens"
    assert client.post("/tokenize", json={"content": 1}).json()["error"]["param"] == "content"


def test_a_template_applied(client: TestClient, served_llm: abcli.LLM) -> None:
    prompt = client.post("/apply-template", json={"messages": MESSAGES}).json()["prompt"]
    assert prompt == served_llm.render(MESSAGES)
    # A prompt that was made so is the same as the messages.
    answer = client.post(CHAT, json={"messages": MESSAGES}).json()
    raw = client.post("/v1/completions", json={"prompt": prompt}).json()
    assert raw["choices"][0]["text"] == answer["choices"][0]["message"]["content"]
    unopened = {"messages": MESSAGES, "add_generation_prompt": False}
    closed = client.post("/apply-template", json=unopened).json()["prompt"]
    assert prompt.startswith(closed)
    assert prompt.removeprefix(closed).startswith("<|im_start|>assistant")
    assert client.post("/apply-template", json={}).json()["error"]["param"] == "messages"


def test_what_lm_eval_asks_of_a_tokenizer(client: TestClient) -> None:
    found = client.get("/tokenizer_info").json()
    assert found["eos_token"] == "<|im_end|>"
    assert "im_start" in found["chat_template"]


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("GET", CHAT, 405), ("PUT", "/props", 405)]
)
def test_errors_of_the_router_have_the_usual_shape(client: TestClient, method: str, path: str, status: int) -> None:
    response = client.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
