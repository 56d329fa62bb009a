"""The shapes in which a conversation may be handed to a template that refuses it as it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from abcli.chat.calls.fallback import tools_text
from abcli.chat.messages import Message, Tool, ToolCall

_BETWEEN = "\n\n"
_ID_LENGTH = 9


def shapes(messages: tuple[Message, ...]) -> Iterator[tuple[tuple[Message, ...], str]]:
    """(conversation, what was done to it), the least change first; each has the text of every message.

    The last is what llama.cpp does for a template without system messages.
    """
    head = _head(messages)
    rest = [_as_user(message) for message in messages[len(head) :]]
    steps = (
        (messages, ""),
        (_joined(messages), "messages of one role in a row are joined"),
        (_joined([*head, *rest]), "later system messages are sent as the user's"),
        (_joined([*map(_as_user, head), *rest]), "the system message goes before the user's first"),
    )
    seen: list[tuple[Message, ...]] = []
    # Mistral's templates take no other ids, and Llama's one call a message; what knows no tools at all gets calls and
    # results as text.
    rewrites = (
        (_same, ""),
        (_with_short_ids, ""),
        (_one_call_each, ""),
        (_without_tools, "calls of tools are sent as text"),
    )
    for rewrite, more in rewrites:
        for shape, change in steps:
            rewritten = rewrite(shape)
            if rewritten not in seen:
                seen.append(rewritten)
                yield rewritten, "; ".join(text for text in (more, change) if text)


def told_in_words(messages: tuple[Message, ...], tools: Sequence[Tool]) -> tuple[Message, ...]:
    """The conversation for a template that knows no tools: the system message lists them, calls are text."""
    told = Message("system", tools_text(tools))
    return _joined([*_head(messages), told, *_without_tools(messages[len(_head(messages)) :])])


def _head(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The system messages that come first."""
    end = next((at for at, message in enumerate(messages) if message.role != "system"), len(messages))
    return messages[:end]


def _same(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return messages


def _with_short_ids(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Ids of calls as nine letters or digits, the same id for a call and its result."""
    return tuple(
        replace(
            message,
            tool_call_id=_short_id(message.tool_call_id) if message.role == "tool" else "",
            tool_calls=tuple(replace(call, id=_short_id(call.id)) for call in message.tool_calls),
        )
        for message in messages
    )


def _short_id(identifier: str) -> str:
    fits = len(identifier) == _ID_LENGTH and identifier.isascii() and identifier.isalnum()
    return identifier if fits else hashlib.sha256(identifier.encode()).hexdigest()[:_ID_LENGTH]


def _one_call_each(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Each call in a message of its own, with its result behind it; results without an id are in the calls' order."""
    changed: list[Message] = []
    rest = list(messages)
    while rest:
        message = rest.pop(0)
        if len(message.tool_calls) < 2:
            changed.append(message)
            continue
        results = []
        while rest and rest[0].role == "tool":
            results.append(rest.pop(0))
        for number, call in enumerate(message.tool_calls):
            changed.append(message if number == 0 else Message("assistant", ""))
            changed[-1] = replace(changed[-1], tool_calls=(call,))
            found = next((result for result in results if result.tool_call_id == call.id), None)
            if found is not None:
                results.remove(found)
                changed.append(found)
        changed += results
    return tuple(changed)


def _without_tools(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Calls and results as the texts that the Hermes and Qwen models read and write."""
    if not any(message.tool_calls or message.role == "tool" for message in messages):
        return messages
    return _joined(
        Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
        if message.role == "tool"
        else replace(
            message,
            content="\n".join(text for text in (message.content, *map(_call_text, message.tool_calls)) if text),
            tool_calls=(),
        )
        for message in messages
    )


def _call_text(call: ToolCall) -> str:
    name = json.dumps(call.name, ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {call.arguments}}}\n</tool_call>'


def _as_user(message: Message) -> Message:
    return replace(message, role="user") if message.role == "system" else message


def _joined(messages: Iterable[Message]) -> tuple[Message, ...]:
    joined: list[Message] = []
    for message in messages:
        if joined and joined[-1].role == message.role and not (message.tool_call_id or joined[-1].tool_calls):
            last = joined.pop()
            content = _BETWEEN.join(text for text in (last.content, message.content) if text)
            thought = _BETWEEN.join(text for text in (last.reasoning_content, message.reasoning_content) if text)
            calls = message.tool_calls
            message = replace(last, content=content, reasoning_content=thought, tool_calls=calls)
        joined.append(message)
    return tuple(joined)
