"""What one rendering of a stranger's template may cost, in characters built and seconds spent.

The budget of the current rendering lives in a context variable, so renderings in several threads do not mix.
"""

from __future__ import annotations

import re
import time
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from jinja2.exceptions import SecurityError
from jinja2.utils import Namespace

Item = TypeVar("Item")

# A list holds pointers: 8 bytes an item, where a string has 1 a character.
_ITEM_COST = 8
_CONTAINER_COST = 64
_MAX_INTEGER_BITS = 4096
_MAX_EXPONENT = 64
_CONTAINERS = (list, tuple, set, frozenset, KeysView, ValuesView, ItemsView)
# Three digits are wider than any table in a prompt; "*" takes the width from the arguments.
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(?:\d{4}|\*)")
_WIDE_BRACES = re.compile(r"\{[^{}]*:[^{}]*(?:\d{4}|\{)")


class Budget:
    """Characters and seconds that are left."""

    def __init__(self, characters: int, seconds: float) -> None:
        self.characters = characters
        self._deadline = time.monotonic() + seconds

    def spend(self, characters: int) -> None:
        """Take `characters` off; raises SecurityError when they, or the time, run out."""
        self.characters -= characters
        if self.characters < 0:
            raise SecurityError("it builds more text than a chat template may")
        if time.monotonic() > self._deadline:
            raise SecurityError("it runs longer than a chat template may")


_current: ContextVar[Budget] = ContextVar("budget")


@contextmanager
def limited(characters: int, seconds: float) -> Iterator[None]:
    """Everything rendered inside the block shares one budget."""
    token = _current.set(Budget(characters, seconds))
    try:
        yield
    finally:
        _current.reset(token)


def spend(characters: int) -> None:
    """Take `characters` off the budget of the current rendering."""
    _current.get().spend(characters)


def spend_on(*values: Any) -> None:
    """Spend what `values` would take when written out."""
    budget = _current.get()
    budget.spend(written_size(values, budget.characters))


def watched(items: Iterable[Item]) -> Iterator[Item]:
    """`items`, one character of budget each, so that a loop without output ends too."""
    budget = _current.get()
    for item in items:
        budget.spend(1)
        yield item


def flat_size(value: Any) -> int:
    """What a copy of `value` takes that shares its items."""
    if isinstance(value, (str, bytes)):
        return len(value)
    if isinstance(value, (Mapping, *_CONTAINERS)):
        return _CONTAINER_COST + _ITEM_COST * len(value)
    return _ITEM_COST


def written_size(value: Any, limit: int) -> int:
    """About how long `value` is when written out; counting stops a little above `limit`.

    A list that holds another list twice is counted twice, which is how it would be written.
    """
    total = 0
    pending = [value]
    while pending and total <= limit:
        item = pending.pop()
        total += flat_size(item)
        if isinstance(item, Mapping):
            pending.extend(item.keys())
            pending.extend(item.values())
        elif isinstance(item, _CONTAINERS):
            pending.extend(item)
        elif isinstance(item, Namespace):
            raise SecurityError("it writes out a namespace")
    return total


def product_size(left: Any, right: Any) -> int:
    """What `left * right` takes. Raises SecurityError for a product of huge integers."""
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > _MAX_INTEGER_BITS:
            raise SecurityError("it computes with huge integers")
        return _ITEM_COST
    for repeated, count in ((left, right), (right, left)):
        if isinstance(count, int) and isinstance(repeated, (str, bytes, list, tuple)):
            return flat_size(repeated) * max(count, 1)
    return _ITEM_COST


def check_power(base: Any, exponent: Any) -> None:
    """Raise SecurityError if `base ** exponent` could be huge."""
    integers = isinstance(base, int) and isinstance(exponent, int)
    if integers and (abs(exponent) > _MAX_EXPONENT or base.bit_length() > _MAX_EXPONENT):
        raise SecurityError("it computes with huge integers")


def replaced_size(text: str, old: str, new: str) -> int:
    """What `text.replace(old, new)` takes."""
    return len(text) + text.count(old) * len(new)


def percent_size(text: str, values: Any) -> int:
    """What `text % values` takes at most. Raises SecurityError for very wide fields."""
    if _WIDE_PERCENT.search(text):
        raise SecurityError("it formats very wide fields")
    return len(text) + text.count("%") * written_size(values, _current.get().characters)


def braces_size(text: str, values: Any) -> int:
    """What `text.format(values)` takes at most. Raises SecurityError for very wide fields."""
    if _WIDE_BRACES.search(text):
        raise SecurityError("it formats very wide fields")
    return len(text) + text.count("{") * written_size(values, _current.get().characters)
