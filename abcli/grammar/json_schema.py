"""JSON Schema (2020-12, with what older drafts and OpenAPI say otherwise), checked and rewritten for llguidance.

What llguidance cannot enforce, or enforces wrongly, does not get through: it is refused with its place, or left out
with a remark where the caller is lenient. Limits keep the cost of compiling what does get through within bounds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from abcli.errors import GrammarError
from abcli.grammar.disjoint import PREFIX, are_disjoint
from abcli.grammar.endless import remove_endless
from abcli.grammar.references import References, Target, base_of, inside
from abcli.grammar.schema_keywords import Keywords, beyond, wrong

MAX_CHARACTERS = 1 << 18
MAX_DEPTH = 64
MAX_PROPERTIES = 2_000  # of one object; llguidance compares each with all others
MAX_ALL_PROPERTIES = 5_000
MAX_PATTERN_PROPERTIES = 64

# These say nothing where their value is as given, and cannot be enforced elsewhere.
_UNENFORCED: dict[str, tuple[Any, ...]] = {
    "not": (False,),
    "contains": (),
    "uniqueItems": (False,),
    "propertyNames": (True, {}),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "dependencies": ({},),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "$dynamicRef": (),
    "$recursiveRef": (),
}
_APPLICATORS = ("const", "enum", "allOf", "anyOf", "oneOf", "$ref")


@dataclass
class Schema:
    """A schema as llguidance gets it; the definitions are what `#/$defs/NAME` means in it."""

    root: Any
    definitions: dict[str, Any]
    places: dict[int, str]
    remarks: tuple[str, ...]

    def alone(self, part: Any) -> Any:
        """A part of the schema as one that stands by itself."""
        return {"$defs": self.definitions, **part} if self.definitions and isinstance(part, dict) else part


def translate(text: str, *, lenient: bool = False) -> Schema:
    """Check and rewrite a JSON schema.

    Raises GrammarError, with the place, for what is no schema, cannot be enforced, or goes beyond a limit. `lenient`
    leaves out what cannot be enforced; the remarks say so.
    """
    return _Translator(_parsed(text), lenient).translate()


def _parsed(text: str) -> Any:
    if len(text) > MAX_CHARACTERS:
        raise GrammarError(f"the JSON schema has {len(text):,} characters", f"at most {MAX_CHARACTERS:,} are allowed")
    try:
        schema = json.loads(text, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise GrammarError(
            f"the JSON schema is not JSON: {error.msg} in line {error.lineno}, column {error.colno}",
            "correct it; a file is given with `json_schema_file`, not as text",
        ) from None
    except RecursionError:
        raise GrammarError("the JSON schema cannot be read: it nests too deep", "use $defs and $ref") from None
    except ValueError as error:
        raise GrammarError(f"the JSON schema cannot be read: {str(error)[:100]}", "simplify it") from None
    if schema is False:
        raise GrammarError("the JSON schema allows nothing: it is false", "write what it should allow")
    if not isinstance(schema, dict | bool):
        raise GrammarError("the JSON schema is not an object", 'write one like {"type": "object"}')
    return schema


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _check_depth(root: Any) -> None:
    level, depth = [root], 0
    while level:
        if depth > 2 * MAX_DEPTH:
            raise GrammarError(f"the JSON schema nests more than {2 * MAX_DEPTH} deep", "use $defs and $ref")
        inner = [list(value.values()) if isinstance(value, dict) else value for value in level]
        level = [item for value in inner if isinstance(value, list) for item in value]
        depth += 1


@dataclass
class _Choice:
    """A `oneOf` that is taken for an `anyOf`, if its options exclude each other."""

    options: list[Any]
    place: str


class _Translator:
    def __init__(self, root: Any, lenient: bool) -> None:
        self._root = root
        _check_depth(root)
        self._references = References(root)
        self._names: dict[int, str] = {}
        self._waiting: list[tuple[str, Target]] = []
        self._definitions: dict[str, Any] = {}
        self._choices: list[_Choice] = []
        self._places: dict[int, str] = {}
        self._keywords = Keywords(lenient)
        self._properties_count = 0
        self._property_pairs = 0
        self._pattern_properties = 0

    def translate(self) -> Schema:
        root = self._schema(self._root, "$", "", MAX_DEPTH)
        while self._waiting:
            name, target = self._waiting.pop()
            self._definitions[name] = self._schema(target.schema, target.place, target.base, MAX_DEPTH)
        for choice in self._choices:
            if not are_disjoint(choice.options, self._definitions):
                self._keywords.drop(choice.place, "where more than one of its schemas may match")
        if not remove_endless(root, self._definitions):
            raise GrammarError("the JSON schema allows no answer that ends", "make a part that repeats itself optional")
        return Schema(root, self._definitions, self._places, tuple(dict.fromkeys(self._keywords.remarks)))

    def _schema(self, node: Any, place: str, base: str, depth: int) -> Any:
        if isinstance(node, bool):
            return {} if node else False
        if not isinstance(node, dict):
            raise wrong(place, "a schema")
        if depth == 0:
            raise GrammarError(f"the JSON schema nests more than {MAX_DEPTH} deep at {place}", "use $defs and $ref")
        base = base_of(node, base)
        plain: dict[str, Any] = {}
        applied: list[tuple[str, Any]] = []
        # In the order of the text, as the order of properties depends on it; the plain keywords are kept together,
        # where `properties` stands, since llguidance reads each group of them by itself.
        position = 0
        for key, value in node.items():
            where = inside(place, key)
            if key in _APPLICATORS:
                applied += self._apply(key, value, where, base, depth - 1)
                continue
            if key == "properties":
                position = len(applied)
            found = self._plain(key, value, where, base, depth - 1)
            plain |= {} if found is None else {key: found}
        if "if" in node and ("then" in node or "else" in node):
            self._keywords.drop(inside(place, "if"))
        plain |= self._items(node, place, base, depth - 1)
        bounds, alternatives = self._keywords.numbers(node, place)
        plain |= bounds
        applied += alternatives + self._keywords.format(node, place)
        self._keywords.check_least_properties(plain, place)
        return self._finished(node, place, plain, applied, position)

    def _plain(self, key: str, value: Any, place: str, base: str, depth: int) -> Any:
        """What a keyword that concerns one type becomes, None if it says nothing."""
        if key == "properties":
            return self._properties(value, place, base, depth)
        if key == "patternProperties":
            return self._named_by_pattern(value, place, base, depth)
        if key == "additionalProperties":
            return self._schema(value, place, base, depth)
        if key in self._keywords.checks:
            return self._keywords.checks[key](value, place)
        if key in _UNENFORCED and not any(_same(value, harmless) for harmless in _UNENFORCED[key]):
            self._keywords.drop(place)
        return None

    def _finished(
        self, node: dict[str, Any], place: str, plain: dict[str, Any], applied: list[tuple[str, Any]], position: int
    ) -> dict[str, Any]:
        copy: dict[str, Any] = {}
        rest: list[Any] = []
        for key, value in [*applied[:position], *plain.items(), *applied[position:]]:
            if key == "allOf":
                copy.setdefault("allOf", []).extend(value)
            elif key in copy:
                rest.append({key: value})
            else:
                copy[key] = value
        if rest:
            copy.setdefault("allOf", []).extend(rest)
        if node.get("nullable") is True:
            copy = {"anyOf": [copy, {"type": "null"}]}
        self._places[id(copy)] = place
        return copy

    def _apply(self, key: str, value: Any, place: str, base: str, depth: int) -> list[tuple[str, Any]]:
        if key == "const":
            return [(key, self._keywords.constant(value, place))]
        if key == "enum":
            if not isinstance(value, list):
                raise wrong(place, "a list of values")
            return [(key, [self._keywords.constant(item, inside(place, index)) for index, item in enumerate(value)])]
        if key == "$ref":
            return [(key, self._reference(value, place, base))]
        if not isinstance(value, list) or not value:
            raise wrong(place, "a list of schemas")
        options = [self._schema(item, inside(place, index), base, depth) for index, item in enumerate(value)]
        if key == "oneOf" and len(options) > 1:
            self._choices.append(_Choice(options, place))
        return [("allOf", options) if key == "allOf" else ("anyOf", options)]

    def _reference(self, value: Any, place: str, base: str) -> str:
        if not isinstance(value, str):
            raise wrong(place, "a text")
        target = self._references.find(value, base, place)
        seen: set[int] = set()
        # A schema that is nothing but a reference stands for what it refers to: chains take no room.
        while isinstance(target.schema, dict) and set(target.schema) == {"$ref"} and target.schema["$ref"] != "":
            if id(target.schema) in seen or not isinstance(target.schema["$ref"], str):
                raise GrammarError(f"the JSON schema refers to itself without an end at {place}", "define it")
            seen.add(id(target.schema))
            target = self._references.find(target.schema["$ref"], target.base, target.place)
        identity = id(target.schema) if isinstance(target.schema, dict) else -int(target.schema) - 1
        if identity not in self._names:
            self._names[identity] = str(len(self._names))
            self._waiting.append((self._names[identity], target))
        return PREFIX + self._names[identity]

    def _properties(self, value: Any, place: str, base: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(place, "an object of schemas")
        self._properties_count += len(value)
        self._property_pairs += len(value) ** 2
        if self._property_pairs > MAX_PROPERTIES**2 or self._properties_count > MAX_ALL_PROPERTIES:
            raise beyond(place, f"{len(value):,} properties, or too many in all", "use additionalProperties")
        copy = {}
        for name, schema in value.items():
            where = inside(place, name)
            self._keywords.text(name, where)
            copy[name] = self._schema(schema, where, base, depth)
        return copy

    def _named_by_pattern(self, value: Any, place: str, base: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(place, "an object of schemas")
        self._pattern_properties += len(value)
        if self._pattern_properties > MAX_PATTERN_PROPERTIES:
            raise beyond(place, f"more than {MAX_PATTERN_PROPERTIES} patternProperties", "join some of them")
        copy = {}
        for pattern, schema in value.items():
            where = inside(place, pattern)
            translated = self._keywords.pattern(pattern, where)
            if translated is not None:
                copy[translated] = self._schema(schema, where, base, depth)
        return copy

    def _items(self, node: dict[str, Any], place: str, base: str, depth: int) -> dict[str, Any]:
        """`prefixItems` and `items`, which older drafts call `items` and `additionalItems`."""
        key, rest = ("items", "additionalItems") if isinstance(node.get("items"), list) else ("prefixItems", "items")
        copy: dict[str, Any] = {}
        if key in node:
            if not isinstance(node[key], list):
                raise wrong(inside(place, key), "a list of schemas")
            where = inside(place, key)
            copy["prefixItems"] = [
                self._schema(item, inside(where, index), base, depth) for index, item in enumerate(node[key])
            ]
        if rest in node:
            copy["items"] = self._schema(node[rest], inside(place, rest), base, depth)
        return copy


def _same(value: Any, other: Any) -> bool:
    return type(value) is type(other) and bool(value == other)
