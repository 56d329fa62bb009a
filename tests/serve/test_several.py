"""`abcli serve` with several models, in a process of its own: who answers, what is loaded, what is lost (nothing)."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.serve.process import PATIENCE, Server, answer_of, served
from tests.support.tiny_gguf import write_tiny_bert, write_tiny_model

SMALL = ("-k", "1", "-np", "2", "-c", "512", "--temp", "0", "--engine", "contexts")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("several")
    return (
        write_tiny_model(folder / "first.gguf"),
        write_tiny_model(folder / "second.gguf", seed=1),
        write_tiny_bert(folder / "third.gguf"),
    )


@pytest.fixture(scope="module")
def server(files: tuple[Path, Path, Path]) -> Iterator[Server]:
    first, second, third = files
    with served(first, "--model", second, "--model", third, "--alias", "one", "--models-max", 1, *SMALL) as found:
        yield found


def status(server: Server) -> dict[str, str]:
    return {model["id"]: model["status"]["value"] for model in server.get("/v1/models")[1]["data"]}


def asking(model: str | None, tokens: int = 8, **more: Any) -> dict[str, Any]:
    body = {"prompt": "Hello", "max_tokens": tokens, "ignore_eos": True, **more}
    return body if model is None else {"model": model, **body}


def test_each_is_loaded_when_it_is_asked_for(server: Server) -> None:
    assert set(status(server)) == {"one", "second", "third"}
    texts = {}
    for name in ("one", "second", "one"):
        code, answer = server.post("/v1/completions", asking(name))
        assert code == 200
        assert answer["model"] == name
        assert [model for model, value in status(server).items() if value == "loaded"] == [name]
        assert texts.setdefault(name, answer["choices"][0]["text"]) == answer["choices"][0]["text"]
    assert texts["one"] != texts["second"]
    code, answer = server.post("/v1/embeddings", {"model": "third", "input": "hello"})
    assert code == 200
    assert len(answer["data"][0]["embedding"]) == 32
    assert server.get("/props?model=second")[1]["model_alias"] == "second"


@pytest.mark.peers
def test_openais_client_gets_embeddings(server: Server) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
        # It asks for base64, and decodes that.
        found = client.embeddings.create(model="third", input=["hello", "world"])
        numbers = client.embeddings.create(model="third", input="hello", encoding_format="float")
        with pytest.raises(openai.NotFoundError, match="one, second, third"):
            client.embeddings.create(model="fourth", input="hello")
    assert [len(item.embedding) for item in found.data] == [32, 32]
    assert found.data[0].embedding == pytest.approx(numbers.data[0].embedding, abs=1e-5)
    assert found.usage.total_tokens == found.usage.prompt_tokens == 14


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/v1/messages", "/v1/responses", "/tokenize"]
)
def test_a_name_that_nobody_has(server: Server, path: str) -> None:
    code, answer = server.post(path, asking("fourth"))
    assert code == 404
    assert "one, second, third" in answer["error"]["message"]
    assert server.post(path, asking(None))[0] == 400
    assert server.get("/props?model=fourth")[0] == 404


def test_a_model_of_the_wrong_kind(server: Server) -> None:
    assert server.post("/v1/completions", asking("third"))[0] == 501
    assert server.post("/v1/embeddings", {"model": "one", "input": "hello"})[0] == 501


def test_an_answer_that_streams_keeps_its_model_and_others_wait(server: Server) -> None:
    stream = server.send("/v1/completions", asking("one", 300, stream=True))
    first = stream.recv(4096)
    assert b"200 OK" in first
    waiting = server.send("/v1/completions", asking("second"))
    text = first
    while part := stream.recv(65536):
        text += part
        if b"[DONE]" in text:
            break
    stream.close()
    # Bytes that are no letters yet come with those that make them some.
    assert text.count(b"data: ") > 100
    code, answer = answer_of(waiting)
    assert (code, answer["model"]) == (200, "second")


def test_nothing_is_lost_while_models_come_and_go(server: Server) -> None:
    """Clients ask two models and an embedding model in turns, with room for one of them; some go at once."""
    alone = {name: server.post("/v1/completions", asking(name))[1]["choices"][0]["text"] for name in ("one", "second")}
    wrong: list[Any] = []

    def ask(number: int) -> None:
        for turn in range(3):
            name = ("one", "second", "third")[(number + turn) % 3]
            if (number + turn) % 5 == 0:
                server.send("/v1/completions", asking(name, 100, stream=True)).close()
            elif name == "third":
                code, answer = server.post("/v1/embeddings", {"model": name, "input": "hello"})
                if code != 200:
                    wrong.append(answer)
            else:
                code, answer = server.post("/v1/completions", asking(name))
                if code != 200 or answer["choices"][0]["text"] != alone[name]:
                    wrong.append(answer)

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for client in clients:
        client.start()
    for client in clients:
        client.join(PATIENCE)
    assert wrong == []
    assert sum(value == "loaded" for value in status(server).values()) == 1
    assert server.get("/health") == (200, {"status": "ok"})


def test_both_are_loaded_at_once_and_counted_apart(files: tuple[Path, Path, Path]) -> None:
    first, second, _third = files
    with served(first, second, *SMALL) as server:
        assert status(server) == {"first": "loaded", "second": "loaded"}
        for name in ("first", "second", "second"):
            assert server.post("/v1/completions", asking(name))[0] == 200
        text = metrics(server)
        assert 'abcli:answers_total{model="first"} 1\n' in text
        assert 'abcli:answers_total{model="second"} 2\n' in text
        assert text.count("# TYPE abcli:answers_total counter\n") == 1
        assert server.end() == 0


def metrics(server: Server) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()
