"""Load on servers: `abcli serve` against `python -m llama_cpp.server` and `abcli batch`, side by side.

Each server is started in turn and asked by several clients at once, each with a few streamed requests after each other;
`abcli batch` answers the same prompts. A speed is new tokens per second of the whole time, prompts included; the time
to the first token is from sending a request to its first text. Tokens are counted as pieces of text that came. The last
line is JSON.

    scripts/bench_serve.py --model SmolLM2-135M-Instruct.Q8_0.gguf

measures what docs/server.md says: 16 clients with 8 requests of 300 + 64 tokens; `--clients 4 --requests 2 --rounds 2`
is enough for a first look. Contenders take turns, and the last line has the ratios: of speeds, and of tokens per second
of processors, which on a busy machine, with `--threads 1`, say more. llama-cpp-python's server needs
packages of its own: `pip install 'llama-cpp-python[server]'`, or a directory with them as --peer-path. Without, it is
left out.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import psutil

from abcli.engine.workers import available_cores
from abcli.hub.locate import locate_model

_START_SECONDS = 120.0
_WORDS = ("river", "stone", "window", "garden", "morning", "letter", "silver", "forest", "bridge", "winter", "music")


@dataclass(frozen=True)
class Load:
    """Who asks how much: tokens of a prompt are about its words."""

    clients: int
    requests: int
    prompt: int
    answer: int
    threads: int

    @property
    def prompts(self) -> list[list[str]]:
        """The prompts of each client; no two are alike."""
        chance = random.Random(1)
        return [
            [" ".join(chance.choices(_WORDS, k=self.prompt)) for _ in range(self.requests)] for _ in range(self.clients)
        ]


@dataclass(frozen=True)
class Outcome:
    """What a run measured: seconds in all, new tokens, seconds of processors, seconds to each first token."""

    name: str
    seconds: float
    tokens: int
    processors: float
    first: Sequence[float] = ()

    def fields(self) -> dict[str, Any]:
        """As JSON values."""
        found: dict[str, Any] = {"name": self.name, "tokens_per_second": round(self.tokens / self.seconds, 2)}
        found["tokens_per_processor_second"] = round(self.tokens / self.processors, 2)
        if self.first:
            ordered = sorted(self.first)
            found["first_token_median"] = round(statistics.median(ordered), 3)
            found["first_token_p95"] = round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 3)
        return found


def main() -> None:
    """Measure, print lines, print JSON."""
    options = parse_options()
    model = locate_model(options.model)
    load = Load(options.clients, options.requests, options.prompt, options.answer, options.threads or available_cores())
    found: list[Outcome] = []
    for _ in range(options.rounds):
        for outcome in run_round(model, load, options):
            print(outcome.fields(), file=sys.stderr)
            found.append(outcome)
    report = {
        "model": model.name,
        "cores": available_cores(),
        "load": vars(load),
        "runs": [outcome.fields() for outcome in found],
        "ratios": ratios(found, lambda outcome: outcome.seconds),
        "ratios_by_processor_time": ratios(found, lambda outcome: outcome.processors),
    }
    print(json.dumps(report))


def run_round(model: Path, load: Load, options: argparse.Namespace) -> Iterator[Outcome]:
    """Every contender once."""
    for buckets in options.buckets:
        yield serve_abcli(model, buckets, load)
        yield batch(model, buckets, load)
    if not options.no_peer and (peer := serve_peer(model, load, options.peer_path)) is not None:
        yield peer


def ratios(found: Sequence[Outcome], by: Callable[[Outcome], float]) -> dict[str, float]:
    """How fast the first contender is, in terms of each other: the medians of their rounds."""
    speeds: dict[str, list[float]] = {}
    for outcome in found:
        speeds.setdefault(outcome.name, []).append(outcome.tokens / by(outcome))
    first, *others = ((name, statistics.median(values)) for name, values in speeds.items())
    return {f"{first[0]} / {name}": round(first[1] / speed, 3) for name, speed in others}


def parse_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=300, help="words of a prompt, about as many tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--threads", type=int, default=0, help="threads of each contender; 0: one per core")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--peer-path", default="", help="directory with what llama_cpp.server needs")
    parser.add_argument("--no-peer", action="store_true", help="leave llama-cpp-python's server out")
    return parser.parse_args()


def serve_abcli(model: Path, buckets: int, load: Load) -> Outcome:
    """`abcli serve` with a slot for each client."""
    port = free_port()
    command = [sys.executable, "-m", "abcli", "serve", str(model), "-k", str(buckets), "--port", str(port)]
    command += ["-np", str(load.clients), "-c", "1024", "-t", str(load.threads), "--no-log-requests"]
    with running(command, port, "/health", {}) as process:
        return ask_all(f"abcli serve, {buckets} buckets", port, load, process)


def serve_peer(model: Path, load: Load, path: str) -> Outcome | None:
    """llama-cpp-python's server; None where it cannot be had."""
    port = free_port()
    environment = {"PYTHONPATH": path} if path else {}
    probe = [sys.executable, "-c", "import llama_cpp.server.app"]
    if subprocess.run(probe, env={**os.environ, **environment}, capture_output=True, check=False).returncode:
        print("llama_cpp.server cannot be started and is left out", file=sys.stderr)
        return None
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--port", str(port)]
    command += ["--n_ctx", "1024", "--interrupt_requests", "false"]
    command += ["--n_threads", str(load.threads), "--n_threads_batch", str(load.threads)]
    with running(command, port, "/v1/models", environment) as process:
        return ask_all("llama_cpp.server", port, load, process)


def batch(model: Path, buckets: int, load: Load) -> Outcome:
    """`abcli batch` on the same prompts, without the time that it takes for one short prompt: that of loading."""
    prompts = [prompt for own in load.prompts for prompt in own]
    loading = run_batch(model, buckets, load, ["warm up"], 1)
    whole = run_batch(model, buckets, load, prompts, load.answer)
    return Outcome(whole.name, whole.seconds - loading.seconds, whole.tokens, whole.processors - loading.processors)


def run_batch(model: Path, buckets: int, load: Load, prompts: Sequence[str], tokens: int) -> Outcome:
    """What `abcli batch` says that it took for some prompts, loading and all."""
    with tempfile.TemporaryDirectory() as directory:
        source, output = Path(directory, "in.jsonl"), Path(directory, "out.jsonl")
        summary = Path(directory, "summary.json")
        source.write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts))
        command = [sys.executable, "-m", "abcli", "batch", str(model), str(source), "-o", str(output), "-c", "1024"]
        command += [
            "-k",
            str(buckets),
            "-n",
            str(tokens),
            "--temp",
            "0",
            "--slots",
            str(load.clients),
            "-t",
            str(load.threads),
        ]
        before = processor_seconds(psutil.Process().cpu_times(), children=True)
        subprocess.run([*command, "--summary", str(summary)], check=True, stderr=subprocess.DEVNULL)
        report = json.loads(summary.read_text())
        used = processor_seconds(psutil.Process().cpu_times(), children=True) - before
        return Outcome(f"abcli batch, {buckets} buckets", report["seconds"], report["completion_tokens"], used)


@contextmanager
def running(command: Sequence[str], port: int, path: str, environment: dict[str, str]) -> Iterator[psutil.Process]:
    """A server, from the time that it answers."""
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = perf_counter() + _START_SECONDS
        while not answers(port, path):
            if process.poll() is not None or perf_counter() > until:
                raise SystemExit(f"{' '.join(command)} does not start")
            sleep(0.2)
        yield psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def answers(port: int, path: str) -> bool:
    """Whether a server takes requests."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def processor_seconds(times: Any, *, children: bool = False) -> float:
    """Seconds of processors in psutil's `cpu_times`, or those of children that have ended."""
    return float(times.children_user + times.children_system if children else times.user + times.system)


def ask_all(name: str, port: int, load: Load, process: psutil.Process) -> Outcome:
    """The load on a server, after a request that warms it up."""
    ask(port, "warm up", 8)
    before = processor_seconds(process.cpu_times())
    found: list[tuple[float, int]] = []
    lock = threading.Lock()

    def ask_in_turn(prompts: Sequence[str]) -> None:
        for prompt in prompts:
            answered = ask(port, prompt, load.answer)
            with lock:
                found.append(answered)

    begin = perf_counter()
    with ThreadPoolExecutor(load.clients) as pool:
        list(pool.map(ask_in_turn, load.prompts))
    seconds, used = perf_counter() - begin, processor_seconds(process.cpu_times()) - before
    return Outcome(name, seconds, sum(tokens for _, tokens in found), used, [first for first, _ in found])


def ask(port: int, prompt: str, tokens: int) -> tuple[float, int]:
    """Ask for so many tokens; the seconds to the first of them, and how many came."""
    request: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens, "stream": True}
    request |= {"temperature": 0, "stream_options": {"include_usage": True}}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    begin = perf_counter()
    connection.request("POST", "/v1/chat/completions", json.dumps(request), {"Content-Type": "application/json"})
    response = connection.getresponse()
    first, count = 0.0, 0
    for line in response:
        data = line.removeprefix(b"data: ").strip()
        if not data.startswith(b"{"):
            continue
        chunk = json.loads(data)
        # Where it is told: a piece of text is not always one token.
        count = (chunk.get("usage") or {}).get("completion_tokens", count)
        choices = chunk["choices"]
        if choices and choices[0]["delta"].get("content"):
            first = first or perf_counter() - begin
            count += 1
    connection.close()
    return first, count


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
