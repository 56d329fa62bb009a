"""Parsing answers in pieces, for the tests of calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from abcli.chat.calls.events import ArgumentsText, CallBegun, CallDropped, CallFinished, ContentText, Event, ThoughtText
from abcli.chat.calls.format import CallFormat
from abcli.chat.calls.parser import AnswerParser
from abcli.chat.messages import Tool

WEATHER = Tool(
    "get_weather",
    "The weather",
    {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
)
CLOCK = Tool("clock", "The time", {"type": "object", "properties": {}})
TOOLS = (WEATHER, CLOCK)


@dataclass(frozen=True)
class Parsed:
    """An answer that was read, its calls as (name, arguments)."""

    said: str
    thought: str
    calls: list[tuple[str, str]]


def pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def parse(
    form: CallFormat, text: Iterable[str], tools: Sequence[Tool] = TOOLS, *, cut: bool = False, opened: bool = False
) -> Parsed:
    """What an answer in pieces is read as; its events have to be in order."""
    parser = AnswerParser(form, tools, thought_opened=opened)
    events: list[Event] = []
    for piece in text:
        events += parser.feed(piece)
    events += parser.finish(cut)
    calls = checked_calls(events)
    assert [(call.name, call.arguments) for call in parser.calls] == calls
    said = "".join(event.text for event in events if isinstance(event, ContentText))
    return Parsed(said, "".join(event.text for event in events if isinstance(event, ThoughtText)), calls)


def checked_calls(events: Iterable[Event]) -> list[tuple[str, str]]:
    """The calls that are finished; each is begun before, and its arguments are the pieces in between."""
    calls: list[tuple[str, str]] = []
    begun: CallBegun | None = None
    arguments = ""
    for event in events:
        if isinstance(event, CallBegun):
            assert begun is None
            assert event.index == len(calls)
            begun, arguments = event, ""
        elif isinstance(event, ArgumentsText):
            assert begun is not None
            assert event.index == begun.index
            arguments += event.text
        elif isinstance(event, CallDropped):
            assert begun is not None
            begun = None
        elif isinstance(event, CallFinished):
            assert begun is not None
            assert (begun.index, begun.id, begun.name, arguments) == (
                event.index,
                event.call.id,
                event.call.name,
                event.call.arguments,
            )
            calls.append((event.call.name, arguments))
            begun = None
        else:
            assert begun is None
    assert begun is None
    return calls
