"""How much of the state that one prompt left in a slot may serve another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abcli.generate import common_prefix


@dataclass(frozen=True)
class ReuseRule:
    """How much of one prompt's state may serve another without changing the other's answer.

    With a prefill that one bucket computes for all, a prompt's last token and the answer's tokens are computed by
    each bucket, and so is a whole prompt shorter than `least`: their state differs a little from what the shared
    prefill would make of the same tokens. Reusing only what a shared prefill made, and leaving it at least `least`
    tokens to compute, gives every prompt the state it would have alone, whatever ran in its slot before.
    """

    least: int = 1
    """The fewest tokens of a prompt that are computed: 1 if each bucket computes its own, else the shared minimum."""

    def usable(self, held: Sequence[int], prompt: Sequence[int]) -> int:
        """How many tokens of `prompt` can be taken over from a slot in which the prompt `held` was computed."""
        if self.least == 1:
            return max(0, min(common_prefix(held, prompt), len(prompt) - 1))
        sound = len(held) - 1 if len(held) >= self.least else 0
        return max(0, min(common_prefix(held, prompt), sound, len(prompt) - self.least))
