"""`abcli serve` with several models, in a process of its own: who answers, what is loaded, what is lost (nothing)."""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from tests.serve.process import PATIENCE, Server, answer_of, served
from tests.support.tiny_gguf import write_tiny_bert, write_tiny_model

SMALL = ("-k", "1", "-np", "2", "-c", "512", "--temp", "0", "--engine", "contexts")
# What runs beside an answer does not show in it.
SMALL += ("--flash-attn", "off", "-ctk", "f32", "-ctv", "f32")


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
    # The last who went may have had a model loaded for them, which goes on.
    until = monotonic() + PATIENCE
    while sorted(status(server).values()) != ["loaded", "unloaded", "unloaded"]:
        assert monotonic() < until, status(server)
        sleep(0.05)
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


@pytest.fixture(scope="module")
def on_demand(files: tuple[Path, Path, Path], common_home: Path) -> Iterator[Server]:
    """A server of whatever is in the folder of models, of which nothing is loaded yet."""
    folder = common_home / "models"
    folder.mkdir()
    for path in files:
        (folder / path.name).symlink_to(path)
    whole = files[0].read_bytes()
    (folder / "torn.gguf").write_bytes(whole[: len(whole) // 2])
    (folder / "nothing.gguf").write_bytes(b"no model")
    with served("--models-max", 2, *SMALL) as found:
        yield found


def test_all_models_here_can_be_asked_without_a_name(on_demand: Server) -> None:
    found = status(on_demand)
    # There may be more: the checkout has a folder of models, too.
    assert {"first", "second", "third", "torn"} <= set(found)
    assert "nothing" not in found
    assert set(found.values()) == {"unloaded"}
    assert on_demand.get("/health") == (200, {"status": "ok"})
    told = len(on_demand.lines)
    assert on_demand.post("/v1/completions", asking("first"))[0] == 200
    assert on_demand.post("/v1/embeddings", {"model": "third", "input": "hello"})[0] == 200
    assert sorted(loaded(on_demand)) == ["first", "third"]
    # What they need of the memory is told when they are loaded.
    assert sum("about" in line and "MiB" in line for line in on_demand.lines[told:]) == 2
    with on_demand.send("/v1/completions", asking("first", 400, stream=True)) as stream:
        assert b"200 OK" in stream.recv(4096)
        # The one used least recently would be the first, but it is held.
        assert on_demand.post("/v1/completions", asking("second"))[0] == 200
        assert sorted(loaded(on_demand)) == ["first", "second"]
    assert on_demand.post("/v1/embeddings", {"model": "third", "input": "hello"})[0] == 200
    assert len(loaded(on_demand)) == 2


def test_a_model_that_cannot_be_loaded_takes_nobody_along(on_demand: Server) -> None:
    assert on_demand.post("/v1/completions", asking("second"))[0] == 200
    for path in ("/v1/completions", "/v1/embeddings"):
        code, answer = on_demand.post(path, {**asking("torn"), "input": "hello"})
        assert (code, answer["error"]["code"]) == (500, "model_not_loaded")
        # Where it lies concerns nobody.
        assert answer["error"]["message"] == "torn cannot be loaded; the server's log says why"
        assert any("torn.gguf is truncated" in line for line in on_demand.lines)
    assert status(on_demand)["torn"] == "unloaded"
    assert on_demand.post("/v1/completions", asking("second"))[0] == 200


@pytest.mark.parametrize(
    "name",
    ["first.gguf", "../models/first", "/etc/passwd", "hf:user/repository", "FIRST", "first\0", "\ud800", "x" * 10**5],
)
def test_a_name_is_no_path(on_demand: Server, name: str) -> None:
    code, answer = on_demand.post("/v1/completions", asking(name))
    error = answer["error"]
    assert (code, error["code"], error["type"]) == (404, "model_not_found", "not_found_error")
    assert "first, second" in error["message"]
    assert len(error["message"]) < 1_000


def test_a_broken_template_is_told_at_the_start(on_demand: Server, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for message in messages %}")
    command = [
        sys.executable,
        "-m",
        "abcli",
        "serve",
        "--models-max",
        "2",
        "--port",
        "0",
        "--chat-template",
        str(broken),
    ]
    found = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert found.returncode == 1
    assert found.stderr.startswith("error: the chat template is broken")


def test_a_second_signal_does_not_wait_for_a_model(files: tuple[Path, Path, Path]) -> None:
    with served(*files, "--models-max", 1, *SMALL) as server:
        holding = server.send("/v1/completions", asking("first", -1, stream=True))
        assert b"200 OK" in holding.recv(4096)
        waiting = server.send("/v1/completions", asking("second"))
        until = monotonic() + PATIENCE
        while status(server)["second"] != "loading":
            assert monotonic() < until
        for _ in range(2):
            server.process.send_signal(signal.SIGTERM)
            sleep(0.1)
        code, answer = answer_of(waiting)
        assert (code, answer["error"]["message"]) == (503, "the server is stopping")
        assert server.process.wait(PATIENCE) == 0
        holding.close()
        assert not any("Traceback" in line for line in server.lines)


def loaded(server: Server) -> list[str]:
    return [name for name, value in status(server).items() if value == "loaded"]


def metrics(server: Server) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    try:
        connection.request("GET", "/metrics")
        return connection.getresponse().read().decode()
    finally:
        connection.close()
