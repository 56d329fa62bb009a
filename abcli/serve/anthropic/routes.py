"""POST /v1/messages and POST /v1/messages/count_tokens."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from abcli.serve.anthropic.events import MessageEvents
from abcli.serve.anthropic.request import chat_request
from abcli.serve.chat import ask_chat
from abcli.serve.counting import counting
from abcli.serve.events import EventStream, event
from abcli.serve.problems import Problem
from abcli.serve.routing import Body, JsonResponse, post
from abcli.serve.service import Answering, Service

# The kinds of errors by their HTTP status: docs.anthropic.com/en/api/errors.
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


def routes() -> list[Route]:
    """The routes of this module."""
    return [
        post("/v1/messages", create_message, shape=anthropic_error),
        counting("/v1/messages/count_tokens", chat_request, shape=anthropic_error),
    ]


def anthropic_error(problem: Problem) -> dict[str, Any]:
    """An error as Anthropic writes it."""
    kind = _KINDS.get(problem.status, "invalid_request_error" if problem.status < 500 else "api_error")
    message = problem.message
    if problem.code == "context_length_exceeded":
        # Clients shorten a conversation when they read this.
        message = f"prompt is too long: {problem.more['n_prompt_tokens']} tokens > {problem.more['n_ctx']} maximum"
    error = {"type": kind, "message": message}
    return {"type": "error", "error": error, "request_id": f"req_{secrets.token_hex(12)}"}


async def create_message(service: Service, body: Body) -> Response:
    """Answer a request for a message."""
    chat = await service.prepare(partial(chat_request, body))
    request, (answering,) = await ask_chat(service, chat)
    told = MessageEvents(body, request.model, service.buckets_of(request.asked[0].generation))
    if request.stream:
        return EventStream(
            _events(told, answering, len(request.asked[0].tokens)),
            ping_seconds=service.settings.ping_seconds,
            shape=anthropic_error,
            error_name="error",
            on_close=answering.close,
        )
    async with aclosing(answering):
        async for piece in answering:
            for _event in told.add(piece):
                pass
    return JsonResponse(told.message)


async def _events(told: MessageEvents, answering: Answering, prompt_tokens: int) -> AsyncIterator[bytes]:
    """All events as they come."""
    for item in told.begin(prompt_tokens):
        yield event(item, item["type"])
    async with aclosing(answering):
        async for piece in answering:
            for item in told.add(piece):
                yield event(item, item["type"])
