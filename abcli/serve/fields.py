"""Reads the fields of a request; each complaint names the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abcli.chat.message_format import shown
from abcli.errors import UsageError


class Fields:
    """A request's JSON object; a field that is null counts as one that is not there."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """`prefix` stands before names in complaints."""
        self._values = {name: value for name, value in values.items() if value is not None}
        self._prefix = prefix

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def any(self, *names: str) -> Any:
        """The value of the first of the fields that is there, whatever it is; None for none."""
        return next((self._values[name] for name in names if name in self._values), None)

    def present(self, *names: str) -> str:
        """The first of the names that is there, else the first."""
        return next((name for name in names if name in self._values), names[0])

    def text(self, name: str, default: str = "") -> str:
        """A text."""
        return str(self._typed(name, default, str, "a text"))

    def flag(self, name: str, *, default: bool = False) -> bool:
        """True or false."""
        return bool(self._typed(name, default, bool, "true or false"))

    def word(self, name: str, choices: Sequence[str], default: str) -> str:
        """One of a few words."""
        value = self._values.get(name, default)
        if value not in choices:
            raise self.wrong(name, f"one of {', '.join(choices)}")
        return str(value)

    def whole(self, name: str, default: int, least: int, largest: int) -> int:
        """A whole number within bounds."""
        value = self._values.get(name, default)
        if type(value) is float and value.is_integer():
            value = int(value)
        if type(value) is not int or not least <= value <= largest:
            raise self.wrong(name, f"a whole number from {least} to {largest}")
        return value

    def inner(self, name: str) -> Fields:
        """The fields of an object within; none where it is not there."""
        value = self._values.get(name, {})
        if not isinstance(value, Mapping):
            raise self.wrong(name, "an object")
        return Fields(value, f"{self._prefix}{name}.")

    def texts(self, name: str, most: int) -> tuple[str, ...]:
        """A text or a list of them, none of them empty."""
        value = self._values.get(name, ())
        found = (value,) if isinstance(value, str) else value
        if not isinstance(found, list | tuple) or not all(isinstance(item, str) and item for item in found):
            raise self.wrong(name, "a text or a list of texts, none of them empty")
        if len(found) > most:
            raise UsageError(f"'{name}' has {len(found):,} texts", f"give at most {most}", setting=self._prefix + name)
        return tuple(found)

    def wrong(self, name: str, wanted: str) -> UsageError:
        """The complaint that a field is not what it has to be."""
        return wrong(self._prefix + name, self._values.get(name), f"make it {wanted}")

    def _typed(self, name: str, default: Any, kind: type, wanted: str) -> Any:
        value = self._values.get(name, default)
        if not isinstance(value, kind):
            raise self.wrong(name, wanted)
        return value


def wrong(place: str, value: Any, hint: str) -> UsageError:
    """The error of a field, named as in `input[2].content`, that has a value which cannot be taken as meant."""
    return UsageError(f"`{place}` is {shown(value)}", hint, setting=place)
