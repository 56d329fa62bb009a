"""What a batch run works on: jobs read from the user's file, and the results that are written for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from abcli.chat.answer import Answer, EndReason
from abcli.chat.message_format import call_fields
from abcli.chat.messages import Message
from abcli.chat.options import ChatOptions
from abcli.sampling import GenerationConfig


@dataclass(frozen=True)
class Job:
    """One prompt of the input."""

    index: int
    """Its place among all lines of the input that hold something, from 0; results in order are ordered by it."""
    line: int
    """The line of the input at which it begins, from 1; in a JSON document its number among the items."""
    identifier: str
    """The user's id for it, unique in the input; the line's number as text where the input has none."""
    messages: tuple[Message, ...]
    generation: GenerationConfig
    """How to answer: the run's settings with those of the line. The seed is the run's or the line's, see `seed_for`."""
    options: ChatOptions = field(default_factory=ChatOptions)
    """Its tools, and what else the template is told: the run's options with those of the line."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What the result's shape needs of the line, e.g. the model's name in an OpenAI request."""


@dataclass(frozen=True)
class BadLine:
    """A line of the input that is no job; its result is an error."""

    index: int
    line: int
    identifier: str | None
    message: str
    hint: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)

    def result(self) -> Result:
        """What is written for it."""
        return Result(self.index, self.line, self.identifier, error=self.message, hint=self.hint, extra=self.extra)


@dataclass(frozen=True)
class Result:
    """What becomes of a job or a bad line; `error` is empty for an answer. Calls are as OpenAI's clients read them."""

    index: int
    line: int
    identifier: str | None
    text: str = ""
    finish_reason: EndReason | None = None
    seed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    error: str = ""
    hint: str = ""
    reasoning: str = ""
    tool_calls: Sequence[Mapping[str, Any]] = field(default_factory=list)
    extra: Mapping[str, Any] = field(default_factory=dict)


def result_of(job: Job, answer: Answer) -> Result:
    """What is written for a job that is answered."""
    return Result(
        index=job.index,
        line=job.line,
        identifier=job.identifier,
        text=answer.text,
        finish_reason=answer.finish_reason,
        seed=answer.seed,
        prompt_tokens=answer.usage.prompt_tokens,
        completion_tokens=answer.usage.completion_tokens,
        reasoning=answer.reasoning,
        tool_calls=[call_fields(call) for call in answer.tool_calls],
        extra=job.extra,
    )
