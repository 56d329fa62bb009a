"""What people and strangers wrote, in forms that keep control tokens in it from being taken for such."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from abcli.chat.control_text import ControlText, Marks, unused_marks
from abcli.chat.messages import Message, Tool, ToolCall
from abcli.chat.options import ChatOptions
from abcli.errors import PromptError

# Templates look for these words of JSON Schema, so nothing may stand before them.
_SCHEMA_WORDS = frozenset(
    (
        *("string", "number", "integer", "boolean", "array", "object", "null", "function"),
        *("type", "properties", "required", "items", "description", "enum", "default", "nullable", "title", "format"),
        *("additionalProperties", "anyOf", "oneOf", "allOf", "const", "minimum", "maximum", "pattern", "$defs", "$ref"),
    )
)

Change = Callable[[str], str]


def marks_for(messages: Sequence[Message], options: ChatOptions) -> Marks:
    """Marks that occur in nothing of the conversation. Raises PromptError if every character is used."""
    texts = [options.chat_template_kwargs, options.reasoning_effort]
    for tool in options.tools:
        texts += (tool.name, tool.description, json.dumps(tool.parameters, ensure_ascii=False))
    for message in messages:
        texts += (message.content, message.reasoning_content, message.tool_call_id, message.name)
        for call in message.tool_calls:
            texts += (call.name, call.arguments, call.id)
    marks = unused_marks("".join(texts))
    if marks is None:
        raise PromptError("the messages use every private-use character", "remove some of them")
    return marks


class Guard:
    """Breaks texts up so that no part of them can be part of a control token, whatever stands around it."""

    def __init__(self, control: ControlText, marks: Marks) -> None:
        self._marks = marks
        self._inside = partial(control.break_everywhere, marks=marks, edge="")
        self._named = partial(control.break_everywhere, marks=marks, edge=marks.inner_edge)
        self._content = partial(control.break_everywhere, marks=marks, edge=marks.edge)

    def message(self, message: Message) -> Message:
        """`message` broken up; each of its texts has an edge where it begins."""
        return replace(
            message,
            content=self._content(message.content),
            reasoning_content=self._named(message.reasoning_content),
            tool_calls=_changed_calls(message, self._named, self._inside),
        )

    def options(self, options: ChatOptions) -> ChatOptions:
        """`options` broken up; what templates compare with words of their own has no edge."""
        return _changed_options(options, self._named, self._part, self._inside)

    def _part(self, text: str) -> str:
        return self._inside(text) if text in _SCHEMA_WORDS else self._named(text)


class Breaker:
    """Breaks up only the control tokens that a text has as a whole: less changes, for templates that look closely."""

    def __init__(self, control: ControlText, marks: Marks) -> None:
        self._broken = partial(control.break_tokens, marks=marks)

    def message(self, message: Message) -> Message:
        """`message` with the control tokens in it broken up."""
        return replace(
            message,
            content=self._broken(message.content),
            reasoning_content=self._broken(message.reasoning_content),
            tool_calls=_changed_calls(message, self._broken, self._broken),
        )

    def options(self, options: ChatOptions) -> ChatOptions:
        """`options` with the control tokens in them broken up."""
        return _changed_options(options, self._broken, self._broken, self._broken)


def _changed_calls(message: Message, change_name: Change, change: Change) -> tuple[ToolCall, ...]:
    """The calls of a message, their names and the texts in their arguments having gone through a change."""
    return tuple(
        replace(call, name=change_name(call.name), arguments=_changed_json(call.arguments, change))
        for call in message.tool_calls
    )


def _changed_options(options: ChatOptions, change_name: Change, change: Change, change_other: Change) -> ChatOptions:
    tools = tuple(
        Tool(change_name(tool.name), change_name(tool.description), _changed(tool.parameters, change))
        for tool in options.tools
    )
    kwargs = options.chat_template_kwargs
    return replace(
        options,
        tools=tools,
        reasoning_effort=change_other(options.reasoning_effort),
        chat_template_kwargs=_changed_json(kwargs, change_other) if kwargs else "",
    )


def _changed_json(text: str, change: Change) -> str:
    return json.dumps(_changed(json.loads(text), change), ensure_ascii=False)


def _changed(value: Any, change: Change) -> Any:
    """A JSON value with the keys and texts in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _changed(item, change) for key, item in value.items()}
    return [_changed(item, change) for item in value] if isinstance(value, list) else value
