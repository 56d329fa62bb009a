"""Tools: the functions that a model may call, as OpenAI's clients describe them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from abcli.chat.files import read_text_file
from abcli.chat.message_format import read_text, shown
from abcli.chat.messages import Tool
from abcli.errors import PromptError

MAX_TOOLS = 512
MAX_FILE_BYTES = 4 * 1024 * 1024
_EXAMPLE = '{"type": "function", "function": {"name": "...", "description": "...", "parameters": {...}}}'
# What every family's way to write a call can carry.
_NAME = re.compile(r"[A-Za-z0-9_.:/-]{1,128}")
# Of JSON Schema: what only people read, what holds plain values, what holds schemas by names that are not its own.
_NOTES = frozenset(("description", "title", "default", "example", "examples", "$comment", "deprecated"))
_VALUES = frozenset(("enum", "const", "required"))
_NAMED = frozenset(("properties", "patternProperties", "dependentSchemas", "$defs", "definitions"))
# In a request they say something else.
_CHOICES = ("auto", "none", "required")


def read_tools(value: Any) -> tuple[Tool, ...]:
    """A JSON list of tools, or an object with one as "tools". Raises PromptError with the place of what is wrong."""
    if isinstance(value, Mapping) and "tools" in value:
        value = value["tools"]
    if not isinstance(value, list):
        raise PromptError(f"tools is {shown(value)}", f"write [{_EXAMPLE}]")
    return checked([read_tool(item, f"tools[{number}]") for number, item in enumerate(value)])


def read_tools_file(path: Path) -> tuple[Tool, ...]:
    """The tools in a JSON file. Raises PromptError that names the file and the place."""
    text = read_text_file(path, MAX_FILE_BYTES)
    try:
        tools = read_tools(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path} is not JSON: {error}", f"write [{_EXAMPLE}]") from None
    except PromptError as error:
        raise PromptError(f"{path}: {error.message}", error.hint) from None
    if not tools:
        raise PromptError(f"{path} has no tools", f"write [{_EXAMPLE}]")
    return tools


def checked(tools: list[Tool]) -> tuple[Tool, ...]:
    """`tools`, with names that can be used, each once. Raises PromptError that names the one that has not."""
    if len(tools) > MAX_TOOLS:
        raise PromptError(f"there are {len(tools):,} tools", f"give at most {MAX_TOOLS}")
    places: dict[str, int] = {}
    for number, tool in enumerate(tools):
        place = f"tools[{number}]"
        if not is_name(tool.name):
            raise PromptError(
                f"{place} cannot have the name {shown(tool.name)}",
                f"use 1 to 128 letters, digits and _.:/- in a name, other than {', '.join(_CHOICES)}",
            )
        first = places.setdefault(tool.name, number)
        if first != number:
            raise PromptError(f"{place} has the name {shown(tool.name)}, as tools[{first}] has", "rename one of them")
    return tuple(tools)


def is_name(text: str) -> bool:
    """Whether a tool may be called so."""
    return bool(_NAME.fullmatch(text)) and text not in _CHOICES


def read_tool(value: Any, place: str) -> Tool:
    """A tool from JSON: OpenAI's form, or the function in it alone. Raises PromptError with the place."""
    if not isinstance(value, Mapping):
        raise PromptError(f"{place} is {shown(value)}", f"write {_EXAMPLE}")
    function = value
    if "function" in value or value.get("type") == "function":
        kind = value.get("type", "function")
        if kind != "function":
            raise PromptError(f"{place}.type is {shown(kind)}", 'only "function" is possible')
        inner, place = value.get("function"), f"{place}.function"
        if not isinstance(inner, Mapping):
            raise PromptError(f"{place} is {shown(inner)}", f"write {_EXAMPLE}")
        function = inner
    description = function.get("description")
    return Tool(
        read_text(function.get("name"), f"{place}.name"),
        "" if description is None else read_text(description, f"{place}.description"),
        _parameters(function.get("parameters"), f"{place}.parameters"),
    )


def _parameters(value: Any, place: str) -> Mapping[str, Any]:
    if value is None:
        return Tool("").parameters
    if not isinstance(value, Mapping):
        raise PromptError(f"{place} is {shown(value)}", "make it the JSON Schema of an object")
    kind = value.get("type", "object")
    if kind != "object":
        raise PromptError(f"{place}.type is {shown(kind)}", 'arguments are an object: write "type": "object"')
    if not isinstance(value.get("properties", {}), Mapping):
        raise PromptError(f"{place}.properties is {shown(value['properties'])}", "make it an object of schemas")
    try:
        # What is not JSON would fail later, in a template; and the caller may change what is theirs.
        whole: dict[str, Any] = json.loads(read_text(json.dumps(dict(value), ensure_ascii=False), place))
    except (TypeError, ValueError, RecursionError) as error:
        raise PromptError(f"{place} is not JSON: {error}", "make it the JSON Schema of an object") from None
    return {"type": "object", "properties": {}, **whole}


def without_notes(tool: Tool) -> Tool:
    """`tool` with what says nothing about the form of its arguments left out: a grammar of many tools gets long."""
    return Tool(tool.name, "", _without_notes(tool.parameters, are_schemas=False))


def _without_notes(value: Any, *, are_schemas: bool) -> Any:
    """A schema without notes, or with `are_schemas` an object whose members, of any name, are schemas."""
    if isinstance(value, list):
        return [_without_notes(item, are_schemas=False) for item in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: item
        if key in _VALUES and not are_schemas
        else _without_notes(item, are_schemas=key in _NAMED and not are_schemas)
        for key, item in value.items()
        if are_schemas or key not in _NOTES
    }
