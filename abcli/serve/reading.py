"""Values of requests, read with errors that name the field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from abcli.serve.fields import wrong


def read_object(value: Any, place: str) -> Mapping[str, Any]:
    """A JSON object. Raises UsageError."""
    if not isinstance(value, Mapping):
        raise wrong(place, value, "make it an object")
    return value


def read_list(value: Any, place: str) -> Sequence[Any]:
    """A JSON list, empty where there is none. Raises UsageError."""
    if value is None:
        return ()
    if not isinstance(value, list):
        raise wrong(place, value, "make it a list")
    return value


def read_string(value: Any, place: str) -> str:
    """A text. Raises UsageError."""
    if not isinstance(value, str):
        raise wrong(place, value, "make it a text")
    return value


def read_texts(value: Any, place: str, fields: Mapping[str, str]) -> list[dict[str, str]]:
    """A text, or a list of parts of the types in `fields`, which tell where their text stands, as a chat's text parts.

    Raises UsageError.
    """
    if isinstance(value, str):
        return [text_part(value)]
    if not isinstance(value, list):
        raise wrong(place, value, "make it a text or a list of parts")
    return [read_text_part(part, f"{place}[{number}]", fields) for number, part in enumerate(value)]


def read_text_part(value: Any, place: str, fields: Mapping[str, str]) -> dict[str, str]:
    """One of the parts of `read_texts`."""
    part = read_object(value, place)
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in fields:
        raise wrong(f"{place}.type", kind, f"only text can be read here: use {' or '.join(dict.fromkeys(fields))}")
    return text_part(read_string(part.get(fields[kind]), f"{place}.{fields[kind]}"))


def text_part(text: str) -> dict[str, str]:
    """A part of a chat message's content."""
    return {"type": "text", "text": text}


def function_call(identifier: str, name: str, arguments: str) -> dict[str, Any]:
    """A call of a tool as chat messages have it."""
    return {"id": identifier, "type": "function", "function": {"name": name, "arguments": arguments}}


def chat_tool(tool: Mapping[str, Any], parameters: str) -> dict[str, Any]:
    """A tool as chat requests have it; `parameters` is the name that its schema has in `tool`."""
    function = {"name": tool.get("name"), "description": tool.get("description"), "parameters": tool.get(parameters)}
    return {"type": "function", "function": function}
