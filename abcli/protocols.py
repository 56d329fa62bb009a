"""What decoding needs of a vocabulary and of what chooses tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Tokenizer(Protocol):
    """What the loop needs to know of a vocabulary."""

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for; none for control tokens unless `special`."""

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""


class Sampler(Protocol):
    """Chooses tokens; one per answer."""

    @property
    def seed(self) -> int:
        """The seed that is really used."""

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """Let penalties see the prompt."""

    def confidence(self, logits: NDArray[np.float32]) -> float:
        """The probability (0..1) of the likeliest token in logits [vocab] that may come next."""

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose a token from logits [vocab] and remember it."""

    @property
    def finished(self) -> bool:
        """Whether what the answer has to follow is complete, so that no token can come after the last one."""

    @property
    def may_choose_any(self) -> bool:
        """Whether a token that no distribution gives a chance may be chosen, as a grammar or a bias may want it."""

    def close(self) -> None:
        """Free what the sampler holds."""
