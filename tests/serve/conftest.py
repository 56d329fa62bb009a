"""A served model: a tiny one with random weights, its service and clients of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import abcli
from abcli.sampling import GenerationConfig, SamplingConfig
from abcli.serve.app import make_app
from abcli.serve.guard import Access
from abcli.serve.service import Service, Settings

USUAL = Settings("tiny", GenerationConfig(SamplingConfig(temperature=0), max_tokens=8, ignore_eos=True), ping_seconds=0)
MESSAGES = [{"role": "user", "content": "Hello"}]


def events_in(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(name, value) of each event of a stream whose events have names; comments are left out."""
    found = []
    for block in text.split("\n\n"):
        name, _, data = block.partition("\n")
        if name.startswith("event: "):
            found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


@pytest.fixture(scope="session")
def served_llm(tiny_model: Path) -> Iterator[abcli.LLM]:
    # Caches of 32 bits, so that what runs beside an answer does not show in it.
    with abcli.load(
        tiny_model,
        buckets=2,
        slots=3,
        ctx_size=512,
        threads=1,
        engine="contexts",
        prefill="exact",
        flash_attn="off",
        cache_type_k="f32",
        cache_type_v="f32",
    ) as llm:
        yield llm


@pytest.fixture
def serving(served_llm: abcli.LLM) -> Iterator[Callable[..., TestClient]]:
    """Makes clients of services of the tiny model, one at a time, with other settings than the usual ones."""
    with ExitStack() as stack:

        def make(
            keys: tuple[str, ...] = (), access: Access | None = None, host: str = "localhost", **settings: Any
        ) -> TestClient:
            stack.close()
            service = Service(served_llm, replace(USUAL, **settings))
            stack.callback(service.close)
            app = make_app(service, keys=keys, access=access)
            client = TestClient(app, base_url=f"http://{host}", raise_server_exceptions=False)
            client.app_state = {"service": service}
            return stack.enter_context(client)

        yield make


@pytest.fixture
def client(serving: Callable[..., TestClient]) -> TestClient:
    return serving()
