"""What the tasks that build their own contexts share: the asked depths, and how much fits into a length."""

from __future__ import annotations

import math
from collections.abc import Callable
from random import Random

from abcli.errors import UsageError
from abcli.evals.questions import TaskSettings

# A context is prefilled once for all its questions; more of them would make fewer, less independent contexts.
QUESTIONS_PER_CONTEXT = 8
# From here on bisection takes over, which is slower on text of even density but bounded on any.
_INTERPOLATED_GUESSES = 8
# llama.cpp counts tokens in 32 bits.
_LARGEST_SETTING = 2**31 - 1


def check_settings(settings: TaskSettings) -> None:
    """Raise UsageError unless length, limit and depths are all from 1 to 2^31 - 1."""
    for name, value, hint in (
        ("length", settings.length, "give the tokens of a context, for instance `length=1024`"),
        ("limit", settings.limit, "ask for at least one question, for instance `limit=200`"),
        ("number of depths", settings.depths, "ask for at least one depth, for instance `depths=5`"),
    ):
        if value < 1:
            raise UsageError(f"the {name} is {value}; it must be at least 1", hint)
        if value > _LARGEST_SETTING:
            raise UsageError(f"the {name} is larger than {_LARGEST_SETTING:,}", hint)


def asked_depths(depths: int, first: int, number: int) -> list[float]:
    """The depths that questions `first` to `first + number - 1` ask for.

    They take `depths` evenly spaced numbers from 0 to 1 in turn; only 0 where it is 1, as in `numpy.linspace`.
    """
    return [(first + index) % depths / max(depths - 1, 1) for index in range(number)]


def depth_range(depth: float, depths: int) -> tuple[float, float]:
    """The lowest and the highest depth whose nearest one of `depths` asked depths is `depth`."""
    reach = 0.5 / (depths - 1) if depths > 1 else 1.0
    return max(0.0, depth - reach), min(1.0, depth + reach)


def random_for(task: str, settings: TaskSettings, context_number: int, purpose: str = "") -> Random:
    """A generator for one context, independent of those of all other contexts, lengths and seeds."""
    return Random(f"{task}/{settings.length}/{settings.seed}/{context_number}/{purpose}")  # noqa: S311


def most_that_fit(size: Callable[[int], int], limit: int, bound: int, guess: int) -> int:
    """The largest n from 0 to `bound` with `size(n)` <= `limit`, -1 if there is none.

    `size` grows with n, evenly or nearly so; each call may be slow, and a handful are made. `guess` is a first
    idea of n. The result has been measured: its size is never above the limit.
    """
    at_zero = size(0)
    if at_zero > limit:
        return -1
    low, high, at_low = 0, bound + 1, at_zero
    calls = 0
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        at_guess = size(guess)
        calls += 1
        if at_guess <= limit:
            low, at_low = guess, at_guess
        else:
            high = guess
        rate = max(at_guess - at_zero, 1) / guess
        guess = low + math.floor((limit - at_low) / rate) if calls < _INTERPOLATED_GUESSES else (low + high) // 2
    return low
