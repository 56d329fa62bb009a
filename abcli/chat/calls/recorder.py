"""Events of an answer, put together from what is read in it."""

from __future__ import annotations

import json
from collections.abc import Callable

from abcli.chat.calls.events import ArgumentsText, CallBegun, CallDropped, CallFinished, Event
from abcli.chat.calls.source import is_json, whole
from abcli.chat.messages import ToolCall


class Recorder:
    """The calls of an answer: those that are complete and the one that is being read."""

    def __init__(self, tell: Callable[[Event], object]) -> None:
        self._tell = tell
        self.finished: list[ToolCall] = []
        self._open: ToolCall | None = None

    @property
    def is_open(self) -> bool:
        """Whether a call has begun that is not complete."""
        return self._open is not None

    def begin(self, name: str, identifier: str = "") -> None:
        """The name of a call is complete; without an id it gets one."""
        # Nine letters or digits, as Mistral's templates want ids.
        self._open = ToolCall(name, "", identifier or f"call{len(self.finished):05}")
        self._tell(CallBegun(len(self.finished), self._open.id, name))

    def argue(self, text: str) -> None:
        """A further piece of the arguments, JSON."""
        if self._open is not None and text:
            self._open = ToolCall(self._open.name, self._open.arguments + text, self._open.id)
            self._tell(ArgumentsText(len(self.finished), text))

    def finish(self) -> None:
        """The call is complete."""
        if self._open is None:
            return
        if not self._open.arguments:
            self.argue("{}")
        self._tell(CallFinished(len(self.finished), self._open))
        self.finished.append(self._open)
        self._open = None

    def drop(self) -> None:
        """What was read is no call."""
        if self._open is not None:
            self._tell(CallDropped(len(self.finished)))
            self._open = None


def arguments_text(value: str) -> str:
    """The JSON value of a call's arguments as the text of an object, "" if it is none.

    Some models write the object's text as a text, or null.
    """
    parsed = json.loads(value)
    if isinstance(parsed, str) and is_json(parsed):
        value, parsed = whole(parsed), json.loads(parsed)
    if parsed is None:
        return "{}"
    return value if isinstance(parsed, dict) else ""
