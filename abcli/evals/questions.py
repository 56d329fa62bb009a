"""What an evaluation task is made of: questions on contexts, each with its answer and the depth of what it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from abcli.chat.messages import Tool

# The number of tokens of a text, without the tokens that begin or end a prompt.
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    """A question on a context. Questions on one context follow each other, so that its prefill serves them all."""

    identifier: str
    """Names the question in its run: task, length, number of the context, number in the context."""
    group: str
    """Names the context: answers on one context are not independent, so statistics resample whole groups."""
    context: str
    text: str
    """What is asked after the context."""
    answer_start: str
    """How the model's answer begins; the scores are those of what follows. May be empty."""
    answer: str
    """The right continuation of `answer_start`, with the space it may need in front."""
    depth: float
    """Where in the context the needed passage stands: 0 at its beginning, 1 at its end."""
    length: int
    """The length in tokens that was asked for."""
    candidates: tuple[str, ...] = ()
    """All continuations to choose from, the answer among them; empty if nothing is to be ranked."""
    tools: tuple[Tool, ...] = ()
    """Functions, one of which is to be called, in the model's own format: the answer is its name, `context` the text of
    these, which is not put before the question."""


@dataclass(frozen=True)
class TaskSettings:
    """Which questions a task makes; the same settings make the same questions."""

    length: int
    """Tokens of the context, at most; it is filled as far as whole facts, pairs or documents allow."""
    limit: int
    """The number of questions."""
    seed: int = 0
    depths: int = 5
    """The number of depths, evenly spaced from 0 to 1, that the questions take in turn."""
    data: Path | None = None
    """The user's file: prose for `needle`, questions for `qa`, requests for `tools`."""
    answers: Path | None = None
    """The file of right calls for `tools`."""


class Task(Protocol):
    """Makes the questions of a task."""

    def __call__(self, settings: TaskSettings, count: CountTokens) -> Iterator[Question]:
        """Yield `settings.limit` questions, or raise EvaluationDataError if the data does not give as many."""


def end_of_context(groups: Sequence[str], count: int) -> int:
    """`count`, and as many more as end the last one's context; `groups` names the context of each question."""
    while 0 < count < len(groups) and groups[count] == groups[count - 1]:
        count += 1
    return count
