"""POST /v1/responses, and how many tokens a request has."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from abcli.serve.chat import ask_chat
from abcli.serve.chat_shapes import logprobs_of
from abcli.serve.counting import counting
from abcli.serve.events import EventStream, event
from abcli.serve.gathering import telemetry_of
from abcli.serve.problems import problem_of
from abcli.serve.responses.events import ResponseEvents
from abcli.serve.responses.request import chat_request
from abcli.serve.routing import Body, post, written
from abcli.serve.service import Answering, Service

# How deep the log-probabilities of an event stand.
_DEPTH = 7


def routes() -> list[Route]:
    """The routes of this module."""
    counts = ("/v1/responses/input_tokens", "/responses/input_tokens")
    return [
        *(post(path, create_response) for path in ("/v1/responses", "/responses")),
        *(counting(path, chat_request, kind="response.input_tokens") for path in counts),
    ]


async def create_response(service: Service, body: Body) -> Response:
    """Answer a request for a response."""
    chat = await service.prepare(partial(chat_request, body))
    request, (answering,) = await ask_chat(service, chat)
    told = ResponseEvents(body, request.model, service.buckets_of(request.asked[0].generation))
    events = _events(service, told, answering)
    if request.stream:
        wire = (await asyncio.to_thread(event, item, item["type"], depth=_DEPTH) async for item in _whole(told, events))
        return EventStream(wire, ping_seconds=service.settings.ping_seconds, on_close=answering.close)
    async for _item in events:
        pass
    return await written(lambda: told.response, _DEPTH)


async def _events(service: Service, told: ResponseEvents, answering: Answering) -> AsyncIterator[dict[str, Any]]:
    """The events of an answer as it comes, with the log-probabilities that are wanted."""
    taken = 0
    async with aclosing(answering):
        async for piece in answering:
            news = answering.chosen[taken:]
            taken += len(news)
            logprobs = logprobs_of(news, service.pieces)["content"] if news else ()
            # What ends a part repeats all of it, where that keeps nobody waiting.
            found = await asyncio.to_thread(list, told.add(piece, logprobs))
            if answering.progress is not None:
                found.append(told.goes_on())
            for item in found:
                yield {**item, **telemetry_of(answering)}


async def _whole(told: ResponseEvents, events: AsyncIterator[dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """All events of a stream: a client waits for a response that ends, however that is."""
    for item in told.begin():
        yield item
    try:
        async for item in events:
            yield item
    except Exception as error:
        for item in told.fail(problem_of(error).message):
            yield item
