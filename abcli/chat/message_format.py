"""Messages as JSON, the way OpenAI's clients write them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from abcli.chat.messages import ROLES, Message, Role, ToolCall
from abcli.errors import PromptError

# The system's messages are called the developer's by newer models.
_OTHER_NAMES = {"developer": "system"}
_EXAMPLE = '[{"role": "user", "content": "..."}]'
_IGNORED = ("refusal", "name")
# What messages of each role may have besides a role, a content and what is ignored.
_OWN: dict[Role, tuple[str, ...]] = {
    "system": (),
    "user": (),
    "assistant": ("reasoning_content", "reasoning", "tool_calls"),
    "tool": ("tool_call_id",),
}
_EXAMPLE_CALL = '{"id": "...", "type": "function", "function": {"name": "...", "arguments": "{...}"}}'


Prompt: TypeAlias = "str | Sequence[Message | Mapping[str, Any]]"
"""A text, or the messages of a conversation as `Message` or as OpenAI's clients write them."""


def as_messages(prompt: Prompt) -> list[Message]:
    """A prompt as the messages of a conversation. Raises PromptError for anything else."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("the prompt is empty", "give it some text")
        return [Message("user", prompt)]
    messages = [item if isinstance(item, Message) else _message(item, number) for number, item in enumerate(prompt, 1)]
    if not messages:
        raise PromptError("there are no messages", "give one or more")
    return messages


def read_messages(value: Any) -> tuple[Message, ...]:
    """A JSON list of messages. Raises PromptError that names the message for anything that cannot be taken as meant."""
    if not isinstance(value, list) or not value:
        raise PromptError(f"messages is {shown(value)}", f'write "messages": {_EXAMPLE}')
    return tuple(_message(item, number) for number, item in enumerate(value, 1))


def known_fields(value: Any) -> Any:
    """A message without the fields that are not known: servers pass over them. What is no message stays as it is."""
    if not isinstance(value, Mapping):
        return value
    known = (
        "role",
        "content",
        *_IGNORED,
        *next((names for role, names in _OWN.items() if role == value.get("role")), ()),
    )
    return {name: content for name, content in value.items() if name in known}


def message_fields(message: Message) -> dict[str, Any]:
    """`message` as JSON values, without what is empty; `read_messages` reads it back."""
    fields: dict[str, Any] = {"role": message.role, "content": message.content}
    for name in ("reasoning_content", "tool_call_id", "name"):
        if value := getattr(message, name):
            fields[name] = value
    if message.tool_calls:
        fields["tool_calls"] = [call_fields(call) for call in message.tool_calls]
    return fields


def call_fields(call: ToolCall) -> dict[str, Any]:
    """`call` as JSON values."""
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def given(record: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are null: clients write null for what they leave out."""
    return {key: value for key, value in record.items() if value is not None}


def shown(value: Any, limit: int = 80) -> str:
    """A value as JSON, shortened."""
    text = "missing" if value is None else json.dumps(value, default=repr)
    return text if len(text) <= limit else f"{text[:limit]}..."


def read_text(value: Any, name: str) -> str:
    """A text that can be written again: JSON can spell halves of characters. Raises PromptError."""
    if not isinstance(value, str):
        raise PromptError(f"{name} is {shown(value)}", "make it a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise PromptError(f"{name} has half a character, {half}, at {error.start:,}", "remove it") from None
    return value


def _message(value: Any, number: int) -> Message:
    if not isinstance(value, Mapping):
        raise PromptError(f"message {number} is {shown(value)}", 'write {"role": "user", "content": "..."}')
    spelled = value.get("role")
    spelled = _OTHER_NAMES.get(spelled, spelled) if isinstance(spelled, str) else spelled
    role: Role | None = next((role for role in ROLES if role == spelled), None)
    if role is None:
        raise PromptError(f"message {number} has the role {shown(value.get('role'))}", f"use one of {', '.join(ROLES)}")
    fields = given(value)
    known = ("role", "content", *_OWN[role], *_IGNORED)
    unknown = [name for name in fields if name not in known]
    if unknown:
        raise PromptError(
            f"the field {shown(unknown[0])} is not known", f"message {number} may have {', '.join(known[:-2])}"
        )
    calls = _calls(fields.get("tool_calls", []), number)
    content = fields.get("content", "" if calls else None)
    if isinstance(content, list):
        content = "\n".join(_part(part, number) for part in content)
    return Message(
        role,
        read_text(content, f"the content of message {number}"),
        read_text(fields.get("reasoning_content", fields.get("reasoning", "")), f"the reasoning of message {number}"),
        calls,
        read_text(fields.get("tool_call_id", ""), f"the tool_call_id of message {number}"),
        read_text(fields.get("name", ""), f"the name of message {number}") if role == "tool" else "",
    )


def _calls(value: Any, number: int) -> tuple[ToolCall, ...]:
    if not isinstance(value, list):
        raise PromptError(f"the tool_calls of message {number} are {shown(value)}", f"write [{_EXAMPLE_CALL}]")
    return tuple(_call(item, number) for item in value)


def _call(value: Any, number: int) -> ToolCall:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict):
        raise PromptError(f"message {number} has a call {shown(value)}", f"write {_EXAMPLE_CALL}")
    name = read_text(function.get("name"), f"the name of a call in message {number}")
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, str):
        arguments = _object(read_text(arguments, f"the arguments of a call in message {number}"))
    if not isinstance(arguments, dict) or not name:
        raise PromptError(f"message {number} has a call {shown(value)}", "its arguments must be a JSON object's text")
    identifier = value.get("id")
    return ToolCall(
        name,
        read_text(json.dumps(arguments, ensure_ascii=False), f"the arguments of a call in message {number}"),
        read_text("" if identifier is None else identifier, f"the id of a call in message {number}"),
    )


def _object(text: str) -> Any:
    """The JSON value in `text`, None if there is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _part(value: Any, number: int) -> str:
    if not isinstance(value, dict) or value.get("type") != "text":
        kind = value.get("type") if isinstance(value, dict) else value
        raise PromptError(f"message {number} has a part of type {shown(kind)}", "only text can be read")
    return read_text(value.get("text"), f"a part of message {number}")
