"""What a tuning is asked for, and what learning comes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from abcli.config import Tuning
from abcli.tune.material import Item, Sources

# Fields of a tuning.
Kind = Literal["gains", "multipliers"]


@dataclass(frozen=True)
class TrainingSettings:
    """How long, at most, and how: `contexts` go into a step, beside one guard of each kind."""

    steps: int = 60
    seconds: float = 3600.0
    contexts: int = 8
    rate: float = 0.03
    """Of Adam, on logarithms; it falls to 0 along a cosine."""
    guard_weight: float = 1.0
    seed: int = 0
    single: bool = False
    """Learn one number for all heads."""
    learned: tuple[Kind, ...] = ("gains",)


@dataclass(frozen=True)
class Step:
    """What a step found, in nats per token: the loss on the questions, and one text of each kind of guard."""

    number: int
    share: float
    """Of the way, 0 to 1."""
    loss: float
    divergences: tuple[float, ...]
    """Of the untuned model from the tuned one, on the texts."""
    changes: tuple[float, ...]
    """Of the loss on the texts, from the untuned model to the tuned one."""


@dataclass(frozen=True)
class TuningSettings:
    """What is learned from, and for how long. A task is one of `eval`'s, or else the path of a file of examples."""

    tasks: tuple[str, ...] = ("needle", "kv")
    length: int = 1024
    sources: Sources = field(default_factory=Sources)
    text: Path | None = None
    """Prose of the user's to stay as good at, instead of what comes with abcli."""
    training: TrainingSettings = field(default_factory=TrainingSettings)
    controls: bool = True


@dataclass(frozen=True)
class Learned:
    """A tuning, and how it came about."""

    tuning: Tuning
    steps: tuple[Step, ...]
    twin_divergence: float
    """Mean nats per token between the twin and llama.cpp."""
    items: Mapping[str, Sequence[Item]]
    """What was learned from, by task."""
    controls: Mapping[str, Tuning]
    """What tells seeing better from answering in another form: tunings learned so that they cannot see more."""
