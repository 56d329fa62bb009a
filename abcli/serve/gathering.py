"""The answers to one request: awaited as a whole, or told as they come, in one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol

from starlette.responses import Response

from abcli.chat.answer import Answer, Piece, Timings, Usage
from abcli.serve.chat_shapes import timings_of
from abcli.serve.chosen import Chosen
from abcli.serve.events import DONE, EventStream, event
from abcli.serve.routing import written
from abcli.serve.service import Answering, Service


class Wire(Protocol):
    """Makes chunks of one answer."""

    def add(self, piece: Piece, chosen: Sequence[Chosen], /) -> Iterator[Mapping[str, Any]]:
        """The chunks that a piece makes; `chosen` has all tokens so far."""

    def blank(self) -> Mapping[str, Any]:
        """A chunk that says nothing."""


async def respond(
    service: Service,
    answers: Sequence[Answering],
    whole: Callable[[list[Answer]], Mapping[str, Any]],
    chunks: AsyncIterator[bytes] | None,
) -> Response:
    """The response to a request: its chunks, where it is to be streamed, else what `whole` makes of all answers.

    In the end every answer is closed. Raises what goes wrong before that.
    """
    if chunks is not None:
        return EventStream(chunks, ping_seconds=service.settings.ping_seconds, on_close=partial(close_all, answers))
    try:
        return await written(partial(whole, await asyncio.gather(*map(finished_answer, answers))))
    finally:
        close_all(answers)


async def chunks_of(
    answers: Sequence[Answering],
    wires: Sequence[Wire],
    first: Iterable[Mapping[str, Any]] = (),
    last: Callable[[list[Answer]], Mapping[str, Any]] | None = None,
) -> AsyncIterator[bytes]:
    """The events of a stream: `first`, the chunks of all answers as they come, what `last` makes of these, the end."""
    finished: dict[int, Answer] = {}
    for chunk in first:
        yield event(chunk)
    async with aclosing(merged_events(answers)) as pieces:
        async for number, piece in pieces:
            more = telemetry_of(answers[number])
            if answers[number].progress is not None:
                yield event({**wires[number].blank(), **more})
                continue
            for chunk in wires[number].add(piece, answers[number].chosen):
                yield event({**chunk, **more})
            if piece.answer is not None:
                finished[number] = piece.answer
    if last is not None:
        yield event(last([finished[number] for number in sorted(finished)]))
    yield DONE


def telemetry_of(answering: Answering) -> dict[str, Any]:
    """llama-server's `timings` and `prompt_progress` beside the last piece, where they are wanted."""
    if (progress := answering.progress) is not None:
        counts = {"total": progress.total, "cache": progress.cached, "processed": progress.processed}
        return {"prompt_progress": {**counts, "time_ms": round(progress.seconds * 1e3)}}
    if (statistics := answering.statistics) is not None:
        return {"timings": timings_of(Usage.of(statistics), Timings.of(statistics))}
    return {}


async def finished_answer(answering: Answering) -> Answer:
    """The whole answer. Raises what goes wrong."""
    async with aclosing(answering):
        async for piece in answering:
            if piece.answer is not None:
                return piece.answer
    raise AssertionError("the last piece has the answer")


def close_all(answers: Sequence[Answering]) -> None:
    """Nobody reads on in any of them."""
    for answering in answers:
        answering.close()


async def merged_events(answers: Sequence[Answering]) -> AsyncGenerator[tuple[int, Piece], None]:
    """(number of the answer, piece) as they come, until all have ended. Raises the first thing that goes wrong."""
    if len(answers) == 1:
        async for piece in answers[0]:
            yield 0, piece
        return
    coming = {asyncio.ensure_future(_next(answering)): number for number, answering in enumerate(answers)}
    try:
        while coming:
            done, _ = await asyncio.wait(coming, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=lambda task: coming[task]):
                number = coming.pop(task)
                piece = task.result()
                if piece.answer is None:
                    coming[asyncio.ensure_future(_next(answers[number]))] = number
                yield number, piece
    finally:
        for task in coming:
            task.cancel()
        await asyncio.gather(*coming, return_exceptions=True)


async def _next(answering: Answering) -> Piece:
    return await answering.__anext__()
