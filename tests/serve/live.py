"""Serves a real model for tests: a script whose one line of output is the address. Its answers are short.

It ends when its input does, so that none outlives a test that was killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import abcli
from abcli.sampling import GenerationConfig, SamplingConfig
from abcli.serve.app import make_app
from abcli.serve.run import listen, serve
from abcli.serve.service import Service, Settings

NAME = "smol"
# The model rambles; the token that ends its answers is made likelier.
_END_OF_TURN, _BIAS = 2, 6.0


@contextmanager
def running_server(model: Path, *, buckets: int = 1) -> Iterator[str]:
    """The address of a server in a process of its own."""
    command = [sys.executable, __file__, str(model), str(buckets)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert address, "the server did not start"
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)


def _main(model: str, buckets: str) -> None:
    def end_with_input() -> None:
        sys.stdin.read()
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=end_with_input, daemon=True).start()
    # One thread: those of a busy machine wait for each other.
    sampling = SamplingConfig(temperature=0, logit_bias=((_END_OF_TURN, _BIAS),))
    settings = Settings(NAME, GenerationConfig(sampling, max_tokens=80))
    listening = listen("127.0.0.1", 0)
    with (
        closing(listening),
        abcli.load(model, buckets=int(buckets), slots=3, ctx_size=2048, threads=1) as llm,
        closing(Service(llm, settings)) as service,
    ):
        port = listening.getsockname()[1]
        serve(make_app(service), service.worker, listening, lambda: print(f"http://127.0.0.1:{port}", flush=True))


if __name__ == "__main__":
    _main(*sys.argv[1:])
