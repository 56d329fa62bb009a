"""Arguments that are written without JSON's quotes, as the JSON values that a schema says they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from abcli.chat.calls.literals import python_json
from abcli.chat.calls.source import NotACallError

DEEPEST = 8
"""How deep values nest whose members' schemas are looked at."""


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """What a schema that refers to a part of `root` means; others as they are, and what cannot be found."""
    for _ in range(DEEPEST):
        reference = schema.get("$ref") if isinstance(schema, Mapping) else None
        if not isinstance(reference, str) or not reference.startswith("#/"):
            break
        found: Any = root
        for key in reference[2:].split("/"):
            found = found.get(key.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
        if found is None:
            break
        schema = found
    return schema


def is_text(schema: Any) -> bool:
    """Whether a schema allows nothing but texts."""
    if not isinstance(schema, Mapping):
        return False
    if isinstance(schema.get("enum"), list):
        return all(isinstance(item, str) for item in schema["enum"])
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list) and schema[key]:
            return all(map(is_text, schema[key]))
    return schema.get("type") in ("string", ["string"]) or isinstance(schema.get("const"), str)


def value_text(written: str, schema: Any, *, text: bool | None = None) -> str:
    """The JSON of a value as it was written; `text` if the format tells whether it is one.

    Where the schema allows more than texts, what is JSON is what it means, unless the schema has no room for it.
    """
    if text or (text is None and is_text(schema)):
        return json.dumps(written, ensure_ascii=False)
    plain = written.strip()
    try:
        value = python_json(plain)
    except NotACallError:
        return json.dumps(written, ensure_ascii=False)
    allowed = text is False or _allows(schema, json.loads(value))
    return value if allowed else json.dumps(written, ensure_ascii=False)


_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def _allows(schema: Any, value: Any) -> bool:
    """Whether a schema may allow values of this type; a number that may be a text is one."""
    types = types_of(schema)
    if not types:
        return not isinstance(value, str)
    return any(
        isinstance(value, _TYPES.get(name, ())) and (name == "boolean") == isinstance(value, bool) for name in types
    )


def types_of(schema: Any) -> list[str]:
    """The types that a schema names, none if it leaves them open."""
    if not isinstance(schema, Mapping):
        return []
    if "type" not in schema and is_text(schema):
        return ["string"]
    found = schema.get("type", [])
    types = [found] if isinstance(found, str) else list(found) if isinstance(found, list) else []
    for key in ("anyOf", "oneOf"):
        for option in schema.get(key) or ():
            types += types_of(option)
    return types
