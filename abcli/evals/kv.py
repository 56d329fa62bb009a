"""The task `kv`: look a value up in a JSON object of random identifiers.

It is the key-value retrieval of "Lost in the Middle" (Liu et al., arXiv 2307.03172).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from random import Random
from uuid import UUID

from abcli.errors import UsageError
from abcli.evals.placement import (
    QUESTIONS_PER_CONTEXT,
    asked_depths,
    check_settings,
    depth_range,
    most_that_fit,
    random_for,
)
from abcli.evals.questions import CountTokens, Question, TaskSettings

INSTRUCTION = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
ANSWER_START = 'The value is "'
_SAMPLE_PAIRS = 8


@dataclass(frozen=True)
class _Pair:
    key: str
    value: str


def kv(settings: TaskSettings, count: CountTokens) -> Iterator[Question]:
    """Questions for the value of a key, at most eight on one object, the asked depths in turn.

    The answer is the first of the five groups of the value, 8 hexadecimal digits: they are where the right pair
    has to be found, the rest is copied from there on, and scoring them costs a quarter. `depth` is the pair's
    index divided by the last index. A context gets fewer than eight questions where no pair is left for the
    depth that comes next. Raises UsageError for settings below 1 and for a length that cannot hold a pair for
    each depth.
    """
    check_settings(settings)
    # Without two pairs there is no depth to speak of.
    pairs = max(settings.depths, 2)
    sample = list(islice(_pairs(Random("kv/sample")), _SAMPLE_PAIRS))  # noqa: S311
    frame = count(_render([]))
    per_pair = max((count(_render(sample)) - frame) / _SAMPLE_PAIRS, 1.0)
    # One more, as identifiers differ in their tokens.
    least = frame + math.ceil((pairs + 1) * per_pair)
    if settings.length < least:
        raise _too_short(settings.length, pairs, least)
    return islice(_questions(settings, count, int((settings.length - frame) / per_pair)), settings.limit)


def _too_short(length: int, pairs: int, least: int) -> UsageError:
    return UsageError(
        f"a context of {length} tokens is too short for {pairs} key-value pairs",
        f"this model needs at least {least} tokens for them; or ask for fewer `depths`",
    )


def _questions(settings: TaskSettings, count: CountTokens, guess: int) -> Iterator[Question]:
    asked = context_number = 0
    while True:
        pairs = _fitting_pairs(settings, count, context_number, guess)
        context = _render(pairs)
        group = f"kv/{settings.length}/{context_number:04d}"
        chosen = _choose(len(pairs), settings.depths, asked)
        for number, index in enumerate(chosen):
            yield Question(
                identifier=f"{group}/{number}",
                group=group,
                context=context,
                text=f'Key: "{pairs[index].key}"\nCorresponding value:',
                answer_start=ANSWER_START,
                answer=pairs[index].value.partition("-")[0],
                depth=index / (len(pairs) - 1),
                length=settings.length,
            )
        asked += len(chosen)
        context_number += 1


def _fitting_pairs(settings: TaskSettings, count: CountTokens, context_number: int, guess: int) -> list[_Pair]:
    source = _pairs(random_for("kv", settings, context_number))
    pairs: list[_Pair] = []

    def size(number: int) -> int:
        pairs.extend(islice(source, max(number - len(pairs), 0)))
        return count(_render(pairs[:number]))

    # Every pair takes at least one token.
    fitting = most_that_fit(size, settings.length, settings.length, guess)
    if fitting < 2:
        raise _too_short(settings.length, 2, size(2))
    return pairs[:fitting]


def _choose(pairs: int, depths: int, first: int) -> list[int]:
    """The indices of the pairs to ask for: each the free one nearest to the next depth.

    It ends before a pair that is nearer to another depth, so that the next context begins with this depth.
    """
    chosen: list[int] = []
    for depth in asked_depths(depths, first, min(QUESTIONS_PER_CONTEXT, pairs)):
        free = (index for index in range(pairs) if index not in chosen)
        nearest = min(free, key=lambda index: abs(index / (pairs - 1) - depth))
        low, high = depth_range(depth, depths)
        if chosen and not low <= nearest / (pairs - 1) <= high:
            break
        chosen.append(nearest)
    return chosen


def _pairs(random: Random) -> Iterator[_Pair]:
    """Pairs of random version 4 UUIDs without end; no key comes twice."""
    seen: set[str] = set()
    while True:
        key, value = (str(UUID(int=random.getrandbits(128), version=4)) for _ in range(2))
        if key not in seen:
            seen.add(key)
            yield _Pair(key, value)


def _render(pairs: list[_Pair]) -> str:
    """The instruction and the object, one pair a line."""
    return INSTRUCTION + "{" + ",\n ".join(f'"{pair.key}": "{pair.value}"' for pair in pairs) + "}"
