"""`abcli serve` as a process of its own, and bare sockets to it."""

from __future__ import annotations

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic, sleep
from typing import Any

# Generous, because a test machine may be busy; nothing waits for it to pass.
PATIENCE = 120


class Server:
    """A running server."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, lines: list[str]) -> None:
        self.process = process
        self.port = port
        self.lines = lines

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE)

    def send(self, path: str, body: Any, **headers: str) -> socket.socket:
        """A connection on which a request was sent, of which nothing was read."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        head = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {len(data)}"]
        head += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        connection = self.connect()
        connection.sendall("\r\n".join([*head, "", ""]).encode() + data)
        return connection

    def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and JSON of a request."""
        return answer_of(self.send(path, body))

    def get(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()

    def busy(self) -> int:
        """How many slots compute."""
        return sum(slot["is_processing"] for slot in self.get("/slots")[1])

    def wait_until_busy(self, count: int, seconds: float = PATIENCE) -> float:
        """Wait until so many slots compute; the seconds that took."""
        begin = monotonic()
        while self.busy() != count:
            assert monotonic() - begin < seconds, self.get("/slots")
            sleep(0.01)
        return monotonic() - begin

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


def answer_of(connection: socket.socket) -> tuple[int, Any]:
    """Status and JSON of the response on a connection, which is closed."""
    with connection:
        response = http.client.HTTPResponse(connection)
        response.begin()
        data = response.read()
        return response.status, json.loads(data) if data else None


@contextmanager
def served(*arguments: object) -> Iterator[Server]:
    """A server with these arguments, of which the first is a model; killed after the block if it still runs."""
    command = [sys.executable, "-m", "abcli", "serve", *map(str, arguments), "--port", "0", "-t", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    lines: list[str] = []
    ready = threading.Event()
    port = 0

    def read() -> None:
        nonlocal port
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line.decode().rstrip())
            if found := re.search(r"served at http://.*:(\d+)", lines[-1]):
                port = int(found[1])
                ready.set()
        ready.set()

    reader = threading.Thread(target=read)
    reader.start()
    try:
        assert ready.wait(PATIENCE)
        assert port, lines
        yield Server(process, port, lines)
    finally:
        process.kill()
        process.wait()
        reader.join()
        assert process.stderr is not None
        process.stderr.close()
