"""Several answers at once, as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from abcli.chat.answer import Piece
from abcli.serve.service import Answering


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
