"""The keywords of JSON Schema that hold values: checked, and put into the form that llguidance enforces rightly."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any

from abcli.errors import GrammarError
from abcli.grammar import formats, numbers, patterns
from abcli.grammar.disjoint import TYPES
from abcli.grammar.references import inside

MAX_COUNT = 20_000
MAX_ALL_COUNTS = 100_000
MAX_LENGTH = 1_000_000
NO_LIMIT = 2**31 - 1  # what generated schemas write for "any number"

_BOUNDS = {"minimum": True, "exclusiveMinimum": True, "maximum": False, "exclusiveMaximum": False}
_LENIENT = "leave it out, or enforce the rest with `schema_lenient`"
# llguidance's \uXXXX would spell the name of a property so that it is taken for another one: without it these cannot
# be written.
_UNWRITABLE = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f]")


class Keywords:
    """Checks values, counts what they cost, and collects the remarks on what is not enforced."""

    def __init__(self, lenient: bool) -> None:
        self._lenient = lenient
        self._counts = 0
        self._multiples: set[Decimal] = set()
        self.remarks: list[str] = []
        checks: dict[str, Callable[[Any, str], Any]] = {
            "type": self.type,
            "required": self.required,
            "pattern": self.pattern,
            "minLength": partial(self.length, most=False),
            "maxLength": partial(self.length, most=True),
            **dict.fromkeys(("minItems", "minProperties"), partial(self.count, most=False)),
            **dict.fromkeys(("maxItems", "maxProperties"), partial(self.count, most=True)),
        }
        self.checks = checks
        """What each keyword's value is put through, with its place; None leaves the keyword out."""

    def type(self, value: Any, place: str) -> Any:
        for name in value if isinstance(value, list) else [value]:
            if name not in (*TYPES, "integer"):
                raise wrong(place, f"one or more of {', '.join((*TYPES, 'integer'))}, not {_shown(name)}")
        return value

    def required(self, value: Any, place: str) -> list[str]:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            raise wrong(place, "a list of names")
        for name in value:
            self.text(name, place)
        return list(dict.fromkeys(value))

    def length(self, value: Any, place: str, *, most: bool) -> int | None:
        """Texts are followed by a count: its size costs nothing."""
        number = numbers.count(value)
        if number is None:
            raise wrong(place, f"a whole number from 0, not {_shown(value)}")
        if number > MAX_LENGTH:
            if most:
                return None if number >= NO_LIMIT else number
            raise beyond(place, f"more than {MAX_LENGTH:,} characters", "ask for less")
        return number

    def count(self, value: Any, place: str, *, most: bool) -> int | None:
        number = numbers.count(value)
        if number is None:
            raise wrong(place, f"a whole number from 0, not {_shown(value)}")
        if most and number >= NO_LIMIT:
            return None
        self._counts += number
        if number > MAX_COUNT or self._counts > MAX_ALL_COUNTS:
            raise beyond(
                place,
                f"{number:,}",
                f"count to {MAX_COUNT:,} at most, and to {MAX_ALL_COUNTS:,} in all, or leave it out",
            )
        return number

    def pattern(self, value: Any, place: str) -> str | None:
        if not isinstance(value, str):
            raise wrong(place, "a regular expression")
        try:
            return patterns.translate(value)
        except GrammarError as error:
            self.drop(place, f"{_shown(value)}: {error.message}")
            return None

    def format(self, node: dict[str, Any], place: str) -> list[tuple[str, Any]]:
        name = node.get("format")
        if name is None:
            return []
        where = inside(place, "format")
        if not isinstance(name, str):
            raise wrong(where, "a text")
        if name in formats.PATTERNS:
            return [("allOf", [{"pattern": formats.PATTERNS[name]}])]
        if name in formats.NATIVE:
            longest = formats.NATIVE[name]
            return [("allOf", [{"format": name, **({} if longest is None else {"maxLength": longest})}])]
        self.remarks.append(f"the format {_shown(name)} at {where} is not checked")
        return []

    def numbers(self, node: dict[str, Any], place: str) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
        """The keywords of numbers: those to stand beside the others, and what is to be applied besides.

        Alternatives say the same of numbers that are written with fewer decimals.
        """
        plain: dict[str, Any] = {}
        applied: list[tuple[str, Any]] = []
        kind = {"type": node["type"]} if "type" in node else {}
        for key, up in _BOUNDS.items():
            bound = self._bound(node, key, place, up=up)
            if bound is None:
                continue
            if key.startswith("exclusive") and int(bound) == bound:
                key, bound = key.removeprefix("exclusive").lower(), numbers.beside(bound, up=up)
            if key in plain:
                applied.append(("allOf", [{key: bound}]))
                continue
            plain[key] = bound
            alternatives = numbers.shorter(bound) if (bound < 0) == up else []
            if alternatives:
                del plain[key]
                inclusive = "minimum" if up else "maximum"
                options = [{**kind, key: bound}, *({**kind, inclusive: other} for other in alternatives)]
                applied.append(("allOf", [{"anyOf": options}]))
        if "multipleOf" in node:
            found = self._multiple(node["multipleOf"], inside(place, "multipleOf"))
            options = [{**kind, "multipleOf": other} for other in (node["multipleOf"], *numbers.coarser(found))]
            applied.append(("allOf", [options[0] if len(options) == 1 else {"anyOf": options}]))
        return plain, applied

    def _bound(self, node: dict[str, Any], key: str, place: str, *, up: bool) -> int | float | None:
        value: Any = node.get(key)
        where = inside(place, key)
        if isinstance(value, bool) and key.startswith("exclusive"):
            # Draft 4: it is about the bound beside it.
            value = node.get("minimum" if up else "maximum") if value else None
        if value is None:
            return None
        if not numbers.is_number(value):
            raise wrong(where, f"a number, not {_shown(value)}")
        bound = numbers.inwards(value, up=up)
        if bound is None:
            raise beyond(where, _shown(value), f"stay within +-{numbers.LARGEST}")
        if bound != value:
            self.remarks.append(f"{where} is enforced as {bound}")
        return bound

    def _multiple(self, value: Any, place: str) -> Decimal:
        if not numbers.is_number(value) or not value > 0:
            raise wrong(place, f"a number above 0, not {_shown(value)}")
        found = numbers.multiple(value) if value <= numbers.MAX_MULTIPLE else None
        if found is not None:
            self._multiples.add(found.normalize())
        # They may all come to bear on one number: it is then a multiple of what they have in common.
        product = 1
        smallest = min((int(item.as_tuple().exponent) for item in self._multiples), default=0)
        for item in self._multiples:
            product *= int(item.scaleb(-min(0, smallest)))
        if found is None or product > numbers.MAX_MULTIPLE:
            what = _shown(value) if found is None else "too many different numbers"
            raise beyond(place, what, f"use whole numbers and simple fractions, up to {numbers.MAX_MULTIPLE:,} in all")
        return found.normalize()

    def check_least_properties(self, plain: dict[str, Any], place: str) -> None:
        """Free names may come twice, so that only one of them is certain to count."""
        least = plain.get("minProperties", 0)
        if least - len(plain.get("required", ())) > 1:
            self.drop(inside(place, "minProperties"), "beyond the required properties and one more")
            del plain["minProperties"]

    def constant(self, value: Any, place: str) -> Any:
        if isinstance(value, str):
            self.text(value, place)
        elif isinstance(value, list):
            return [self.constant(item, place) for item in value]
        elif isinstance(value, dict):
            for name in value:
                self.text(name, place)
            return {name: self.constant(item, place) for name, item in value.items()}
        elif numbers.is_number(value):
            number = numbers.exact(value)
            if number is None:
                raise beyond(place, _shown(value), "make it a text, or use a number with fewer digits")
            return number
        return value

    def text(self, text: str, place: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise GrammarError(f"the JSON schema has text that is not valid Unicode at {place}", "correct it") from None
        if found := _UNWRITABLE.search(text):
            raise beyond(place, f"the control character U+{ord(found.group()):04X}", "leave it out")

    def drop(self, place: str, what: str = "") -> None:
        """Refuse a keyword that cannot be enforced, or leave it out."""
        shown = f"{place}, {what}," if what else place
        if not self._lenient:
            raise GrammarError(f"the JSON schema asks for what cannot be enforced: {shown.rstrip(',')}", _LENIENT)
        self.remarks.append(f"{shown} is not enforced")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:76]}..."


def wrong(place: str, wanted: str) -> GrammarError:
    return GrammarError(f"the JSON schema is wrong at {place}: it should be {wanted}", "correct it")


def beyond(place: str, what: str, hint: str) -> GrammarError:
    return GrammarError(f"the JSON schema goes beyond what can be enforced at {place}: {what}", hint)
