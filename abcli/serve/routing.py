"""Endpoints: who may call them, how their bodies are read, and how what goes wrong is told."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack
from functools import partial
from time import perf_counter
from typing import Any, TypeAlias, TypeVar, cast

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from abcli.serve.events import gone, json_in_pieces, to_json
from abcli.serve.models import Models
from abcli.serve.problems import Problem, RefusedError, Shape, openai_error, problem_of, refused
from abcli.serve.service import Served, Service

MAX_BODY_BYTES = 4 * 1024 * 1024
# What a body is made of takes time by the piece, and nothing else of the process runs meanwhile.
_MAX_CONTAINERS = 100_000
_MAX_VALUES = 500_000

log = logging.getLogger("abcli.serve")

Body: TypeAlias = dict[str, Any]
ServedT = TypeVar("ServedT", bound=Served)
Post: TypeAlias = Callable[[ServedT, Body], Awaitable[Response]]
Get: TypeAlias = Callable[[Service, Request], Awaitable[Response]]
About: TypeAlias = Callable[[Models, Request], Awaitable[Response]]
Held: TypeAlias = Callable[[Models, Request, ExitStack], Awaitable[Response]]


class JsonResponse(Response):
    """A JSON value; half a character is spelled with a backslash."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The value as bytes."""
        return to_json(content).encode("utf-8", "backslashreplace")


async def written(value: Callable[[], Any], depth: int = 5) -> Response:
    """The response with a value that may be large: it is made, and written, where that keeps nobody waiting."""

    def response() -> Response:
        text = json_in_pieces(value(), depth)
        return Response(text.encode("utf-8", "backslashreplace"), media_type=JsonResponse.media_type)

    return await asyncio.to_thread(response)


def post(
    path: str, endpoint: Post[ServedT], *, shape: Shape = openai_error, kind: type[ServedT] | type[Service] = Service
) -> Route:
    """A route of requests with a JSON object as their body, whose `model` says whom they ask; it has to be of a kind.

    Errors are written by `shape`.
    """

    async def answer(models: Models, request: Request, held: ExitStack) -> Response:
        body = await _read_body(request, models.settings.body_seconds)

        async def asked() -> Response:
            served = await _held(models, models.resolve(body.get("model")), kind, held)
            return await endpoint(cast(ServedT, served), body)

        return await _unless_gone(request, asked())

    return Route(path, _Endpoint(path, answer, shape=shape), methods=["POST"])


def get(path: str, endpoint: Get) -> Route:
    """A route of requests without a body, about the model that the query's `model` names; without, a loaded one."""

    async def answer(models: Models, request: Request, held: ExitStack) -> Response:
        loaded = (name for name, served in models.loaded.items() if isinstance(served, Service))
        asked = request.query_params.get("model") or next(loaded, models.names[0])
        return await endpoint(await _held(models, models.resolve(asked), Service, held), request)

    return Route(path, _Endpoint(path, answer), methods=["GET"])


def about(path: str, endpoint: About, *, is_open: bool = False) -> Route:
    """A route of requests without a body that are about no certain model; an open one needs no key."""

    async def answer(models: Models, request: Request, _held: ExitStack) -> Response:
        return await endpoint(models, request)

    return Route(path, _Endpoint(path, answer, is_open=is_open), methods=["GET"])


async def _held(models: Models, name: str, kind: type[ServedT], held: ExitStack) -> ServedT:
    """A model, loaded, until `held` is closed. Raises RefusedError for one that is not of this kind."""
    served = await models.take(name)
    held.callback(models.give_back, name)
    if not isinstance(served, kind):
        raise refused(501, "not_supported_error", f"{name} {served.lacks}")
    return served


class _Endpoint:
    """The application behind a route. The model that a request asks is held until the whole response is sent."""

    def __init__(self, path: str, answer: Held, *, shape: Shape = openai_error, is_open: bool = False) -> None:
        self._path = path
        self._answer = answer
        self._shape = shape
        self._is_open = is_open

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        begin = perf_counter()
        with ExitStack() as held:
            try:
                if not self._is_open:
                    _check_key(request)
                response = await self._answer(request.app.state.models, request, held)
            except ClientDisconnect:
                # Nobody reads it.
                response = Response(status_code=499)
            except Exception as error:
                response = problem_response(problem_of(error), self._shape)
            seconds = perf_counter() - begin
            # What was asked and answered is private.
            log.info("%s %s %d %.0f ms", request.method, self._path, response.status_code, seconds * 1e3)
            await response(scope, receive, send)


def problem_response(problem: Problem, shape: Shape = openai_error) -> Response:
    """The response that tells of a problem."""
    return JsonResponse(shape(problem), problem.status, headers=dict(problem.headers))


def _check_key(request: Request) -> None:
    keys: Sequence[bytes] = request.app.state.keys
    if not keys:
        return
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    # Clients that send both may mean either.
    given = [bearer if scheme.lower() == "bearer" else "", request.headers.get("X-Api-Key", "")]
    words = [word.strip().encode("utf-8", "surrogateescape") for word in given]
    # Every key is compared, each in constant time.
    found = [hmac.compare_digest(word, key) for word in words for key in keys]
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
        raise _too_large(f"at most {_MAX_CONTAINERS:,} objects and lists, and {_MAX_VALUES:,} values")
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


def _too_large(most: str = f"at most {MAX_BODY_BYTES:,} bytes") -> RefusedError:
    return refused(
        413,
        "invalid_request_error",
        f"the body is too large: {most}",
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
