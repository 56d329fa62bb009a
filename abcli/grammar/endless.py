"""Schemas that no finite value satisfies, such as an object that requires another one of its own kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abcli.grammar.disjoint import PREFIX, TYPES

_MAX_PASSES = 64  # schemas that need more are built to need them


def remove_endless(root: Any, definitions: dict[str, Any]) -> bool:
    """Replace definitions that only endless values satisfy by `false`; whether `root` allows a finite one.

    A definition counts as finite once one of its values is built of definitions that do.
    """
    finite: set[str] = set()
    names = list(definitions)
    for _ in range(_MAX_PASSES):
        names.reverse()  # what comes late is often what the others are built of
        found = [name for name in names if name not in finite and _note(name, finite, definitions)]
        if not found:
            break
    else:
        return True
    for name in definitions.keys() - finite:
        definitions[name] = False
    return _is_finite(root, finite)


def _note(name: str, finite: set[str], definitions: Mapping[str, Any]) -> bool:
    if not _is_finite(definitions[name], finite):
        return False
    finite.add(name)
    return True


def _is_finite(schema: Any, finite: set[str]) -> bool:
    if not isinstance(schema, dict):
        return schema is not False
    if "$ref" in schema and schema["$ref"].removeprefix(PREFIX) not in finite:
        return False
    if not all(_is_finite(inner, finite) for inner in schema.get("allOf", ())):
        return False
    if "anyOf" in schema and not any(_is_finite(inner, finite) for inner in schema["anyOf"]):
        return False
    if "const" in schema or "enum" in schema:
        return True
    given = schema.get("type", TYPES)
    for name in [given] if isinstance(given, str) else given:
        if name == "object":
            other = None if "patternProperties" in schema else schema.get("additionalProperties")
            members = [schema.get("properties", {}).get(key, other) for key in schema.get("required", ())]
        elif name == "array":
            prefix, count = schema.get("prefixItems", []), schema.get("minItems", 0)
            members = [*prefix[:count], *([schema.get("items")] if count > len(prefix) else [])]
        else:
            return True
        if all(_is_finite(inner, finite) for inner in members):
            return True
    return False
