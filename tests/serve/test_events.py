"""Streams: pings, errors in the middle, clients that go or stop reading."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from abcli.errors import NativeError
from abcli.serve import events
from abcli.serve.events import EventStream, event

Sent = list[dict[str, Any]]


async def run(stream: EventStream, *, gone_after: float = 60, send_seconds: float = 0) -> bytes:
    """What a stream sends to a client that goes after a time and takes a while for each piece."""
    sent: list[bytes] = []

    async def receive() -> dict[str, Any]:
        await asyncio.sleep(gone_after)
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            await asyncio.sleep(send_seconds)
            sent.append(message["body"])

    await stream({"type": "http"}, receive, send)
    return b"".join(sent)


def test_a_silent_stream_is_kept_alive() -> None:
    async def slow() -> AsyncIterator[bytes]:
        await asyncio.sleep(0.1)
        yield event({"a": "ü"}, "named")

    text = asyncio.run(run(EventStream(slow(), ping_seconds=0.02)))
    assert text.startswith(b": keep-alive\n\n: keep-alive\n\n")
    assert text.endswith('event: named\ndata: {"a":"ü"}\n\n'.encode())
    assert asyncio.run(run(EventStream(slow(), ping_seconds=0))).startswith(b"event: named")


def test_an_error_is_told_and_ends_the_stream() -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield event({"a": 1})
        raise NativeError("broken", "try again")

    text = asyncio.run(run(EventStream(failing(), ping_seconds=0, error_name="error")))
    assert text.startswith(b'data: {"a":1}\n\nevent: error\ndata: {"error":{"message":"broken; try again"')
    assert b"[DONE]" not in text


def test_what_is_not_ours_is_not_told() -> None:
    async def failing() -> AsyncIterator[bytes]:
        yield event({"a": 1})
        raise ZeroDivisionError("private")

    text = asyncio.run(run(EventStream(failing(), ping_seconds=0)))
    assert b"internal error" in text
    assert b"private" not in text


@pytest.mark.parametrize("read", [True, False])
def test_a_client_that_goes_ends_the_iterator(read: bool) -> None:
    ended: list[str] = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                # A client that goes just when a piece is sent must not be missed.
                await asyncio.sleep(0)
                yield event({"a": 1})
        finally:
            ended.append("iterator")

    stream = EventStream(endless(), ping_seconds=5, on_close=lambda: ended.append("closed"))
    asyncio.run(asyncio.wait_for(run(stream, gone_after=0.05 if read else 0), 10))
    # What was never begun has nothing to end, so it has to be told.
    assert ended[-1] == "closed"
    assert ended[0] == "iterator" or not read


def test_a_client_that_reads_nothing_is_taken_for_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(events, "_SEND_SECONDS", 0.05)

    async def two() -> AsyncIterator[bytes]:
        yield event({"a": 1})
        yield event({"a": 2})

    closed: list[bool] = []
    stream = EventStream(two(), ping_seconds=0, on_close=lambda: closed.append(True))
    asyncio.run(asyncio.wait_for(run(stream, send_seconds=100), 10))
    assert closed == [True]
    # One that is only slow is none of them.
    slow = asyncio.run(run(EventStream(two(), ping_seconds=0), send_seconds=0.03))
    assert slow.count(b"data:") == 2
