"""An answer as parts after each other, as Anthropic's messages and OpenAI's responses have it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar, TypeAlias

from abcli.chat.answer import Answer, Piece
from abcli.chat.calls.events import Event as CallEvent

Events: TypeAlias = Iterator[dict[str, Any]]


class Blocks(ABC):
    """Tells of an answer in the events of a stream: a thought, a text and each call are blocks, in their order.

    A text of white space alone beside others is none.
    """

    thought: ClassVar[str]
    """What the protocol calls a block with a thought, and one with a text."""
    text: ClassVar[str]

    def __init__(self) -> None:
        self.block: dict[str, Any] | None = None
        """The block that is open."""
        self._blank = ""

    def add(self, piece: Piece) -> Events:
        """The events of a piece; those of the last one end the stream."""
        if piece.reasoning:
            yield from self.write(self.thought, piece.reasoning)
        if piece.text:
            yield from self._say(piece.text)
        for event in piece.events:
            yield from self.call(event)
        if piece.answer is not None:
            yield from self.end(piece.answer)

    def _say(self, text: str) -> Events:
        """A piece of the text; white space waits for what comes behind it."""
        text, self._blank = self._blank + text, ""
        if self.is_open(self.text) or not text.isspace():
            yield from self.write(self.text, text)
        else:
            self._blank = text

    def opened(self, block: dict[str, Any]) -> None:
        """A block begins; white space before it was none of a text's."""
        self.block = block
        self._blank = ""

    def is_open(self, kind: str) -> bool:
        """Whether a block of this kind is open."""
        return self.block is not None and self.block["type"] == kind

    @abstractmethod
    def write(self, kind: str, text: str) -> Events:
        """A piece of a thought or text, in a block of its own."""

    @abstractmethod
    def call(self, event: CallEvent) -> Events:
        """What is new of a call."""

    @abstractmethod
    def end(self, answer: Answer) -> Events:
        """The end of everything."""
