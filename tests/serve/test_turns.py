"""Nobody is kept waiting: large answers are made beside the event loop, which has its turn soon."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
import threading
from contextlib import closing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.testclient import TestClient

from abcli.serve import events, routing
from abcli.serve.events import json_in_pieces, to_json
from abcli.serve.routing import written
from abcli.serve.run import listen, serve
from tests.serve.conftest import MESSAGES

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES, st.integers(0, 9))
def test_pieces_make_the_same_json(value: Any, depth: int) -> None:
    assert json_in_pieces(value, depth) == to_json(value)
    assert json.loads(json_in_pieces(value, depth)) == value


def test_an_answer_is_made_on_another_thread() -> None:
    seen: list[int] = []

    def value() -> dict[str, Any]:
        seen.append(threading.get_ident())
        return {"a": [1]}

    async def work() -> bytes:
        return bytes((await written(value)).body)

    assert asyncio.run(work()) == b'{"a":[1]}'
    assert seen != [threading.get_ident()]


@pytest.mark.parametrize(
    ("path", "request_fields"),
    [
        ("/v1/chat/completions", {"messages": MESSAGES, "logprobs": True, "top_logprobs": 20}),
        ("/v1/completions", {"prompt": "Hello " * 20, "echo": True, "logprobs": 20}),
        ("/v1/responses", {"input": "Hello", "include": ["message.output_text.logprobs"], "top_logprobs": 20}),
        ("/v1/responses", {"input": "Hello", "include": ["message.output_text.logprobs"], "stream": True}),
        ("/tokenize", {"content": "Hello " * 100, "with_pieces": True}),
    ],
)
def test_no_thread_writes_much_at_once(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, path: str, request_fields: dict[str, Any]
) -> None:
    """An answer grows with its tokens, what is written without a pause does not."""
    written_at_once: list[str] = []

    def counted(value: Any) -> str:
        written_at_once.append(to_json(value))
        return written_at_once[-1]

    monkeypatch.setattr(events, "to_json", counted)
    monkeypatch.setattr(routing, "to_json", counted)
    answer = client.post(path, json={**request_fields, "max_tokens": 40, "max_output_tokens": 40})
    assert answer.status_code == 200
    assert max(map(len, written_at_once)) < 4_000
    assert max(map(len, written_at_once)) < len(answer.content) / 3


def test_turns_are_short_and_garbage_little_while_it_serves() -> None:
    before = sys.getswitchinterval()
    found: list[tuple[float, int]] = []

    class Nothing:
        def stop_soon(self) -> None:
            pass

    def on_ready() -> None:
        found.append((sys.getswitchinterval(), gc.get_freeze_count()))
        os.kill(os.getpid(), signal.SIGTERM)

    with closing(listen("127.0.0.1", 0)) as listening:
        serve(Starlette(), Nothing(), listening, on_ready)
    ((interval, frozen),) = found
    assert interval == pytest.approx(0.0005)
    assert frozen > 10_000
    assert (sys.getswitchinterval(), gc.get_freeze_count()) == (pytest.approx(before), 0)
