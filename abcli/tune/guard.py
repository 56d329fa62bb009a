"""What keeps a tuned model the model it was: how far its words are from the untuned one's, on other work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from abcli.tune.batches import text_rows
from abcli.tune.twin import Heads, Twin


@dataclass(frozen=True)
class Drift:
    """How far a tuned model is from the untuned one on a text, in nats per token, as tensors of one number."""

    divergence: Tensor
    """The mean Kullback-Leibler divergence of the untuned model from the tuned one."""
    loss: Tensor
    """By how much the text has become less likely; below 0 it is likelier."""
    penalty: Tensor
    """What a learner is to keep small."""


class Guard:
    """A text of two tokens or more that the tuned model should find as likely as the untuned one."""

    def __init__(self, twin: Twin, text: Sequence[int], begin: int = 1, *, own: bool = False) -> None:
        """The tokens of `text` before number `begin` are context only; `own` are words of the untuned model itself.

        Other words must not become less likely either. With that on its own, too, more answers repeated themselves.
        """
        rows, wanted = text_rows([text], [begin])
        self.text = tuple(text)
        self._own = own
        self._twin = twin
        self._rows, self._wanted = rows.to(twin.device), wanted.to(twin.device)

    def drift(self, heads: Heads, *, frugal: bool = False) -> Drift:
        """How far the model is that `heads` make; `frugal` is that of `Twin.logits`."""
        known = self._twin.spoken(self._untuned).log_softmax(-1)
        found = self._twin.logits(self._rows, heads, self._wanted, frugal=frugal).log_softmax(-1)
        less = known - found
        following = self._rows.tokens[0, self._wanted[:, 1] + 1]
        divergence, loss = (known.exp() * less).sum(-1).mean(), less.gather(1, following[:, None]).mean()
        # That a text becomes likelier is not punished twice, and not rewarded.
        return Drift(divergence, loss, divergence if self._own else divergence + loss.relu())

    @cached_property
    def _untuned(self) -> Tensor:
        """What the untuned model makes of the text, float32 [n, embedding]: its logits would take far more memory."""
        with torch.no_grad():
            return self._twin.hidden(self._rows, Heads(), self._wanted)
