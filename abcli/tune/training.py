"""Learns a gain for every head: Adam on the logarithms of the gains, through the frozen twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import cos, pi
from pathlib import Path
from random import Random
from time import monotonic

import torch
from torch import Tensor

from abcli.config import Gains
from abcli.evals.prompts import TokenizedQuestion
from abcli.tune.batches import asked_rows
from abcli.tune.guard import Guard
from abcli.tune.twin import Twin

_RATE = 0.03
# Gains stay within e^-2 and e^2: beyond, a head is off or drowns the others.
_LARGEST_LOGARITHM = 2.0


@dataclass(frozen=True)
class TrainingSettings:
    """How long, at most, and how: `contexts` go into a step, beside one guard of each kind."""

    steps: int = 60
    seconds: float = 3600.0
    contexts: int = 8
    guard_weight: float = 1.0
    seed: int = 0
    frugal: bool = False


@dataclass(frozen=True)
class Step:
    """What a step found, in nats per token: the loss on the questions, and the divergences of the guards."""

    number: int
    share: float
    """Of the way, 0 to 1."""
    loss: float
    divergences: tuple[float, ...]


class Learner:
    """Gains as they are learned, kept in a file after each step so that the same call goes on where it stopped."""

    def __init__(self, twin: Twin, settings: TrainingSettings, file: Path | None = None) -> None:
        """Begin, or go on with what is in `file`. A damaged file is begun anew."""
        self._twin = twin
        self._settings = settings
        self._file = file
        self._logarithms = torch.zeros((twin.layers, twin.heads), device=twin.device, requires_grad=True)
        self._optimiser = torch.optim.Adam([self._logarithms], lr=_RATE, betas=(0.9, 0.95))
        self._number, self._seconds = 0, 0.0
        self._restore()

    @property
    def gains(self) -> Gains:
        """Gains with four decimals: as many as a profile needs, and one may read them."""
        rows: list[list[float]] = self._logarithms.detach().exp().cpu().tolist()
        return tuple(tuple(round(gain, 4) for gain in row) for row in rows)

    @property
    def share(self) -> float:
        """How much of the way is done, by steps or by time, whichever is more: 0 to 1."""
        return min(1.0, max(self._number / self._settings.steps, self._seconds / self._settings.seconds))

    def learn(
        self,
        groups: Sequence[Sequence[TokenizedQuestion]],
        guards: Sequence[Sequence[Guard]],
        on_step: Callable[[Step], None] = lambda _step: None,
    ) -> Gains:
        """Take the steps that are left, on `groups` of questions, each on one context, and `guards` of several kinds.

        The learning rate falls to 0 along a cosine.
        """
        while self.share < 1:
            begin = monotonic()
            for group in self._optimiser.param_groups:
                group["lr"] = _RATE * 0.5 * (1 + cos(pi * self.share))
            self._optimiser.zero_grad()
            loss = self._ask(groups)
            divergences = tuple(self._guard(kind) for kind in guards)
            self._optimiser.step()
            with torch.no_grad():
                self._logarithms.clamp_(-_LARGEST_LOGARITHM, _LARGEST_LOGARITHM)
            self._number += 1
            self._seconds += monotonic() - begin
            self._store()
            on_step(Step(self._number, self.share, loss, divergences))
        return self.gains

    def _ask(self, groups: Sequence[Sequence[TokenizedQuestion]]) -> float:
        """Add the gradient of the questions' loss, one context after the other: gradients add up, memory does not."""
        loss = 0.0
        for index in range(self._number * self._settings.contexts, (self._number + 1) * self._settings.contexts):
            turn, place = divmod(index, len(groups))
            order = list(range(len(groups)))
            Random(f"{self._settings.seed}/{turn}").shuffle(order)  # noqa: S311
            asked = asked_rows([groups[order[place]]])
            device = self._twin.device
            logits = self._twin.logits(
                asked.rows.to(device), self._logarithms.exp(), asked.wanted.to(device), frugal=self._settings.frugal
            )
            one: Tensor = asked.loss(logits.cpu()) / self._settings.contexts
            one.backward()
            loss += float(one.detach())
        return loss

    def _guard(self, kind: Sequence[Guard]) -> float:
        """Add the gradient of the divergence from the untuned model on the next text of a kind."""
        found = kind[self._number % len(kind)].divergence(self._twin, self._logarithms.exp())
        (self._settings.guard_weight * found).backward()
        return float(found.detach())

    def _store(self) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        part = self._file.with_suffix(".part")
        state = {"logarithms": self._logarithms.detach(), "optimiser": self._optimiser.state_dict()}
        torch.save({**state, "number": self._number, "seconds": self._seconds}, part)
        part.replace(self._file)

    def _restore(self) -> None:
        if self._file is None or not self._file.is_file():
            return
        try:
            # Nothing but numbers: a file cannot make this run anything.
            state = torch.load(self._file, map_location=self._twin.device, weights_only=True)
            with torch.no_grad():
                self._logarithms.copy_(state["logarithms"])
            self._optimiser.load_state_dict(state["optimiser"])
            self._number, self._seconds = int(state["number"]), float(state["seconds"])
        except Exception:
            self._file.unlink(missing_ok=True)
