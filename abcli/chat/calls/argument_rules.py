"""What a grammar says about arguments that are not written as one JSON object.

Types, names, what is required and enumerations are enforced in all notations; lengths, patterns and bounds only of
what is written as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from abcli.chat.calls.format import CallFormat, Tags
from abcli.chat.calls.rules import Rules
from abcli.chat.calls.values import DEEPEST, resolved, types_of
from abcli.chat.messages import Tool

_OTHERS = ("number", "integer", "boolean", "null", "array", "object")
_KIND_OF = {"integer": "number"}


class ArgumentRules:
    """Rules for the arguments of tools in one format."""

    def __init__(self, form: CallFormat, rules: Rules) -> None:
        self._form = form
        self._rules = rules
        self._root: Mapping[str, Any] = {}

    def of(self, tool: Tool) -> str:
        """The arguments of a tool, from the first one's key on."""
        self._root = tool.parameters
        if self._form.tags:
            return self._tags(self._form.tags, tool.parameters, DEEPEST)
        separator = ", " if self._form.notation == "python" else ","
        return self._rules.listed(self._members(tool.parameters, DEEPEST), separator)

    def _fields(self, schema: Any) -> list[tuple[str, Any, bool]]:
        """(key, schema, whether it is required) of an object's properties."""
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        required = schema.get("required") or () if isinstance(schema, Mapping) else ()
        if not isinstance(properties, Mapping):
            return []
        return [(key, resolved(value, self._root), key in required) for key, value in properties.items()]

    def _json(self, schema: Any, **changes: Any) -> str:
        definitions = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
        whole = {**definitions, **(schema if isinstance(schema, Mapping) else {}), **changes}
        return f"%json {json.dumps(whole, ensure_ascii=False)}"

    def _others(self, schema: Any) -> list[str]:
        """The types that a value may have besides a text."""
        types = types_of(schema)
        return [kind for kind in types if kind != "string"] if types else list(_OTHERS)

    def _choices(self, schema: Any) -> list[str] | None:
        """The only texts that are allowed, None where there is no such list."""
        if not isinstance(schema, Mapping):
            return None
        if isinstance(schema.get("const"), str):
            return [schema["const"]]
        values = schema.get("enum")
        return [item for item in values if isinstance(item, str)] if isinstance(values, list) else None

    def _may_be_text(self, schema: Any) -> bool:
        types = types_of(schema)
        return not types or "string" in types

    # Tags.

    def _tags(self, tags: Tags, schema: Any, depth: int) -> str:
        found = []
        for key, value, required in self._fields(schema):
            begin = self._rules.written(tags.key_begin + key + tags.key_end)
            item = self._rules.rule(f"{begin} ({self._tagged(tags, key, value, depth)})")
            found.append(item if required else f"{item}?")
        return " ".join(found)

    def _tagged(self, tags: Tags, key: str, schema: Any, depth: int) -> str:
        """A value and its end."""
        rules, end, options = self._rules, tags.end_of(key), []
        if self._may_be_text(schema):
            kind = self._kind(tags, "string")
            choices = self._choices(schema)
            texts = [rules.until(end)] if choices is None else [rules.written(text + end) for text in choices]
            options += [f"{kind} {text}" for text in texts]
        if not options or (tags.kinds and types_of(schema)):
            options += self._tagged_others(tags, schema, end, depth)
        return " | ".join(options)

    def _tagged_others(self, tags: Tags, schema: Any, end: str, depth: int) -> list[str]:
        closed = self._rules.written(end)
        if tags.nested and depth and "object" in self._others(schema) and self._fields(schema):
            return [f"{self._tags(tags, schema, depth - 1)} {closed}"]
        if tags.nested and depth and "array" in self._others(schema):
            item = resolved(schema.get("items"), self._root) if isinstance(schema, Mapping) else None
            begin = self._rules.written(f"{tags.key_begin}item{tags.key_end}")
            return [f"({begin} ({self._tagged(tags, 'item', item, depth - 1)}))* {closed}"]
        if not tags.kinds:
            return [f"{self._json(schema)} {closed}"]
        return [f"{self._kind(tags, kind)} {self._json(schema, type=kind)} {closed}" for kind in self._others(schema)]

    def _kind(self, tags: Tags, kind: str) -> str:
        """What says that a value is of a type, if the format does."""
        words = dict(tags.kinds)
        word = words.get(_KIND_OF.get(kind, kind), kind)
        return self._rules.written(word + tags.kind_end) if words else ""

    # Notations of their own.

    def _members(self, schema: Any, depth: int) -> list[tuple[str, bool]]:
        python = self._form.notation == "python"
        fields = self._fields(schema)
        if not python:
            # Gemma's template sorts them.
            fields.sort(key=lambda field: field[0].lower())
        return [
            (f"{self._rules.written(key + ('=' if python else ':'))} ({self._value(value, depth)})", required)
            for key, value, required in fields
        ]

    def _value(self, schema: Any, depth: int) -> str:
        types = types_of(schema) or ["string", *_OTHERS]
        write = self._python if self._form.notation == "python" else self._gemma
        return " | ".join(write(kind, schema, depth) for kind in types)

    def _python(self, kind: str, schema: Any, _depth: int) -> str:
        if kind == "string":
            choices = self._choices(schema)
            if choices is None:
                return r"""/'([^'\\\n]|\\.)*'/"""
            return " | ".join(self._rules.written(repr(text)) for text in choices)
        plain = {"boolean": '"True" | "False"', "null": '"None"'}
        return plain.get(kind) or self._json(schema, type=kind)

    def _gemma(self, kind: str, schema: Any, depth: int) -> str:
        rules = self._rules
        if kind == "string":
            choices, quote = self._choices(schema), self._form.quote
            if choices is None:
                return f"{rules.written(quote)} {rules.until(quote)}"
            return " | ".join(rules.written(f"{quote}{text}{quote}") for text in choices)
        if kind not in ("array", "object"):
            return self._json(schema, type=kind)
        if not depth:
            return '"[" "]"' if kind == "array" else '"{" "}"'
        if kind == "array":
            items = schema.get("items") if isinstance(schema, Mapping) else None
            item = rules.rule(self._value(resolved(items, self._root), depth - 1))
            return f'"[" ({item} ("," {item})*)? "]"'
        return f'"{{" {rules.listed(self._members(schema, depth - 1), ",")} "}}"'
