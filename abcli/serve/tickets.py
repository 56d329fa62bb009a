"""What is asked of the thread that computes, and what it delivers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from abcli.chat.answer import Piece
from abcli.chat.asking import AnswerReader
from abcli.errors import AbcliError
from abcli.generate import Answer as RunningAnswer
from abcli.generate import Statistics
from abcli.sampling import GenerationConfig
from abcli.serve.chosen import Chosen, Watcher


@dataclass(frozen=True)
class Delivery:
    """What a step gave one answer: a piece, the tokens chosen in it and, if wanted, the numbers so far, the error that
    ends it, or, before all pieces, how likely the prompt's tokens are after the first, or how much of the prompt is
    computed.
    """

    piece: Piece | None = None
    chosen: tuple[Chosen, ...] = ()
    error: AbcliError | None = None
    scored: tuple[Chosen, ...] = ()
    statistics: Statistics | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class Progress:
    """Numbers of tokens of a prompt: all, those that were there already, and with them those computed in `seconds`."""

    total: int
    cached: int
    processed: int
    seconds: float


@dataclass(eq=False)
class Ticket:
    """An answer that is wanted. `deliver` is called by the worker's thread, until a piece has the answer or an error.

    `deadline` is the time (`time.monotonic`) at which it is given up; `fresh` takes over nothing of other prompts. With
    `score` it is told how likely the prompt's tokens are, and so many of the likeliest at each place, with `timings`
    the numbers so far with each piece, with `progress` how much of the prompt is computed.
    """

    tokens: Sequence[int]
    config: GenerationConfig
    reader: AnswerReader
    deliver: Callable[[Delivery], None]
    deadline: float
    fresh: bool = False
    score: int | None = None
    progress: bool = False
    timings: bool = False
    watcher: Watcher | None = None
    gone: bool = False
    """Nobody waits for it any more."""
    running: RunningAnswer | None = None
    begun: bool = False
    """Its prompt is complete."""
    scored: list[Chosen] = field(default_factory=list)
