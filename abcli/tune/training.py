"""Learns numbers for every head: Adam on their logarithms, through the frozen twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import astuple
from math import cos, isfinite, pi
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

import torch
from torch import Tensor

from abcli.config import HeadNumbers, Tuning
from abcli.errors import UnsupportedModelError
from abcli.evals.prompts import TokenizedQuestion
from abcli.tune.batches import asked_rows
from abcli.tune.guard import Guard
from abcli.tune.settings import Step, TrainingSettings
from abcli.tune.twin import Heads, Twin

# They stay within e^-2 and e^2: beyond, a gain turns a head off or lets it drown the others.
_LARGEST_LOGARITHM = 2.0


class Learner:
    """A tuning as it is learned, kept in a file after each step so that the same call goes on where it stopped.

    However often it was stopped, the same is learned, if it is the number of steps that ends it and not the time.
    """

    def __init__(
        self, twin: Twin, settings: TrainingSettings, file: Path | None = None, *, frugal: bool = False
    ) -> None:
        """Begin, or go on with what is in `file`. A damaged file is begun anew. `frugal` is that of `Twin.logits`."""
        self._twin = twin
        self._settings = settings
        self._file = file
        self._frugal = frugal
        self._logarithms = {
            kind: torch.zeros((1, 1) if settings.single else twin.shapes[kind], device=twin.device, requires_grad=True)
            for kind in settings.learned
        }
        self._optimiser = torch.optim.Adam(self._logarithms.values(), lr=settings.rate, betas=(0.9, 0.95))
        self._seconds = 0.0
        self.steps: list[Step] = []
        """All that were taken, those before an interruption too."""
        self._restore()

    @property
    def tuning(self) -> Tuning:
        """Numbers with four decimals: as many as a profile needs, and one may read them."""

        def rounded(numbers: Tensor | None) -> HeadNumbers:
            rows: list[list[float]] = [] if numbers is None else numbers.detach().cpu().tolist()
            return tuple(tuple(round(number, 4) for number in row) for row in rows)

        heads = self._heads()
        return Tuning(rounded(heads.gains), rounded(heads.multipliers))

    @property
    def share(self) -> float:
        """How much of the way is done, by steps or by time, whichever is more: 0 to 1."""
        return self._share_after(len(self.steps))

    def learn(
        self,
        groups: Sequence[Sequence[TokenizedQuestion]],
        guards: Sequence[Sequence[Guard]],
        on_step: Callable[[Step], None] = lambda _step: None,
    ) -> Tuning:
        """Take the steps that are left, on `groups` of questions, each on one context, and `guards` of several kinds.

        Raises UnsupportedModelError where the model answers with what is no number.
        """
        while self.share < 1:
            begin = monotonic()
            for group in self._optimiser.param_groups:
                group["lr"] = self._settings.rate * 0.5 * (1 + cos(pi * self.share))
            self._optimiser.zero_grad()
            loss = self._ask(groups)
            drifts = [self._guard(kind) for kind in guards]
            divergences = tuple(divergence for divergence, _ in drifts)
            changes = tuple(change for _, change in drifts)
            if not all(map(isfinite, (loss, *divergences, *changes))):
                raise UnsupportedModelError(
                    f"the model's answers are no numbers in torch (step {len(self.steps) + 1}: loss {loss})",
                    "try a lower `rate`, or another model",
                )
            self._optimiser.step()
            with torch.no_grad():
                for logarithms in self._logarithms.values():
                    logarithms.clamp_(-_LARGEST_LOGARITHM, _LARGEST_LOGARITHM)
            number = len(self.steps) + 1
            self._seconds += monotonic() - begin
            self.steps.append(Step(number, self._share_after(number), loss, divergences, changes))
            self._store()
            on_step(self.steps[-1])
        return self.tuning

    def _share_after(self, steps: int) -> float:
        return min(1.0, max(steps / self._settings.steps, self._seconds / self._settings.seconds))

    def _heads(self) -> Heads:
        return Heads(**{kind: of.exp().expand(self._twin.shapes[kind]) for kind, of in self._logarithms.items()})

    def _ask(self, groups: Sequence[Sequence[TokenizedQuestion]]) -> float:
        """Add the gradient of the questions' loss, one context after the other: gradients add up, memory does not."""
        loss = 0.0
        count = self._settings.contexts
        for index in range(len(self.steps) * count, (len(self.steps) + 1) * count):
            turn, place = divmod(index, len(groups))
            order = list(range(len(groups)))
            Random(f"{self._settings.seed}/{turn}").shuffle(order)  # noqa: S311
            asked = asked_rows([groups[order[place]]]).to(self._twin.device)
            logits = self._twin.logits(asked.rows, self._heads(), asked.wanted, frugal=self._frugal)
            one: Tensor = asked.loss(logits) / count
            one.backward()
            loss += float(one.detach())
        return loss

    def _guard(self, kind: Sequence[Guard]) -> tuple[float, float]:
        """Add the gradient of the penalty on the next text of a kind; divergence and change of loss there."""
        drift = kind[len(self.steps) % len(kind)].drift(self._heads(), frugal=self._frugal)
        (self._settings.guard_weight * drift.penalty).backward()
        return float(drift.divergence.detach()), float(drift.loss.detach())

    def _store(self) -> None:
        if self._file is None:
            return
        self._file.parent.mkdir(parents=True, exist_ok=True)
        part = self._file.with_suffix(".part")
        steps = [astuple(step) for step in self.steps]
        logarithms = {kind: of.detach() for kind, of in self._logarithms.items()}
        state = {"logarithms": logarithms, "optimiser": self._optimiser.state_dict()}
        torch.save({**state, "steps": steps, "seconds": self._seconds}, part)
        part.replace(self._file)

    def _restore(self) -> None:
        if self._file is None or not self._file.is_file():
            return
        try:
            # Nothing but numbers: a file cannot make this run anything.
            state: dict[str, Any] = torch.load(self._file, map_location=self._twin.device, weights_only=True)
            steps = [
                Step(int(number), float(share), float(loss), tuple(map(float, divergences)), tuple(map(float, changes)))
                for number, share, loss, divergences, changes in state["steps"]
            ]
            seconds = float(state["seconds"])
            logarithms = {kind: state["logarithms"][kind] for kind in self._logarithms}
            if any(
                of.shape != self._logarithms[kind].shape or not of.isfinite().all() for kind, of in logarithms.items()
            ):
                return
            self._optimiser.load_state_dict(state["optimiser"])
        except Exception:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)
            return
        with torch.no_grad():
            for kind, of in logarithms.items():
                self._logarithms[kind].copy_(of)
        self.steps, self._seconds = steps, seconds
