"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

from abcli.config import ContextConfig, ModelConfig
from abcli.embedder import Embedder
from abcli.serve.app import make_app
from abcli.serve.embeddings import MAX_TEXTS, EmbeddingService
from abcli.serve.service import Settings
from tests.support.bert import bert_states
from tests.support.tiny_gguf import write_tiny_bert

PATH = "/v1/embeddings"


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Embedder]:
    path = write_tiny_bert(tmp_path_factory.mktemp("bert") / "bert.gguf")
    with Embedder(ModelConfig(path), ContextConfig(threads=1, flash_attention="off")) as found:
        yield found


@pytest.fixture
def make(embedder: Embedder) -> Iterator[Callable[..., TestClient]]:
    services: list[EmbeddingService] = []

    def client(**settings: Any) -> TestClient:
        service = EmbeddingService(embedder, Settings("bert", **settings))
        services.append(service)
        client = TestClient(make_app(service), base_url="http://localhost", raise_server_exceptions=False)
        client.app_state = {"service": service}
        return client

    yield client
    for service in services:
        service.close()


@pytest.fixture
def embedding(make: Callable[..., TestClient]) -> TestClient:
    return make()


def vectors(client: TestClient, **body: Any) -> list[Any]:
    response = client.post(PATH, json={"model": "bert", **body})
    assert response.status_code == 200, response.text
    found = response.json()
    assert found["object"] == "list"
    assert [item["index"] for item in found["data"]] == list(range(len(found["data"])))
    assert {item["object"] for item in found["data"]} == {"embedding"}
    return [item["embedding"] for item in found["data"]]


def test_texts_and_tokens_in_every_form(embedding: TestClient, embedder: Embedder) -> None:
    texts = ["hello world", "abc"]
    tokens = [embedder.tokenize(text) for text in texts]
    expected = embedder.embed(tokens)
    for given in (texts, tokens, [texts[0], tokens[1]]):
        np.testing.assert_allclose(vectors(embedding, input=given), expected, atol=1e-5)
    for given in (texts[0], tokens[0], [texts[0]], [tokens[0]]):
        np.testing.assert_allclose(vectors(embedding, input=given), expected[:1], atol=1e-5)


@pytest.mark.parametrize(("kind", "pooling"), [(1, None), (2, None), (3, None), (1, "cls"), (2, "last"), (3, "mean")])
def test_the_numbers_are_berts(tmp_path: Path, kind: int, pooling: Any) -> None:
    """Against an implementation in float64: pooled as the file says (mean, first, last token), or as a flag does."""
    path = write_tiny_bert(tmp_path / "bert.gguf", pooling_type=kind)
    texts = ["hello world", "a", "Zebras, and 3 more!"]
    expected = []
    for text in texts:
        # [CLS], the letters of words as the model knows them, [SEP]; signs are words of their own.
        words = "".join(f" {sign} " if sign in ",!" else sign for sign in text.lower()).split()
        letters = [ord(letter) - 33 + (99 if number else 5) for word in words for number, letter in enumerate(word)]
        states = bert_states(path, [2, *letters, 3])
        way = pooling or {1: "mean", 2: "cls", 3: "last"}[kind]
        pooled = {"mean": states.mean(axis=0), "cls": states[0], "last": states[-1]}[way]
        expected.append(pooled / np.linalg.norm(pooled))
    context = ContextConfig(threads=1, flash_attention="off")
    with (
        Embedder(ModelConfig(path), context, pooling=pooling) as embedder,
        closing(EmbeddingService(embedder, Settings("bert"))) as service,
    ):
        client = TestClient(make_app(service), base_url="http://localhost")
        np.testing.assert_allclose(vectors(client, input=texts), expected, atol=2e-3)


def test_an_answer_tells_model_and_usage(embedding: TestClient, embedder: Embedder) -> None:
    found = embedding.post(PATH, json={"input": ["hello", "a"]}).json()
    count = len(embedder.tokenize("hello")) + len(embedder.tokenize("a"))
    assert found["model"] == "bert"
    assert found["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert len(found["data"][0]["embedding"]) == embedder.width


def test_base64_holds_the_same_numbers(embedding: TestClient) -> None:
    (text,) = vectors(embedding, input="hello", encoding_format="base64")
    data = base64.b64decode(text)
    numbers = struct.unpack(f"<{len(data) // 4}f", data)
    assert list(numbers) == vectors(embedding, input="hello", encoding_format="float")[0]


def test_fewer_dimensions_are_the_first_ones_at_the_length_1(embedding: TestClient) -> None:
    (whole,) = vectors(embedding, input="hello")
    (short,) = vectors(embedding, input="hello", dimensions=8)
    first = np.array(whole[:8])
    np.testing.assert_allclose(short, first / np.linalg.norm(first), atol=1e-6)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": [1, "a"]}, "input"),
        ({"input": [True]}, "input"),
        ({"input": [["a"]]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": [10**9]}, "input"),
        ({"input": ["a"] * (MAX_TEXTS + 1)}, "input"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 33}, "dimensions"),
        ({"input": "a", "model": 1}, "model"),
    ],
)
def test_what_is_wrong_is_named(embedding: TestClient, body: dict[str, Any], field: str) -> None:
    response = embedding.post(PATH, json=body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == field


def test_a_text_that_is_too_long_is_refused(embedding: TestClient, embedder: Embedder) -> None:
    response = embedding.post(PATH, json={"input": ["a", "a " * 100]})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "input")
    assert error["n_ctx"] == embedder.context_size
    assert error["n_prompt_tokens"] == 102


def test_a_model_that_writes_makes_none_and_the_other_way_round(client: TestClient, embedding: TestClient) -> None:
    for asked, path, body in (
        (client, PATH, {"input": "a"}),
        (embedding, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
        (embedding, "/v1/messages", {"messages": [{"role": "user", "content": "Hello"}]}),
    ):
        response = asked.post(path, json=body)
        assert response.status_code == 501
        assert "embedding model" in response.json()["error"]["message"]


def test_too_many_at_once_and_too_late(make: Callable[..., TestClient]) -> None:
    assert make(seconds=-1.0).post(PATH, json={"input": "a"}).status_code == 503
    full = make(queue=0)
    full.app_state["service"].opened(1)
    assert full.post(PATH, json={"input": "a"}).status_code == 429


def test_a_server_that_ends_says_so(embedder: Embedder) -> None:
    with closing(EmbeddingService(embedder, Settings("bert"))) as service:
        client = TestClient(make_app(service), base_url="http://localhost")
        assert client.get("/health").status_code == 200
        service.stop_soon()
        assert client.get("/health").status_code == 503
        assert client.post(PATH, json={"input": "a"}).status_code == 503


def test_the_model_is_listed(embedding: TestClient, embedder: Embedder) -> None:
    (model,) = embedding.get("/v1/models").json()["data"]
    assert model["id"] == "bert"
    assert model["meta"]["n_embd"] == embedder.width
    assert model["context_length"] == embedder.context_size
    assert embedding.get("/metrics").status_code == 200
