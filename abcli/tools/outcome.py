"""What comes of a call of a tool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from abcli.chat.messages import ToolCall

MAX_OUTPUT_BYTES = 64 * 1024
# Asked often: whether the person wants the call to end.
Stopped = Callable[[], bool]


@dataclass(frozen=True)
class Outcome:
    """What a tool said, for the model to read; `problem` says in a few words what went wrong, for the person."""

    text: str
    problem: str = ""


class Runner(Protocol):
    """Runs the calls of one tool."""

    @property
    def description(self) -> str:
        """What is run, for the person who is asked whether it may."""

    def run(self, call: ToolCall, stopped: Stopped) -> Outcome:
        """Run a call. Raises CancelledError once `stopped`."""


def bounded(data: bytes) -> str:
    """Output as text that a model can read, at most MAX_OUTPUT_BYTES of it."""
    text = data[:MAX_OUTPUT_BYTES].decode("utf-8", "replace").replace("\0", "").strip()
    return f"{text}\n(cut off here)" if len(data) > MAX_OUTPUT_BYTES else text
