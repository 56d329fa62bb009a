"""A server as a process: clients that go, hostile ones, signals, what survives a restart."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from time import monotonic, sleep

import pytest

from tests.serve.process import PATIENCE, Server, answer_of, served
from tests.support.tiny_gguf import write_tiny_model

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 5}
# Goes on until the context is full, which takes seconds.
ENDLESS = {**HELLO, "max_tokens": -1, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny_model: Path, common_home: Path) -> Iterator[Server]:
    with served(tiny_model, "-k", 1, "-c", 16384, "-np", 2, "--queue", 4) as running:
        yield running


def health_seconds(server: Server) -> float:
    """The time that an answer to /health takes."""
    begin = monotonic()
    assert server.get("/health")[0] == 200
    return monotonic() - begin


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_slot(server: Server, stream: bool) -> None:
    connections = [server.send(CHAT, {**ENDLESS, "stream": stream}) for _ in range(4)]
    server.wait_until_busy(2)
    # Those that wait for a slot go first.
    for connection in reversed(connections):
        connection.close()
    assert server.wait_until_busy(0) < 1
    assert server.post(CHAT, HELLO)[0] == 200


def test_a_connection_that_is_reset_frees_its_slot(server: Server) -> None:
    connection = server.send(CHAT, {**ENDLESS, "stream": True})
    assert connection.recv(10)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    assert server.wait_until_busy(0) < 1


def test_more_requests_than_may_wait_are_refused(server: Server) -> None:
    connections = [server.send(CHAT, ENDLESS) for _ in range(6)]
    server.wait_until_busy(2)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    while True:
        # The others may not all have been read.
        connection.request("POST", CHAT, json.dumps(HELLO))
        response = connection.getresponse()
        error = json.loads(response.read())
        if response.status == 429:
            break
        sleep(0.01)
    assert int(response.headers["Retry-After"]) > 0
    assert error["error"]["code"] == "rate_limit_exceeded"
    connection.close()
    for waiting in connections:
        waiting.close()
    server.wait_until_busy(0)


def test_short_answers_and_health_do_not_wait_for_long_ones(server: Server) -> None:
    with server.send(CHAT, {**ENDLESS, "stream": True}):
        server.wait_until_busy(1)
        seconds = [health_seconds(server) for _ in range(21)]
        assert server.post(CHAT, HELLO)[0] == 200
        assert server.busy() == 1
        # A single one may be slow on a busy machine.
        assert median(seconds) < 0.1
    server.wait_until_busy(0)


def test_health_does_not_wait_for_schemas(server: Server) -> None:
    """However slow the machine is, many are answered in the time that a large schema takes."""
    properties = {f"property_{number}": {"type": ("string", "integer")[number % 2]} for number in range(2000)}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": properties}}}
    begin = monotonic()
    seconds: list[float] = []
    with server.send(CHAT, {**HELLO, "response_format": form}) as asking:
        asking.settimeout(0)
        while True:
            seconds.append(health_seconds(server))
            try:
                assert asking.recv(12) == b"HTTP/1.1 200"
                break
            except BlockingIOError:
                continue
    whole = monotonic() - begin
    assert len(seconds) > 10
    assert max(seconds) < whole / 2


def test_bodies_that_are_too_large_are_refused_early(server: Server) -> None:
    with server.connect() as connection:
        connection.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000000\r\n\r\n" % CHAT.encode())
        status, body = answer_of(connection)
    assert (status, body["error"]["code"]) == (413, "body_too_large")
    # Without a length, it is noticed as it comes.
    with server.connect() as connection:
        connection.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n" % CHAT.encode())
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        with pytest.raises(OSError):  # noqa: PT012 - it may be noticed at any of them
            for _ in range(2000):
                connection.sendall(chunk)
    assert server.get("/health")[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[1]",
        b'{"messages": ',
        b"\xff\xfe{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" + b"[]," * 1_000_000 + b"1]",
        json.dumps({"messages": [{"role": "user", "content": "x"}] * 100_000}).encode(),
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"max_tokens": ' + b"9" * 5000 + b', "messages": [{"role": "user", "content": "x"}]}',
        b'{"temperature": NaN, "messages": [{"role": "user", "content": "x"}]}',
    ],
)
def test_nonsense_is_refused_and_holds_nobody_up(server: Server, body: bytes) -> None:
    done = threading.Event()
    seconds: list[float] = []

    def watch() -> None:
        while not done.is_set():
            seconds.append(health_seconds(server))

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        status, answer = server.post(CHAT, body)
    finally:
        done.set()
        watching.join()
    assert status in (400, 413)
    # What is said is what is wrong.
    assert (" bytes" in answer["error"]["message"]) == (len(body) > 4 * 1024 * 1024)
    assert answer["error"]["message"]
    assert median(seconds) < 0.1
    assert max(seconds) < 2


def test_connections_that_say_nothing_hurt_nobody(server: Server) -> None:
    silent = [server.connect() for _ in range(200)]
    for number, connection in enumerate(silent):
        connection.sendall(b"POST /v1/chat" if number % 2 else b"GET / HTTP/1.1\r\nX: ")
    assert server.post(CHAT, HELLO)[0] == 200
    # A client that has said all it will say still hears the answer, or is taken for gone; it holds nothing.
    half = server.send(CHAT, ENDLESS)
    half.shutdown(socket.SHUT_WR)
    half.close()
    server.wait_until_busy(0)
    for connection in silent:
        connection.close()
    assert server.get("/health")[0] == 200


def test_what_is_no_http_is_refused(server: Server) -> None:
    for data in (b"\x16\x03\x01\x02\x00\x01", b"GET\r\n\r\n", b"GET /" + b"x" * 100_000 + b" HTTP/1.1\r\n"):
        with server.connect() as connection:
            connection.sendall(data)
            assert b"400" in connection.recv(100)
    assert server.get("/health")[0] == 200


def test_nothing_private_is_logged(server: Server) -> None:
    server.post(CHAT, {**HELLO, "messages": [{"role": "user", "content": "my secret"}], "user": "secretive"})
    assert any(f"POST {CHAT} 200" in line for line in server.lines)
    assert not any("secret" in line for line in server.lines)


def test_a_signal_lets_what_runs_end_and_a_second_one_stops_it(tiny_model: Path) -> None:
    with served(tiny_model, "-k", 1, "-c", 4096, "-np", 1) as server:
        running = server.send(CHAT, {**ENDLESS, "max_tokens": 1500})
        server.wait_until_busy(1)
        server.process.send_signal(signal.SIGTERM)
        status, answer = answer_of(running)
        assert (status, answer["usage"]["completion_tokens"]) == (200, 1500)
        assert server.process.wait(PATIENCE) == 0
        with pytest.raises(OSError):
            server.connect()

    with served(tiny_model, "-k", 1, "-c", 16384, "-np", 1) as server:
        running = server.send(CHAT, {**ENDLESS, "stream": True})
        waiting = server.send(CHAT, ENDLESS)
        # One that never says what it wants is cut off.
        silent = server.connect()
        silent.sendall(b"POST %s HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{" % CHAT.encode())
        server.wait_until_busy(1)
        server.process.send_signal(signal.SIGTERM)
        sleep(0.3)
        assert server.process.poll() is None
        begin = monotonic()
        assert server.end(signal.SIGTERM) == 0
        assert monotonic() - begin < 10
        with running:
            assert b'"error"' in running.makefile("rb").read()
        assert answer_of(waiting)[0] == 503
        silent.close()
        assert not any("Traceback" in line for line in server.lines)


def test_the_prompt_cache_survives_a_kill(tiny_model: Path, tmp_path: Path) -> None:
    request = {"messages": [{"role": "user", "content": "a long text " * 60}], "max_tokens": 3}
    arguments = ("-k", 2, "-c", 4096, "-np", 2, f"--prompt-cache={tmp_path}", "--temp", 0)
    texts = []
    for cached in (False, True):
        with served(tiny_model, *arguments) as server:
            status, answer = server.post(CHAT, request)
            assert status == 200
            assert (answer["usage"]["prompt_tokens_details"]["cached_tokens"] > 128) == cached
            texts.append(answer["choices"][0]["message"]["content"])
            with server.send(CHAT, {**ENDLESS, "messages": [{"role": "user", "content": "another text " * 100}]}):
                server.wait_until_busy(1)
                server.process.kill()
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("template", "problem"), [("{% for", "the chat template is broken"), (None, "has no chat template")]
)
def test_a_model_without_a_template_that_can_be_used_continues_texts(
    tmp_path: Path, template: str | None, problem: str
) -> None:
    path = write_tiny_model(tmp_path / "plain.gguf", chat_template=template)
    with served(path, "-k", 1, "-np", 1) as server:
        assert any("plain.gguf only continues texts" in line and problem in line for line in server.lines)
        assert server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 3})[0] == 200
        status, answer = server.post(CHAT, HELLO)
        assert (status, problem in answer["error"]["message"]) == (400, True)
