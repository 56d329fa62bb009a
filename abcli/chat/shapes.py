"""The shapes in which a conversation may be handed to a template that refuses it as it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from abcli.chat.messages import Message

_BETWEEN = "\n\n"


def shapes(messages: tuple[Message, ...]) -> Iterator[tuple[tuple[Message, ...], str]]:
    """(conversation, what was done to it), the least change first; each has the text of every message.

    The last is what llama.cpp does for a template without system messages.
    """
    head = next((at for at, message in enumerate(messages) if message.role != "system"), len(messages))
    rest = [_as_user(message) for message in messages[head:]]
    steps = (
        (messages, ""),
        (_joined(messages), "messages of one role in a row are joined"),
        (_joined([*messages[:head], *rest]), "later system messages are sent as the user's"),
        (_joined([*map(_as_user, messages[:head]), *rest]), "the system message goes before the user's first"),
    )
    seen: list[tuple[Message, ...]] = []
    for shape, change in steps:
        if shape not in seen:
            seen.append(shape)
            yield shape, change


def _as_user(message: Message) -> Message:
    return replace(message, role="user") if message.role == "system" else message


def _joined(messages: Iterable[Message]) -> tuple[Message, ...]:
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1].role == message.role:
            last = joined.pop()
            content = _BETWEEN.join(text for text in (last.content, message.content) if text)
            thought = _BETWEEN.join(text for text in (last.reasoning_content, message.reasoning_content) if text)
            message = replace(message, content=content, reasoning_content=thought)
        joined.append(message)
    return tuple(joined)
