"""Endpoints: who may call them, how their bodies are read, and how what goes wrong is told."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any, TypeAlias

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from abcli.serve.events import gone, to_json
from abcli.serve.problems import Problem, RefusedError, Shape, openai_error, problem_of, refused
from abcli.serve.service import Service

MAX_BODY_BYTES = 4 * 1024 * 1024
# What a body is made of takes time by the piece, and nothing else of the process runs meanwhile.
_MAX_CONTAINERS = 100_000
_MAX_VALUES = 500_000

log = logging.getLogger("abcli.serve")

Body: TypeAlias = dict[str, Any]
Post: TypeAlias = Callable[[Service, Body], Awaitable[Response]]
Get: TypeAlias = Callable[[Service, Request], Awaitable[Response]]


class JsonResponse(Response):
    """A JSON value; half a character is spelled with a backslash."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The value as bytes."""
        return to_json(content).encode("utf-8", "backslashreplace")


def post(path: str, endpoint: Post, *, shape: Shape = openai_error) -> Route:
    """A route of requests with a JSON object as their body; errors are written by `shape`."""

    async def answer(service: Service, request: Request) -> Response:
        body = await _read_body(request, service.settings.body_seconds)
        return await _unless_gone(request, endpoint(service, body))

    return _route(path, answer, ["POST"], shape=shape, is_open=False)


def get(path: str, endpoint: Get, *, shape: Shape = openai_error, is_open: bool = False) -> Route:
    """A route of requests without a body; an open one needs no key."""
    return _route(path, endpoint, ["GET"], shape=shape, is_open=is_open)


def _route(path: str, endpoint: Get, methods: Sequence[str], *, shape: Shape, is_open: bool) -> Route:
    async def call(request: Request) -> Response:
        begin = perf_counter()
        try:
            if not is_open:
                _check_key(request)
            response = await endpoint(request.app.state.service, request)
        except ClientDisconnect:
            # Nobody reads it.
            response = Response(status_code=499)
        except Exception as error:
            response = problem_response(problem_of(error), shape)
        # What was asked and answered is private.
        log.info("%s %s %d %.0f ms", request.method, path, response.status_code, (perf_counter() - begin) * 1e3)
        return response

    return Route(path, call, methods=list(methods))


def problem_response(problem: Problem, shape: Shape = openai_error) -> Response:
    """The response that tells of a problem."""
    return JsonResponse(shape(problem), problem.status, headers=dict(problem.headers))


def _check_key(request: Request) -> None:
    keys: Sequence[bytes] = request.app.state.keys
    if not keys:
        return
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer":
        given = request.headers.get("X-Api-Key", "")
    # Every key is compared, each in constant time.
    found = [hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), key) for key in keys]
    if not any(found):
        raise refused(
            401,
            "authentication_error",
            "the API key is missing or wrong; send it as Authorization: Bearer KEY or X-Api-Key: KEY",
            code="invalid_api_key",
            WWW_Authenticate="Bearer",
        )


async def _read_body(request: Request, seconds: float) -> Body:
    """The JSON object in a request's body. Raises RefusedError."""
    try:
        length = int(request.headers.get("Content-Length", "0"))
    except ValueError:
        length = 0
    if length > MAX_BODY_BYTES:
        raise _too_large()
    try:
        data = await asyncio.wait_for(_whole_body(request), seconds)
    except asyncio.TimeoutError:
        raise refused(
            408, "timeout_error", f"the body did not come within {seconds:g} seconds", Connection="close"
        ) from None
    if data.count(b"[") + data.count(b"{") > _MAX_CONTAINERS or data.count(b",") > _MAX_VALUES:
        raise _too_large()
    try:
        # A thread, so that others have their turn in between.
        value = await asyncio.get_running_loop().run_in_executor(None, partial(json.loads, data.decode()))
    except UnicodeDecodeError as error:
        raise refused(400, "invalid_request_error", f"the body is not UTF-8 at byte {error.start:,}") from None
    except (ValueError, RecursionError) as error:
        raise refused(400, "invalid_request_error", f"the body is not JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise refused(400, "invalid_request_error", "the body is not a JSON object")
    return value


async def _whole_body(request: Request) -> bytes:
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY_BYTES:
            raise _too_large()
    return bytes(data)


def _too_large() -> RefusedError:
    return refused(
        413,
        "invalid_request_error",
        f"the body is too large: at most {MAX_BODY_BYTES:,} bytes",
        code="body_too_large",
        Connection="close",
    )


async def _unless_gone(request: Request, work: Awaitable[Response]) -> Response:
    """The response of `work`, which is cancelled when the client goes; then raises ClientDisconnect."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(gone(request.receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    return working.result()
