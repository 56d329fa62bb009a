"""What the driver of a batch and its workers say to each other, whatever carries it from machine to machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from abcli.batch.jobs import Job, Result
from abcli.batch.scheduler import Totals
from abcli.config import UNTUNED, Buckets, ContextConfig, LoraConfig, Tuning
from abcli.errors import AbcliError


@dataclass(frozen=True)
class WorkerSetup:
    """What a worker opens: the same model with the same settings as every other, found on its own machine."""

    model: str | None
    """Its name as `locate_model` takes it; a path is absolute."""
    fingerprint: str
    """Of the model that the output is bound to."""
    gpu_layers: int
    lora: tuple[LoraConfig, ...]
    """With absolute paths."""
    context: ContextConfig
    """Its `slots` are the worker's own affair."""
    buckets: Buckets
    template: str | None
    """The chat template's source; None for the model's own."""
    slots: int | None
    """None for as many as the worker's memory allows."""
    tuning: Tuning = UNTUNED


@dataclass(frozen=True)
class Joined:
    """A worker is ready for prompts."""

    worker: int
    slots: int
    text: str
    """What a person may want to know of it."""
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class WorkerReport:
    """What a worker has done since its last one."""

    worker: int
    results: Sequence[Result]
    totals: Totals
    """Of everything that this worker has done since it began."""
    ended: bool = False
    """Whether it was told to stop, and has."""
    warnings: Sequence[str] = ()
    """What went wrong without harm since."""


@dataclass(frozen=True)
class Died:
    """A worker is gone, and what it had not answered with it."""

    worker: int
    reason: str


@dataclass(frozen=True)
class Refused:
    """A worker cannot do what it was asked for, nor could another in its place."""

    worker: int
    error: AbcliError


Event: TypeAlias = Joined | WorkerReport | Died | Refused


@dataclass(frozen=True)
class Refusal:
    """Why a worker cannot open what it was told to."""

    message: str
    hint: str = ""


@dataclass(frozen=True)
class Opened:
    """What a worker has opened: its number of slots, their plan in words, and what went wrong without harm."""

    slots: int
    plan: str
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Done:
    """What a worker has done since it was asked last, as it says it itself; `failure` is why it can go on no more."""

    results: Sequence[Result]
    totals: Totals
    ended: bool = False
    failure: str = ""
    warnings: Sequence[str] = ()


class Pool(Protocol):
    """Workers by their numbers, from 0; of each number there is one at a time."""

    workers: int
    """How many there are."""

    def start(self, worker: int) -> None:
        """Begin to make a worker, in the place of one that died; Joined, Died or Refused follows."""

    def exchange(self, worker: int, jobs: Sequence[Job], *, stop: bool) -> None:
        """Give a worker jobs, and ask for what it has done; WorkerReport or Died follows, after a moment at the latest.

        With `stop` it finishes what it has begun, and drops the rest.
        """

    def wait(self, seconds: float) -> Sequence[Event]:
        """What has happened; nothing if nothing does in that time."""

    def close(self) -> None:
        """End every worker, whatever it does."""
