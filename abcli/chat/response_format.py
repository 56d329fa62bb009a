"""OpenAI's `response_format`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abcli.chat.message_format import shown
from abcli.errors import UsageError

_KINDS = ("text", "json_object", "json_schema")


def response_schema(value: Any) -> dict[str, Any] | bool | None:
    """The JSON schema that a `response_format` asks for, None for free text.

    As OpenAI's clients write it, or llama.cpp's: the schema may stand beside the type. Raises UsageError.
    """
    form = value if isinstance(value, Mapping) else {"type": value or "text"}
    kind = form.get("type") or "text"
    if kind not in _KINDS:
        raise _wrong("response_format.type", kind, f"make it one of {', '.join(_KINDS)}")
    if kind == "text":
        return None
    inner = form.get("json_schema") if kind == "json_schema" else None
    schema = inner["schema"] if isinstance(inner, Mapping) and "schema" in inner else form.get("schema")
    if kind == "json_object" and schema in (None, {}):
        return {"type": "object"}
    if not isinstance(schema, dict | bool):
        raise _wrong("response_format.json_schema.schema", schema, "make it a JSON schema")
    return schema


def _wrong(place: str, value: Any, hint: str) -> UsageError:
    return UsageError(f"`{place}` is {shown(value)}", hint, setting=place)
