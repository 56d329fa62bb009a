"""A finished answer, and the pieces that it is streamed in."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import Literal

from abcli.chat.calls.events import Event
from abcli.chat.messages import ToolCall
from abcli.generate import Answer as RunningAnswer
from abcli.generate import Statistics
from abcli.trace.trace import Trace

EndReason = Literal["stop", "length", "tool_calls"]


@dataclass(frozen=True)
class Usage:
    """Numbers of tokens; `cached_tokens` of the prompt were there already."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @classmethod
    def of(cls, statistics: Statistics) -> Usage:
        """Those of an answer so far."""
        return cls(statistics.prompt_tokens, statistics.cached_tokens, statistics.completion_tokens)


@dataclass(frozen=True)
class Timings:
    """Seconds that a prompt and the tokens after the first one took."""

    prefill: float
    decode: float

    @classmethod
    def of(cls, statistics: Statistics) -> Timings:
        """Those of an answer so far."""
        return cls(statistics.prefill_seconds, statistics.decode_seconds)


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
    spans: tuple[tuple[str, float | None], ...] = field(default=(), repr=False, compare=False)
    """All that was written, thoughts and calls included, in pieces: each with the share (0..1) of probability mass on
    which the buckets agreed there, None where one decided alone."""

    def _repr_html_(self) -> str:
        """What was written, shaded where the buckets disagree: how a notebook shows an answer."""
        pieces = []
        for text, agreement in self.spans:
            shade = "" if agreement is None else f"background: rgba(255, 140, 0, {0.75 * (1 - agreement):.2f})"
            title = "one bucket decided" if agreement is None else f"agreement {agreement:.0%}"
            pieces.append(f'<span style="{shade}" title="{title}">{escape(text)}</span>')
        usage = self.usage
        below = f"{usage.prompt_tokens} + {usage.completion_tokens} tokens, agreement {self.agreement:.0%}"
        return (
            f'<div style="white-space: pre-wrap">{"".join(pieces)}</div>'
            f'<div style="opacity: 0.6; font-size: small">{below}, {escape(self.finish_reason)}</div>'
        )


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
        usage=Usage.of(statistics),
        timings=Timings.of(statistics),
        agreement=statistics.agreement,
        asked=statistics.asked,
        seed=answer.seed,
        spans=tuple(answer.spans),
        reasoning=reasoning,
        tool_calls=tool_calls,
        stopped_by=answer.stopped_by,
    )
