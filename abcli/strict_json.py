"""JSON that abcli has written, read again strictly: a value of another type or range is named, nothing is guessed.

The readers take an object and the key in it; a FormatError says what is wrong with its value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, TypeVar

T = TypeVar("T", bound=str)

_MOST = 2**63 - 1


class FormatError(Exception):
    """What is wrong with the contents of a file, as a phrase that continues "FILE ..."."""


def parsed(data: bytes, *, infinite: bool = False) -> Any:
    """The value in JSON in UTF-8, with or without a byte order mark; with `infinite`, numbers may be that.

    Raises FormatError.
    """
    try:
        return json.loads(data.decode("utf-8-sig"), parse_constant=None if infinite else _refuse_constant)
    except UnicodeDecodeError as error:
        raise FormatError(f"is not UTF-8 (at byte {error.start:,})") from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"is damaged: {error}") from None


def check_version(found: object, known: int, kind: str) -> None:
    """Raise FormatError unless `found` is the version of the format of a `kind` ("profile", ...) that is `known`."""
    if found != known or isinstance(found, bool):
        raise FormatError(f"has {kind} format {found!r:.20}, and this abcli reads {known}")


def refused(key: str, value: object) -> FormatError:
    """The error for a value that is impossible."""
    return FormatError(f"is damaged: {key} is {value!r:.80}")


def wrong_type(values: Mapping[str, Any], key: str) -> FormatError:
    """The error for a value that is not there, or of another type than it has to be."""
    return FormatError(f"is damaged: {key} {'has the wrong type' if key in values else 'is missing'}")


def mapping(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """An object."""
    value = values.get(key)
    if not isinstance(value, dict):
        raise wrong_type(values, key)
    return value


def items(values: Mapping[str, Any], key: str) -> list[Any]:
    """A list."""
    value = values.get(key)
    if not isinstance(value, list):
        raise wrong_type(values, key)
    return value


def mappings(values: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """A list of objects."""
    return [mapping({key: item}, key) for item in items(values, key)]


def text(values: Mapping[str, Any], key: str) -> str:
    """A text that can be written in UTF-8."""
    value = values.get(key)
    if not isinstance(value, str):
        raise wrong_type(values, key)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        # JSON can escape half a character, which could never be written again.
        raise FormatError(f"is damaged: {key} is not valid Unicode") from None
    return value


def one_of(values: Mapping[str, Any], key: str, known: Sequence[T]) -> T:
    """One of the texts that are `known`."""
    found = text(values, key)
    for one in known:
        if one == found:
            return one
    raise refused(key, found)


def boolean(values: Mapping[str, Any], key: str) -> bool:
    """True or false."""
    value = values.get(key)
    if not isinstance(value, bool):
        raise wrong_type(values, key)
    return value


def whole(values: Mapping[str, Any], key: str, least: int = -_MOST, most: int = _MOST) -> int:
    """A whole number from `least` to `most`."""
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool):
        raise wrong_type(values, key)
    if not least <= value <= most:
        raise refused(key, value)
    return value


def number(values: Mapping[str, Any], key: str, *, infinite: bool = False) -> float:
    """A number, which may be infinite if `infinite`."""
    value = values.get(key)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise wrong_type(values, key)
    try:
        found = float(value)
    except OverflowError:
        # Written out, it has more than 300 digits.
        found = math.nan
    if math.isnan(found) or (math.isinf(found) and not infinite):
        raise FormatError(f"is damaged: {key} is not a finite number")
    return found


def numbers(values: Mapping[str, Any], key: str, *, infinite: bool = False) -> tuple[float, ...]:
    """A list of numbers."""
    return tuple(number({key: item}, key, infinite=infinite) for item in items(values, key))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")
