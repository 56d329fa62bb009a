"""Messages as JSON, the way OpenAI's clients write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from abcli.chat.messages import ROLES, Message, Role
from abcli.errors import PromptError

# The system's messages are called the developer's by newer models.
_OTHER_NAMES = {"developer": "system"}
_EXAMPLE = '[{"role": "user", "content": "..."}]'
_READ = ("role", "content", "reasoning_content", "reasoning")
_IGNORED = ("refusal", "name")


def read_messages(value: Any) -> tuple[Message, ...]:
    """A JSON list of messages. Raises PromptError that names the message for anything that cannot be taken as meant."""
    if not isinstance(value, list) or not value:
        raise PromptError(f"messages is {shown(value)}", f'write "messages": {_EXAMPLE}')
    return tuple(_message(item, number) for number, item in enumerate(value, 1))


def message_fields(message: Message) -> dict[str, Any]:
    """`message` as JSON values, without what is empty; `read_messages` reads it back."""
    thought = {"reasoning_content": message.reasoning_content} if message.reasoning_content else {}
    return {"role": message.role, "content": message.content, **thought}


def given(record: Mapping[str, Any]) -> dict[str, Any]:
    """Without those that are null: clients write null for what they leave out."""
    return {key: value for key, value in record.items() if value is not None}


def shown(value: Any, limit: int = 80) -> str:
    """A value as JSON, shortened."""
    text = "missing" if value is None else json.dumps(value)
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
    if not isinstance(value, dict):
        raise PromptError(f"message {number} is {shown(value)}", 'write {"role": "user", "content": "..."}')
    spelled = value.get("role")
    spelled = _OTHER_NAMES.get(spelled, spelled) if isinstance(spelled, str) else spelled
    role: Role | None = next((role for role in ROLES if role == spelled), None)
    if role is None:
        raise PromptError(f"message {number} has the role {shown(value.get('role'))}", f"use one of {', '.join(ROLES)}")
    fields = given(value)
    unknown = [name for name in fields if name not in (*_READ, *_IGNORED)]
    if unknown:
        raise PromptError(f"the field {shown(unknown[0])} is not known", f"message {number} may have role and content")
    content = fields.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(part, number) for part in content)
    text = read_text(content, f"the content of message {number}")
    thought = fields.get("reasoning_content", fields.get("reasoning", ""))
    return Message(role, text, read_text(thought, f"the reasoning of message {number}"))


def _part(value: Any, number: int) -> str:
    if not isinstance(value, dict) or value.get("type") != "text":
        kind = value.get("type") if isinstance(value, dict) else value
        raise PromptError(f"message {number} has a part of type {shown(kind)}", "only text can be read")
    return read_text(value.get("text"), f"a part of message {number}")
