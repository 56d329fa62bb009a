"""Python functions as tools: the schema of their arguments from type hints, descriptions from docstrings."""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias, Union, get_args, get_origin

from abcli.chat.messages import Tool
from abcli.chat.tools import checked, read_tool
from abcli.errors import PromptError

_PLAIN: dict[Any, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    type(None): {"type": "null"},
    Any: {},
    inspect.Parameter.empty: {},
}
_MAX_NESTING = 16
# Google's style, and reStructuredText's.
_SECTION = re.compile(r"^(\w[\w ]*):\s*$")
_GOOGLE = re.compile(r"^\*{0,2}(\w+)\s*(?:\([^)]*\))?\s*:\s*(.*)$")
_PARAMETER_SECTIONS = ("args", "arguments", "parameters")
_FIELD = re.compile(r"^:param(?:\s+[^:]+?)?\s+\*{0,2}(\w+)\s*:\s*(.*)$")

ToolLike: TypeAlias = "Tool | Mapping[str, Any] | Callable[..., Any]"
"""A tool, one as OpenAI's clients write it, or a Python function with type hints."""


def as_tools(tools: Iterable[ToolLike]) -> tuple[Tool, ...]:
    """Tools from what the library's callers give. Raises PromptError that names the one that cannot be used."""
    found: list[Tool] = []
    for number, item in enumerate(tools):
        if isinstance(item, Tool):
            found.append(item)
        elif callable(item):
            found.append(tool_of_function(item))
        else:
            found.append(read_tool(item, f"tools[{number}]"))
    return checked(found)


def tool_of_function(function: Callable[..., Any]) -> Tool:
    """The tool that calls `function`: its name, what its docstring says, and a schema from its type hints.

    Parameters without a default are required; what a docstring says of one ("Args:" or ":param x:"), or
    `Annotated[int, "..."]`, is its description. Raises PromptError for a function that takes arguments by position
    only, any number of them, or of a type that JSON has no words for.
    """
    name = getattr(function, "__name__", type(function).__name__)
    try:
        signature = inspect.signature(function)
        hints = typing.get_type_hints(function, include_extras=True)
    except (NameError, TypeError, ValueError) as error:
        raise PromptError(f"{name} cannot be a tool: {error}", "give it type hints that can be read") from None
    summary, descriptions = _docstring(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    required: list[str] = []
    for parameter in signature.parameters.values():
        place = f"{name}({parameter.name})"
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise PromptError(f"{place} cannot be given by its name", "use plain parameters")
        schema = _schema(hints.get(parameter.name, inspect.Parameter.empty), place)
        if parameter.name in descriptions:
            schema = {"description": descriptions[parameter.name], **schema}
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    whole = {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return Tool(name, summary, whole)


def _schema(hint: Any, place: str, level: int = 0) -> dict[str, Any]:
    """The JSON schema of a type."""
    if level > _MAX_NESTING:
        raise PromptError(f"the type of {place} is nested too deeply", "use a simpler one")
    if isinstance(hint, typing.Hashable) and hint in _PLAIN:
        return dict(_PLAIN[hint])
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"enum": [member.value for member in hint]}
    if dataclasses.is_dataclass(hint) or typing.is_typeddict(hint):
        return _object(hint, place, level)
    found = _composed(get_origin(hint) or hint, get_args(hint), lambda part: _schema(part, place, level + 1))
    if found is None:
        raise PromptError(
            f"{place} has the type {getattr(hint, '__name__', hint)}, which JSON has no words for",
            "use numbers, texts, booleans, lists, dictionaries, Literal, enumerations, dataclasses or TypedDict",
        )
    return found


def _composed(origin: Any, arguments: tuple[Any, ...], inner: Callable[[Any], dict[str, Any]]) -> dict[str, Any] | None:
    """The schema of a type that is made of others, whose schemas `inner` gives; None if it is of no known kind."""
    if origin is typing.Annotated:
        texts = [text for text in arguments[1:] if isinstance(text, str)]
        return {**inner(arguments[0]), **({"description": texts[0]} if texts else {})}
    if origin is Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [inner(part) for part in arguments]}
    if origin is tuple and arguments and arguments[1:] != (Ellipsis,):
        parts = [inner(part) for part in arguments]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}
    if origin in (list, tuple, set, Sequence):
        return {"type": "array", **({"items": inner(arguments[0])} if arguments else {})}
    if origin in (dict, Mapping):
        return {"type": "object", **({"additionalProperties": inner(arguments[1])} if arguments else {})}
    return None


def _object(hint: Any, place: str, level: int) -> dict[str, Any]:
    """The schema of a dataclass or TypedDict."""
    hints = typing.get_type_hints(hint, include_extras=True)
    if typing.is_typeddict(hint):
        required = [name for name in hints if name in hint.__required_keys__]
    else:
        missing = dataclasses.MISSING
        fields = {field.name: field for field in dataclasses.fields(hint) if field.init}
        hints = {name: hints[name] for name in fields}
        required = [
            name for name, field in fields.items() if field.default is missing and field.default_factory is missing
        ]
    properties = {name: _schema(part, f"{place}.{name}", level + 1) for name, part in hints.items()}
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """(what the function does, what its parameters are), white space folded."""
    summary: list[str] = []
    found: dict[str, list[str]] = {}
    # `depth` is the indentation of the parameters in a section of them.
    section, depth, current = "", -1, ""
    for line in text.splitlines():
        body = line.strip()
        if field := _FIELD.match(body):
            section, current = "fields", field[1]
            found[current] = [field[2]]
        elif heading := _SECTION.match(line):
            section, depth, current = heading[1].lower(), -1, ""
        elif not section:
            summary.append(body)
        elif body and section in _PARAMETER_SECTIONS:
            indent = len(line) - len(line.lstrip())
            depth = indent if depth < 0 else depth
            entry = _GOOGLE.match(body) if indent == depth else None
            if entry:
                current = entry[1]
            if current:
                found.setdefault(current, []).append(entry[2] if entry else body)
        elif current and body and not body.startswith(":"):
            found[current].append(body)
    return " ".join(" ".join(summary).split()), {name: " ".join(parts).strip() for name, parts in found.items()}
