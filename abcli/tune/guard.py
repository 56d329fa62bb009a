"""What keeps a tuned model the model it was: the distance of its words from the untuned one's, on other work."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from abcli.tune.batches import text_rows
from abcli.tune.twin import Heads, Twin


class Guard:
    """A text of two tokens or more that the tuned model should find as likely as the untuned one."""

    def __init__(self, twin: Twin, text: Sequence[int], begin: int = 1) -> None:
        """The tokens of `text` before number `begin` are context only."""
        rows, wanted = text_rows([text], [begin])
        self.text = tuple(text)
        self._twin = twin
        self._rows, self._wanted = rows.to(twin.device), wanted.to(twin.device)

    def divergence(self, heads: Heads, *, frugal: bool = False) -> Tensor:
        """The mean Kullback-Leibler divergence, in nats per token, of the untuned model from the tuned one."""
        known = self._twin.spoken(self._untuned).log_softmax(-1)
        found = self._twin.logits(self._rows, heads, self._wanted, frugal=frugal).log_softmax(-1)
        return (known.exp() * (known - found)).sum(-1).mean()

    @cached_property
    def _untuned(self) -> Tensor:
        """What the untuned model makes of the text, float32 [n, embedding]: its logits would take far more memory."""
        with torch.no_grad():
            return self._twin.hidden(self._rows, Heads(), self._wanted)
