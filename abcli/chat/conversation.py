"""The messages of a chat, and how they are fitted into a context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal, Protocol

from abcli.chat.messages import Message, ToolCall
from abcli.errors import ContextFullError, UsageError

Overflow = Literal["error", "shift"]


_NO_RESULT = "There is no result."


class Tokenizing(Protocol):
    """The part of a chat template that `fit` needs."""

    def tokens(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """The tokens of a conversation."""
        ...


class Conversation:
    """A system prompt and what was said since; a turn is a message of the user with the answer to it."""

    def __init__(self, system: str | None = None, messages: Iterable[Message] = ()) -> None:
        """`messages` are those after the system prompt."""
        self.system = system
        self._history = list(messages)

    @property
    def messages(self) -> list[Message]:
        """Everything, the system prompt first if there is one; a new list each time."""
        first = [Message("system", self.system)] if self.system is not None else []
        return [*first, *self._history]

    @property
    def turns(self) -> int:
        """How many messages the user has sent."""
        return sum(message.role == "user" for message in self._history)

    def replace(self, messages: Iterable[Message]) -> None:
        """Continue `messages` instead; if the first is a system message it is the system prompt, else there is none."""
        history = list(messages)
        self.system = history.pop(0).content if history and history[0].role == "system" else None
        self._history = history

    def add_user(self, text: str) -> None:
        """The user says `text`. Raises UsageError while an answer is due: templates want roles to alternate.

        Calls that had no result get one that says so.
        """
        self.add_results([_NO_RESULT for _call in self.pending_calls])
        if self._history and self._history[-1].role == "user":
            raise UsageError("the last message has no answer yet", "/regen answers it, /undo drops it")
        self._history.append(Message("user", text))

    def add_assistant(self, text: str, thought: str = "", calls: Sequence[ToolCall] = ()) -> None:
        """The answer to the last message, the thought before it, and its calls of tools.

        Raises UsageError if the last message is neither the user's nor a tool's.
        """
        if not self._history or self._history[-1].role not in ("user", "tool"):
            raise UsageError("there is no message to answer", "type one first")
        self._history.append(Message("assistant", text, thought, tuple(calls)))

    @property
    def pending_calls(self) -> tuple[ToolCall, ...]:
        """The calls of the last answer that have no result yet."""
        results = list(takewhile(lambda message: message.role == "tool", reversed(self._history)))
        last = self._history[-1 - len(results)] if len(results) < len(self._history) else None
        return last.tool_calls[len(results) :] if last is not None else ()

    def add_results(self, results: Sequence[str]) -> None:
        """What came of the calls that are pending, in their order."""
        for call, result in zip(self.pending_calls, results, strict=True):
            self._history.append(Message("tool", result, tool_call_id=call.id, name=call.name))

    def undo(self) -> list[Message]:
        """Drop the user's last message and what followed it; returns the dropped, empty if there was none."""
        return self._cut(self._last_user())

    def regenerate(self) -> list[Message]:
        """Drop what followed the user's last message, so that it is answered anew; returns the dropped.

        Raises UsageError if the user has said nothing.
        """
        last = self._last_user()
        if last == len(self._history):
            raise UsageError("there is no message to answer again", "type one first")
        return self._cut(last + 1)

    def clear(self) -> None:
        """Forget everything but the system prompt."""
        self._history = []

    def _last_user(self) -> int:
        """Where the user's last message stands; the length of the history if there is none."""
        positions = range(len(self._history) - 1, -1, -1)
        return next((at for at in positions if self._history[at].role == "user"), len(self._history))

    def _cut(self, start: int) -> list[Message]:
        dropped = self._history[start:]
        del self._history[start:]
        return dropped


@dataclass(frozen=True)
class Fitted:
    """What is sent to the model; `dropped_turns` oldest turns were left out to make it fit."""

    messages: list[Message]
    tokens: list[int]
    dropped_turns: int


def fit(
    messages: Sequence[Message],
    template: Tokenizing,
    available: int,
    reserve: int,
    overflow: Overflow,
    dropped: int = 0,
) -> Fitted:
    """`messages` as tokens that leave `reserve` (at least 1) of `available` tokens for the answer.

    With "shift" the `dropped` oldest turns that were left out before stay out; if that does not fit, more are left
    out until half of the context is free, since all that follows a change is computed anew. The leading system
    messages and the user's last message always stay, even if they leave less than `reserve`. Raises
    ContextFullError if it does not fit (with "error": at once).
    """
    room = available - max(reserve, 1)
    head, turns = split_turns(messages)

    def without(count: int) -> Fitted:
        kept = [*head, *(message for turn in turns[count:] for message in turn)]
        return Fitted(kept, template.tokens(kept), count)

    first = without(dropped if overflow == "shift" and dropped < len(turns) else 0)
    if len(first.tokens) <= room:
        return first
    last = without(len(turns) - 1) if overflow == "shift" and turns else first
    if len(last.tokens) > (room if overflow == "error" else available - 1):
        raise ContextFullError(len(last.tokens) + 1, available)
    # Bisection: fewer turns have fewer tokens, so thousands of turns need about ten tokenizations.
    target = min(room, available // 2)
    too_few = first.dropped_turns
    while last.dropped_turns - too_few > 1:
        candidate = without((too_few + last.dropped_turns) // 2)
        if len(candidate.tokens) <= target:
            last = candidate
        else:
            too_few = candidate.dropped_turns
    return last


def split_turns(messages: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The leading system messages, and the rest cut before every message of the user."""
    rest = list(messages)
    head = []
    while rest and rest[0].role == "system":
        head.append(rest.pop(0))
    turns: list[list[Message]] = []
    for message in rest:
        if message.role == "user" or not turns:
            turns.append([])
        turns[-1].append(message)
    return head, turns
