"""Serves an application on a socket until the process is told to end."""

from __future__ import annotations

import asyncio
import gc
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any, Protocol

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from abcli.errors import UsageError

# A connection that has not sent the head of a request after so many seconds is closed.
HEAD_SECONDS = 20.0
_KEEP_ALIVE_SECONDS = 30
_MAX_HEAD_BYTES = 32 * 1024
_LAST_SECONDS = 2.0
# So long a thread that runs Python code keeps others from it. An answer takes the event loop about ten turns: with
# Python's own 5 ms, /health came after up to 98 ms while schemas were read, with this after up to 38.
_TURN_SECONDS = 0.0005
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; port 0 takes any that is free. Raises UsageError."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            found.listen(1024)
        except BaseException:
            found.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UsageError(
            f"cannot listen at {host} port {port}: {reason}", "choose another `host` or `port`", setting="port"
        ) from None
    return found


def address_of(listening: socket.socket) -> str:
    """Where a socket listens, as a link."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


class Stops(Protocol):
    """What computes for an application."""

    def stop_soon(self) -> None:
        """End what is computed; from a signal handler."""


def serve(app: ASGIApp, computing: Stops, listening: socket.socket, on_ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish what was begun; a second signal ends that, too.

    `on_ready` is called when requests are taken. Call it in the process's main thread.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
    )
    server = _Server(config, computing, on_ready)
    with _prompt():
        asyncio.run(server.serve(sockets=[listening]))


@contextmanager
def _prompt() -> Iterator[None]:
    """Let the event loop have its turn soon, whatever other threads do."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_TURN_SECONDS)
    # What was loaded stays: to look through it for garbage again and again would stop every thread, for 25 ms and more.
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.setswitchinterval(before)


class _Server(uvicorn.Server):
    """uvicorn's server with signals as `serve` describes them, which end in a normal exit."""

    def __init__(self, config: uvicorn.Config, computing: Stops, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._computing = computing
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self._computing.stop_soon()
            # Clients have that long to read why.
            last = threading.Timer(_LAST_SECONDS, setattr, (self, "force_exit", True))
            last.daemon = True
            last.start()
        self.should_exit = True


class _Protocol(H11Protocol):
    """uvicorn's protocol that does not wait for ever for a request's head (slow loris)."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def data_received(self, data: bytes) -> None:
        if self._waiting is None and (self.cycle is None or self.cycle.response_complete):
            self._expect_head()
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._forget_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_head()
        super().connection_lost(exc)

    def _expect_head(self) -> None:
        self._waiting = self.loop.call_later(HEAD_SECONDS, partial(self._too_late, self.cycle))

    def _forget_head(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _too_late(self, before: object) -> None:
        self._waiting = None
        if self.cycle is before and not self.transport.is_closing():
            self.transport.close()
