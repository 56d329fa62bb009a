"""Whether two JSON schemas can be shown to have no value in common: then `oneOf` of them means `anyOf`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from abcli.grammar.numbers import is_number

# A number may be an integer; every other value has one of these types alone.
TYPES = ("object", "array", "string", "number", "boolean", "null")
PREFIX = "#/$defs/"
_MAX_COMPARISONS = 50_000
_MAX_DEPTH = 12


@dataclass
class _View:
    """What is certain of every value that a schema allows."""

    types: set[str] = field(default_factory=lambda: set(TYPES))
    values: list[Any] | None = None
    required: set[str] = field(default_factory=set)
    properties: dict[str, list[Any]] = field(default_factory=dict)
    closed: set[str] | None = None  # the names that are possible, None for any
    choices: list[Sequence[Any]] = field(default_factory=list)
    least: float = float("-inf")
    most: float = float("inf")
    impossible: bool = False


def are_disjoint(schemas: Sequence[Any], definitions: Mapping[str, Any]) -> bool:
    """Whether no value is allowed by two of the schemas, as far as it can be shown with a bounded effort.

    References are `#/$defs/NAME` with the NAME in `definitions`.
    """
    return _Comparison(definitions).all(schemas)


class _Comparison:
    def __init__(self, definitions: Mapping[str, Any]) -> None:
        self._definitions = definitions
        self._left = _MAX_COMPARISONS

    def all(self, schemas: Sequence[Any]) -> bool:
        views = [self._view(schema) for schema in schemas]
        if self._discriminated(views):
            return True
        return all(self._disjoint(one, other, 0) for index, one in enumerate(views) for other in views[index + 1 :])

    def _discriminated(self, views: Sequence[_View]) -> bool:
        """Whether one required property tells the schemas apart by its value: many of them cost no comparison."""
        if not all(view.types == {"object"} for view in views):
            return False
        for name in set.intersection(*(view.required for view in views)) if views else ():
            seen: set[str] = set()
            for view in views:
                values = self._conjunction(view.properties.get(name, ())).values
                keys = {repr(_key(value)) for value in values or ()}
                if not keys or keys & seen:
                    break
                seen |= keys
            else:
                return True
        return False

    def _conjunction(self, schemas: Sequence[Any]) -> _View:
        view = _View()
        for schema in schemas:
            self._add(view, schema, 0)
        return view

    def _view(self, schema: Any) -> _View:
        return self._conjunction((schema,))

    def _add(self, view: _View, schema: Any, depth: int) -> None:
        if schema is False:
            view.impossible = True
        if not isinstance(schema, dict) or depth > _MAX_DEPTH:
            return
        if "type" in schema:
            given = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
            view.types &= {"number" if name == "integer" else name for name in given}
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        if values is not None:
            view.types &= {_type(value) for value in values}
            view.values = values if view.values is None or len(values) < len(view.values) else view.values
        view.required |= set(schema.get("required", ()))
        for name, inner in schema.get("properties", {}).items():
            view.properties.setdefault(name, []).append(inner)
        if schema.get("additionalProperties") is False and "patternProperties" not in schema:
            names = set(schema.get("properties", ()))
            view.closed = names if view.closed is None else view.closed & names
        view.least = max(view.least, schema.get("minimum", view.least), schema.get("exclusiveMinimum", view.least))
        view.most = min(view.most, schema.get("maximum", view.most), schema.get("exclusiveMaximum", view.most))
        if "$ref" in schema:
            self._add(view, self._definitions[schema["$ref"].removeprefix(PREFIX)], depth + 1)
        for inner in schema.get("allOf", ()):
            self._add(view, inner, depth + 1)
        view.choices += [schema[key] for key in ("anyOf", "oneOf") if key in schema]

    def _disjoint(self, one: _View, other: _View, depth: int) -> bool:
        self._left -= 1
        if self._left < 0 or depth > _MAX_DEPTH:
            return False
        if one.impossible or other.impossible:
            return True
        shared = one.types & other.types
        if one.values is not None and other.values is not None:
            keys = [repr(_key(value)) for value in other.values]
            if not any(repr(_key(value)) in keys for value in one.values):
                return True
        if all(self._type_disjoint(name, one, other, depth) for name in shared):
            return True
        for view, against in ((one, other), (other, one)):
            for choice in view.choices:
                if all(self._disjoint(self._view(option), against, depth + 1) for option in choice):
                    return True
        return False

    def _type_disjoint(self, name: str, one: _View, other: _View, depth: int) -> bool:
        """Whether no value of a type that both may have is allowed by both."""
        if name == "number":
            return one.most < other.least or other.most < one.least
        if name != "object":
            return False
        for key in one.required | other.required:
            if any(view.closed is not None and key not in view.closed for view in (one, other)):
                return True
            inner = [view.properties.get(key) for view in (one, other)]
            if inner[0] and inner[1]:
                left, right = self._conjunction(inner[0]), self._conjunction(inner[1])
                if self._disjoint(left, right, depth + 1):
                    return True
        return False


def _type(value: Any) -> str:
    if isinstance(value, bool):
        return "boolean"
    if value is None:
        return "null"
    if isinstance(value, str):
        return "string"
    return "object" if isinstance(value, dict) else "array" if isinstance(value, list) else "number"


def _key(value: Any) -> Any:
    """What equal JSON values have in common, and unequal ones do not: true is not 1, 1.0 is."""
    if isinstance(value, list):
        return [_key(item) for item in value]
    if isinstance(value, dict):
        return sorted((name, repr(_key(item))) for name, item in value.items())
    return float(value) if is_number(value) else (type(value).__name__, value)
