"""An engine whose logits look random but depend only on the tokens it holds and the base of the bucket."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tests.support.fakes import VOCABULARY, FakeEngine

BASES = (5e3, 1e4, 2e4)


class RandomEngine(FakeEngine):
    """`scale` says how sharp the distributions are; buckets agree more than not."""

    def __init__(
        self,
        bases: Sequence[float] = BASES,
        scale: float = 4.0,
        vocabulary: int = VOCABULARY,
        context_size: int = 512,
        slots: int = 1,
    ) -> None:
        super().__init__(
            lambda _tokens, _bucket: 0,
            bases=tuple(bases),
            slots=slots,
            context_size=context_size,
            vocabulary=vocabulary,
        )
        self.backend.logits = lambda tokens, column: self.row(tokens, self.bases[column])  # type: ignore[method-assign]
        self.prefills: list[int] = []
        self._scale = scale

    def prefill(self, slot: int, tokens: Sequence[int], on_progress: object = None) -> NDArray[np.float32]:
        self.prefills.append(len(tokens))
        return super().prefill(slot, tokens)

    def row(self, tokens: Sequence[int], base: float) -> NDArray[np.float32]:
        """The logits [vocabulary] of the bucket of `base` after `tokens`."""
        common = np.random.default_rng([*tokens, 0]).normal(0, self._scale, self.vocabulary_size)
        own = np.random.default_rng([*tokens, int(base)]).normal(0, self._scale / 3, self.vocabulary_size)
        return (common + own).astype(np.float32)

    def rows(self, tokens: Sequence[int], bases: Sequence[float] | None = None) -> NDArray[np.float32]:
        """The logits [bases, vocabulary] after `tokens`, without computing anything."""
        return np.stack([self.row(tokens, base) for base in (self.bases if bases is None else bases)])
