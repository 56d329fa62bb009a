"""Pieces of answers, without a model."""

from __future__ import annotations

from abcli.chat.answer import Answer, EndReason, Piece, Timings, Usage
from abcli.chat.calls.events import ArgumentsText, CallBegun, CallFinished
from abcli.chat.messages import ToolCall


def call_pieces(index: int, name: str, *arguments: str) -> list[Piece]:
    """A call whose arguments come in pieces."""
    identifier = f"call{index:05}"
    return [
        Piece("", events=(CallBegun(index, identifier, name),)),
        *(Piece("", events=(ArgumentsText(index, text),)) for text in arguments),
        Piece("", events=(CallFinished(index, ToolCall(name, "".join(arguments), identifier)),)),
    ]


def last_piece(reason: EndReason = "stop", usage: Usage = Usage(12, 4, 7), text: str = "", thought: str = "") -> Piece:  # noqa: B008
    """The piece that ends an answer."""
    answer = Answer(text, (), reason, usage, Timings(0.1, 0.2), 0.9, 1.0, 1, thought)
    return Piece("", answer)
