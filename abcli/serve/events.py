"""Server-sent events: a response that streams, keeps the connection alive and ends when the client goes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from abcli.serve.problems import Problem, Shape, openai_error, problem_of

_KEEP_ALIVE = b": keep-alive\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
# A client that reads nothing for so long is taken for gone.
_SEND_SECONDS = 60.0
_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def event(value: Mapping[str, Any], name: str = "", *, depth: int = 0) -> bytes:
    """A JSON object as one event, with a name if there is one; written as `json_in_pieces` does with a `depth`."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json_in_pieces(value, depth)}\n\n".encode("utf-8", "backslashreplace")


def to_json(value: Any) -> str:
    """JSON without needless spaces."""
    return _ENCODER.encode(value)


def json_in_pieces(value: Any, depth: int = 5) -> str:
    """As `to_json`, where that may be much: other threads have their turn between the parts `depth` levels down."""
    if depth and isinstance(value, Mapping):
        members = (f"{to_json(name)}:{json_in_pieces(inner, depth - 1)}" for name, inner in value.items())
        return f"{{{','.join(members)}}}"
    if depth and isinstance(value, list | tuple):
        return f"[{','.join(json_in_pieces(inner, depth - 1) for inner in value)}]"
    return to_json(value)


DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """Sends the events of an async iterator as they come, and a comment whenever none came for a while.

    An error of the iterator ends the stream with an event. When the client goes, the iterator is closed.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        *,
        ping_seconds: float,
        shape: Shape = openai_error,
        error_name: str = "",
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """`error_name` is the name of the event that an error is; no pings with `ping_seconds` 0.

        `on_close` is called in the end, also if nothing was ever read of `events`.
        """
        self.status_code = 200
        self.background = None
        self.init_headers(_HEADERS)
        self._events = events
        self._ping_seconds = ping_seconds or None
        self._shape = shape
        self._error_name = error_name
        self._on_close = on_close
        self._sending_since: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything; return when it is sent or the client is gone."""
        sending = asyncio.ensure_future(self._send_all(send))
        leaving = asyncio.ensure_future(gone(receive))
        try:
            done: set[asyncio.Task[None]] = set()
            stuck: float | None = None
            while not done and (stuck is None or stuck != self._sending_since):
                stuck = self._sending_since
                done, _ = await asyncio.wait(
                    (sending, leaving), timeout=_SEND_SECONDS, return_when=asyncio.FIRST_COMPLETED
                )
        finally:
            for task in (sending, leaving):
                task.cancel()
            await asyncio.gather(sending, leaving, return_exceptions=True)
            self._on_close()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async with aclosing(_with_pings(self._events, self._ping_seconds)) as events:
                async for data in events:
                    await self._send(send, data)
        except Exception as error:  # whatever it is, the client must not wait for more
            await self._send(send, self._error_event(problem_of(error)))
        await self._send(send, b"", more=False)

    async def _send(self, send: Send, data: bytes, *, more: bool = True) -> None:
        # No `wait_for`: one that is cancelled when its work has just ended goes on as if nothing had been.
        self._sending_since = asyncio.get_running_loop().time()
        await send({"type": "http.response.body", "body": data, "more_body": more})
        self._sending_since = None

    def _error_event(self, problem: Problem) -> bytes:
        return event(self._shape(problem), self._error_name)


async def gone(receive: Receive) -> None:
    """Return when the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _with_pings(events: AsyncIterator[bytes], seconds: float | None) -> AsyncGenerator[bytes, None]:
    """The events, with a comment whenever none came for so long; `events` is closed in the end."""
    iterator = events.__aiter__()
    coming: asyncio.Future[bytes] | None = None
    try:
        while True:
            if coming is None:
                coming = asyncio.ensure_future(_next(iterator))
            done, _ = await asyncio.wait((coming,), timeout=seconds)
            if not done:
                yield _KEEP_ALIVE
                continue
            try:
                data = coming.result()
            except StopAsyncIteration:
                return
            coming = None
            yield data
    finally:
        if coming is not None:
            coming.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await coming
        close = getattr(iterator, "aclose", None)
        if close is not None:
            await close()


async def _next(iterator: AsyncIterator[bytes]) -> bytes:
    return await iterator.__anext__()
