"""A finished answer, and the pieces that it is streamed in."""

from __future__ import annotations

from dataclasses import dataclass

from abcli.generate import Answer as RunningAnswer
from abcli.generate import FinishReason


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

    `finish_reason` is "stop" where the model or a stop string ended it, "length" where `max_tokens` or the context
    did. `agreement` is the mean share (0..1) of probability mass on which the buckets agreed.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    agreement: float
    seed: int


@dataclass(frozen=True)
class Piece:
    """What a step added to an answer; `text` may be empty. Only the last one has the whole `answer`."""

    text: str
    answer: Answer | None = None


def finished_answer(answer: RunningAnswer) -> Answer:
    """A complete answer as it is handed out."""
    statistics = answer.statistics
    if answer.finish_reason is None:
        raise ValueError("the answer is not complete")
    return Answer(
        text=answer.text,
        tokens=tuple(answer.tokens),
        finish_reason=answer.finish_reason,
        usage=Usage(statistics.prompt_tokens, statistics.cached_tokens, statistics.completion_tokens),
        timings=Timings(statistics.prefill_seconds, statistics.decode_seconds),
        agreement=statistics.agreement,
        seed=answer.seed,
    )
