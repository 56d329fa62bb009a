"""What an answer turns out to contain, as it comes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TypeAlias

from abcli.chat.messages import ToolCall


@dataclass(frozen=True)
class ContentText:
    """A further piece of what is said."""

    text: str


@dataclass(frozen=True)
class ThoughtText:
    """A further piece of what is thought."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A call of the function `name`, whose arguments follow; calls are counted from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsText:
    """A further piece of the JSON text of a call's arguments."""

    index: int
    text: str


@dataclass(frozen=True)
class CallFinished:
    """A call that is complete; its arguments are what the pieces before joined to."""

    index: int
    call: ToolCall


@dataclass(frozen=True)
class CallDropped:
    """The call that has begun is none: it was cut off, or it is not written as the format wants it.

    The next call that begins has its index.
    """

    index: int


Event: TypeAlias = "ContentText | ThoughtText | CallBegun | ArgumentsText | CallFinished | CallDropped"


def joined(events: Iterable[Event]) -> list[Event]:
    """The same events, pieces of one text that follow each other as one."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, ContentText | ThoughtText | ArgumentsText) and isinstance(last, type(event)):
            result[-1] = replace(last, text=last.text + event.text)
        else:
            result.append(event)
    return result
