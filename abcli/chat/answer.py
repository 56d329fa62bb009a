"""A finished answer, and the pieces that it is streamed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from abcli.chat.calls.events import Event
from abcli.chat.messages import ToolCall
from abcli.generate import Answer as RunningAnswer
from abcli.trace.trace import Trace

EndReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens; `cached_tokens` of the prompt were there already."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True)
class Timings:
    """Seconds that a prompt and the tokens after the first one took."""

    prefill: float
    decode: float


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    `finish_reason` is "stop" where the model or a stop string ended it, "tool_calls" where it ended with calls of
    tools, "length" where `max_tokens` or the context did. `agreement` is the mean share (0..1) of probability mass
    on which the buckets agreed where all were asked, which was so for the share `asked` of the tokens. `reasoning`
    is the thought before the text, `stopped_by` the stop string that ended it, if one did. `trace` is what the
    buckets saw, where that was asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: EndReason
    usage: Usage
    timings: Timings
    agreement: float
    asked: float
    seed: int
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    trace: Trace | None = field(default=None, repr=False, compare=False)
    stopped_by: str = ""


@dataclass(frozen=True)
class Piece:
    """What a step added to an answer: to its text, to its thought, to its calls. Only the last one has the `answer`.

    Any of them may be empty. `events` tell of calls as they come: begun, arguments, finished, dropped.
    """

    text: str
    answer: Answer | None = None
    reasoning: str = ""
    events: tuple[Event, ...] = ()
    running: RunningAnswer | None = field(default=None, repr=False, compare=False)
    """The answer so far, as the loop sees it."""


def finished_answer(
    answer: RunningAnswer, text: str | None = None, reasoning: str = "", tool_calls: tuple[ToolCall, ...] = ()
) -> Answer:
    """A complete answer as it is handed out; without a `text` that is all that was written."""
    statistics = answer.statistics
    if answer.finish_reason is None:
        raise ValueError("the answer is not complete")
    return Answer(
        text=answer.text if text is None else text,
        tokens=tuple(answer.tokens),
        finish_reason="tool_calls" if tool_calls and answer.finish_reason == "stop" else answer.finish_reason,
        usage=Usage(statistics.prompt_tokens, statistics.cached_tokens, statistics.completion_tokens),
        timings=Timings(statistics.prefill_seconds, statistics.decode_seconds),
        agreement=statistics.agreement,
        asked=statistics.asked,
        seed=answer.seed,
        reasoning=reasoning,
        tool_calls=tool_calls,
        stopped_by=answer.stopped_by,
    )
