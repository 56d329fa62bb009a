"""Timing several things side by side: in turn, round after round, so that a slow moment of the machine meets all."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Generic, TypeVar

import numpy as np

Name = TypeVar("Name", bound=Hashable)
Clock = Callable[[], float]


@dataclass(frozen=True)
class Spread:
    """The median of some numbers and the limits of the middle half of them, linearly interpolated."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """That of one or more numbers."""
        low, median, high = (float(number) for number in np.quantile(values, (0.25, 0.5, 0.75)))
        return cls(median, low, high)

    @property
    def relative(self) -> float:
        """The width of the middle half as a share of the median, which is not 0."""
        return (self.high - self.low) / self.median


@dataclass(frozen=True)
class Turn:
    """What one contender does in a round: `run`, which is timed, computes `tokens`; `prepare` comes before it."""

    run: Callable[[], None]
    tokens: int
    prepare: Callable[[], None] = lambda: None


class Rounds(Generic[Name]):
    """Seconds per token of each contender in each round; the last round may have been cut short."""

    def __init__(self) -> None:
        self._rounds: list[dict[Name, float]] = []

    def begin(self) -> dict[Name, float]:
        """A new round, to be filled."""
        self._rounds.append({})
        return self._rounds[-1]

    def seconds(self, name: Name) -> tuple[float, ...]:
        """Seconds per token of `name`, one number a round."""
        return tuple(found[name] for found in self._rounds if name in found)

    def ratios(self, name: Name, to: Name) -> tuple[float, ...]:
        """The time of `name` by that of `to`, one number for each round that has both."""
        return tuple(found[name] / found[to] for found in self._rounds if name in found and to in found)


def take_turns(
    turns: Mapping[Name, Turn],
    rounds: int,
    found: Rounds[Name],
    on_turn: Callable[[], None] = lambda: None,
    clock: Clock = perf_counter,
) -> None:
    """Let all take their turns, `rounds` times, and add each time to `found` at once; `on_turn` is called after each.

    Who begins changes every round, so that nobody always follows the one that heats the machine.
    """
    names = list(turns)
    for number in range(rounds):
        times = found.begin()
        first = number % len(names)
        for name in names[first:] + names[:first]:
            turn = turns[name]
            turn.prepare()
            begin = clock()
            turn.run()
            times[name] = (clock() - begin) / turn.tokens
            on_turn()
