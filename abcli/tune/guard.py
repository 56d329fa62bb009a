"""What keeps a tuned model the model it was: the distance of its words from the untuned one's, on other work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from abcli.tune.batches import text_rows
from abcli.tune.twin import Rows, Twin


@dataclass(frozen=True)
class Guard:
    """Texts of one kind, and what the untuned model says after their tokens: float32 [n, vocabulary]."""

    rows: Rows
    wanted: Tensor
    log_probabilities: Tensor

    def divergence(self, twin: Twin, gains: Tensor) -> Tensor:
        """The mean Kullback-Leibler divergence, in nats per token, of the untuned model from the tuned one."""
        found = twin.logits(self.rows, gains, self.wanted).log_softmax(-1)
        known = self.log_probabilities
        return (known.exp() * (known - found)).sum(-1).mean()


def make_guards(twin: Twin, texts: Sequence[Sequence[int]], begins: Sequence[int]) -> list[Guard]:
    """A guard for each text; its tokens before number `begins` are context only."""
    guards = []
    for text, begin in zip(texts, begins, strict=True):
        rows, wanted = text_rows([text], [begin])
        rows, wanted = rows.to(twin.device), wanted.to(twin.device)
        with torch.no_grad():
            guards.append(Guard(rows, wanted, twin.logits(rows, None, wanted).log_softmax(-1)))
    return guards
