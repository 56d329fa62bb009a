"""Rendering a long conversation piece by piece, so that a further turn costs the time of that turn.

Templates look at every message and often, for each of them, at all the others: the time grows with the square of the
conversation. But what stands between two messages of the user depends only on what is near, in nearly every template.
So windows of a few turns are rendered, each with some turns around it, and joined at the beginnings of the user's
messages. Where two windows overlap they must say the same, else the template looks further than a window reaches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial

from abcli.chat.conversation import split_turns
from abcli.chat.messages import Message
from abcli.chat.options import ChatOptions
from abcli.errors import TemplateError

# Shorter conversations are rendered as a whole.
MIN_TURNS = 48
_STRIDE = 16
_AROUND = 3
_KEPT_WINDOWS = 1024

Render = Callable[[tuple[Message, ...], ChatOptions, bool], str]


class WindowedRendering:
    """Renders through `render`, which is asked for (messages, options, opened); keeps what it rendered."""

    def __init__(self, render: Render) -> None:
        self._render = lru_cache(_KEPT_WINDOWS)(render)

    def text(self, messages: Sequence[Message], options: ChatOptions, opened: bool, anchor: str) -> str | None:
        """What `render` would make of all `messages`; None if they are few or the template looks too far.

        `opened` adds the beginning of an answer; `anchor` is a character that occurs in none of the messages.
        """
        head, turns = split_turns(messages)
        if len(turns) < MIN_TURNS or any(turn[0].role != "user" or not turn[0].content.strip() for turn in turns):
            return None
        starts = range(0, len(turns) - _STRIDE - _AROUND, _STRIDE)
        text: list[str] = []
        before: dict[int, str] = {}
        for start in starts:
            is_last = start == starts[-1]
            first = max(start - _AROUND, 0)
            end = len(turns) if is_last else start + _STRIDE + _AROUND
            render = partial(self._window, options, is_last and opened)
            pieces = _pieces(render, head, turns[first:end], anchor)
            if pieces is None:
                return None
            opening, *found = pieces
            here = dict(enumerate(found, first))
            # The outermost turns of a window have no neighbours, so they may differ.
            if any(before[turn] != here[turn] for turn in range(start - _AROUND + 1, start + 1) if before):
                return None
            text += [opening] if start == 0 else []
            text += [here[turn] for turn in range(start, end if is_last else start + _STRIDE)]
            before = here
        return "".join(text)

    def _window(self, options: ChatOptions, opened: bool, messages: tuple[Message, ...]) -> str:
        return self._render(messages, options, opened)


def _pieces(
    render: Callable[[tuple[Message, ...]], str], head: Sequence[Message], turns: Sequence[list[Message]], anchor: str
) -> list[str] | None:
    """The window's text, cut where each turn's first message begins; None if it does not show each once."""
    anchored = [message for turn in turns for message in (_anchored(turn[0], anchor), *turn[1:])]
    try:
        pieces = render((*head, *anchored)).split(anchor)
    except TemplateError:
        return None
    return pieces if len(pieces) == len(turns) + 1 else None


def _anchored(message: Message, anchor: str) -> Message:
    """`message` with a mark where its text begins: templates like to strip white space."""
    body = message.content.lstrip()
    return replace(message, content=message.content[: len(message.content) - len(body)] + anchor + body)
