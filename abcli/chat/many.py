"""Answers to many prompts, in all slots of an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from abcli.chat.answer import Answer
from abcli.chat.asking import Asked
from abcli.generate import Generator


def answer_many(
    asked: Iterable[Asked], generator: Generator, slots: int, nearest: Callable[[Sequence[int], Sequence[int]], int]
) -> Iterator[tuple[int, Answer]]:
    """(place, answer) of everything that is asked, as they are finished; a slot that is free takes the next.

    `nearest` chooses the best of some slots for a prompt's tokens. Raises what asking raises, and for the first prompt
    that fails what `Generator` does; the others are given up then.
    """
    waiting = enumerate(asked)
    places: dict[int, tuple[int, Asked]] = {}
    more = True
    try:
        while more or places:
            free = [slot for slot in range(slots) if slot not in places]
            while free and more:
                item = next(waiting, None)
                if item is None:
                    more = False
                    break
                slot = nearest(item[1].tokens, free)
                free.remove(slot)
                generator.start(slot, item[1].tokens, item[1].generation)
                places[slot] = item
            if not places:
                return
            for piece in generator.step():
                if piece.answer.error is not None:
                    raise piece.answer.error
                if piece.answer.finish_reason is not None:
                    place, done = places.pop(piece.answer.slot)
                    yield place, done.reader().whole(piece.answer)
    finally:
        for slot in places:
            generator.drop(slot)
