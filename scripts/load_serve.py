"""Mixed load on `abcli serve` for a while: clients come and go, a fifth of them in the middle of an answer.

    scripts/load_serve.py --model SmolLM2-135M-Instruct.F32.gguf --minutes 60

Every answer is compared with that to the same request alone; a file of F32 weights keeps rounding from deciding. In the
end no slot may be busy, nothing may wait, and the server's memory may not have grown. The last line is JSON; the exit
code is 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import http.client
import json
import random
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Any, TypeAlias

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from abcli.hub.locate import locate_model
from tests.serve.process import PATIENCE, Server, answer_of, served
from tests.support.tiny_gguf import write_tiny_model

# What runs beside an answer changes nothing of it but rounding, and so little of that as can be.
_EXACT = ("--prefill", "exact", "--flash-attn", "off", "-ctk", "f32", "-ctv", "f32", "--engine", "contexts")
_WORDS = ("river", "stone", "window", "garden", "morning", "letter", "silver", "forest", "bridge", "winter", "music")
_DYING = 0.2
_SAMPLE_SECONDS = 2.0
# Of the memory after the first third of the time; allocators keep some of what they once had.
_GROWTH = 0.05
_CHAT, _PLAIN = "/v1/chat/completions", "/v1/completions"
Request: TypeAlias = tuple[str, dict[str, Any]]
"""The path, and the body."""


@dataclass
class Outcome:
    """What happened: kinds of ends and their numbers, and the answers that were not as they should be."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    """Bytes of the server, from time to time."""

    def growth(self) -> float:
        """By which part the memory grew from the second third of the time to the last one."""
        third = len(self.memory) // 3
        return median(self.memory[-third:]) / median(self.memory[third:-third]) - 1 if third else 0.0


def main() -> int:
    """Ask, compare, report; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="default: a tiny one with random weights")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--buckets", type=int, default=2)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=96, help="most tokens of an answer")
    parser.add_argument("--words", type=int, default=200, help="most words of a prompt")
    options = parser.parse_args()
    arguments = ("-k", options.buckets, "-np", options.slots, "-c", 2048, "--temp", 0, "--no-log-requests", *_EXACT)
    requests = make_requests(options.words, options.tokens)
    with tempfile.TemporaryDirectory() as folder:
        model = locate_model(options.model) if options.model else write_tiny_model(Path(folder, "tiny.gguf"))
        with served(model, *arguments) as server:
            expected = [answer(server, request) for request in requests]
            outcome = Clients(server, requests, expected, monotonic() + 60 * options.minutes).run(options.clients)
            left = server_state(server)
            code = server.end()
    growth = outcome.growth()
    report = {
        "model": model.name,
        "minutes": options.minutes,
        "buckets": options.buckets,
        "clients": options.clients,
        **outcome.counts,
        "different": len(outcome.wrong),
        **left,
        "exit_code": code,
        "memory_mib": [round(size / 2**20, 1) for size in outcome.memory[:: max(1, len(outcome.memory) // 8)]],
        "memory_growth": round(growth, 4),
    }
    for line in outcome.wrong[:5]:
        print(line, file=sys.stderr)
    print(json.dumps(report))
    return int(bool(outcome.wrong or code or left["busy"] or left["waiting"] or growth > _GROWTH))


def make_requests(words: int, tokens: int) -> list[Request]:
    """(path, body) of requests of every length; some begin alike."""
    chance = random.Random(1)
    shared = " ".join(chance.choices(_WORDS, k=words // 2))
    found: list[Request] = []
    for number in range(24):
        text = " ".join(chance.choices(_WORDS, k=chance.randint(1, words // 2)))
        text = f"{shared} {text}" if number % 3 == 0 else text
        body: dict[str, Any] = {"max_tokens": chance.randint(1, tokens), "ignore_eos": number % 2 == 0}
        if number % 2:
            found.append((_CHAT, {**body, "messages": [{"role": "user", "content": text}]}))
        else:
            found.append((_PLAIN, {**body, "prompt": text}))
    return found


def answer(server: Server, request: Request) -> str:
    """The text of an answer, asked for as a whole."""
    path, body = request
    status, found = server.post(path, body)
    if status != 200:
        raise RuntimeError(f"{status}: {found}")
    choice = found["choices"][0]
    return str(choice["text"] if path == _PLAIN else choice["message"]["content"])


def streamed(server: Server, request: Request, leave_after: int | None) -> str | None:
    """The text of an answer as it comes; None where the client leaves after so many events."""
    path, body = request
    connection = server.send(path, {**body, "stream": True})
    with connection:
        response = http.client.HTTPResponse(connection)
        if leave_after == 0:
            return None
        response.begin()
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {response.read()!r}")
        text, count = "", 0
        for line in response:
            data = line.removeprefix(b"data: ").strip()
            if not data.startswith(b"{"):
                continue
            count += 1
            if count == leave_after:
                return None
            choice = json.loads(data)["choices"][0]
            text += (choice.get("text") or "") if path == _PLAIN else (choice["delta"].get("content") or "")
        return text


class Clients:
    """Clients that ask at once, each request chosen by chance, until it is `until`."""

    def __init__(self, server: Server, requests: Sequence[Request], expected: Sequence[str], until: float) -> None:
        self.outcome = Outcome()
        self._server = server
        self._requests = requests
        self._expected = expected
        self._until = until
        self._lock = threading.Lock()

    def run(self, count: int) -> Outcome:
        """Let so many clients ask; what came of it."""
        threads = [threading.Thread(target=self._ask_on, args=(number,), daemon=True) for number in range(count)]
        for thread in threads:
            thread.start()
        process = psutil.Process(self._server.process.pid)
        while monotonic() < self._until:
            self.outcome.memory.append(process.memory_info().rss)
            sleep(_SAMPLE_SECONDS)
        for thread in threads:
            thread.join(PATIENCE)
            if thread.is_alive():
                self.outcome.wrong.append("a client still waits")
        return self.outcome

    def _ask_on(self, number: int) -> None:
        chance = random.Random(number)
        while monotonic() < self._until:
            chosen = chance.randrange(len(self._requests))
            kind = "died" if chance.random() < _DYING else chance.choice(("streamed", "whole"))
            leave_after = chance.choice((0, 1, 2, 5, 20)) if kind == "died" else None
            try:
                text = self._ask(chosen, kind, leave_after)
            except Exception as error:
                kind, text = "failed", f"{type(error).__name__}: {error}"
            with self._lock:
                self.outcome.counts[kind] += 1
                if text is not None and text != self._expected[chosen]:
                    wanted = self._expected[chosen]
                    self.outcome.wrong.append(f"request {chosen} ({kind}): {text!r:.300} instead of {wanted!r:.300}")
            if chance.random() < 0.1:
                sleep(chance.random())

    def _ask(self, chosen: int, kind: str, leave_after: int | None) -> str | None:
        request = self._requests[chosen]
        return answer(self._server, request) if kind == "whole" else streamed(self._server, request, leave_after)


def server_state(server: Server) -> dict[str, int]:
    """Slots that compute and requests that wait, a moment after everybody has gone; and that a request is answered."""
    until = monotonic() + 5
    while server.busy() and monotonic() < until:
        sleep(0.1)
    status, _found = answer_of(server.send(_PLAIN, {"prompt": "a", "max_tokens": 1}))
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    waiting = next(line for line in text.splitlines() if line.startswith("abcli:requests_deferred "))
    return {"busy": server.busy(), "waiting": int(waiting.split()[1]), "last_status": status}


if __name__ == "__main__":
    sys.exit(main())
