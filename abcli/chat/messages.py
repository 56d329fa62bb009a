"""The messages of a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

from abcli.errors import PromptError

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True)
class Message:
    """Who says what; `content` is plain text, in which control tokens mean nothing."""

    role: Role
    content: str


Prompt: TypeAlias = "str | Sequence[Message | Mapping[str, Any]]"
"""A text, or the messages of a conversation as `Message` or {"role": ..., "content": ...}."""


def as_messages(prompt: Prompt) -> list[Message]:
    """A prompt as the messages of a conversation. Raises PromptError for anything else."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise PromptError("the prompt is empty", "give it some text")
        return [Message("user", prompt)]
    messages = []
    for number, item in enumerate(prompt, 1):
        if not isinstance(item, Message):
            known = isinstance(item, Mapping) and set(item) == {"role", "content"}
            role, content = (item["role"], item["content"]) if known else (None, None)
            if role not in ROLES or not isinstance(content, str):
                raise PromptError(
                    f"message {number} is {item!r:.120}", 'write it like {"role": "user", "content": "..."}'
                )
            item = Message(role, content)
        messages.append(item)
    if not messages:
        raise PromptError("there are no messages", "give one or more")
    return messages
