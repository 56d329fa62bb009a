"""Thoughts of bounded length: when a thought has had its tokens, the model's own marker ends it."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from abcli.protocols import Sampler
from abcli.sampling import ThoughtLimit


class LimitedSampler:
    """A sampler that ends the thought with which an answer begins; its tokens are otherwise another sampler's."""

    def __init__(self, inner: Sampler, limit: ThoughtLimit, piece: Callable[[int], bytes]) -> None:
        """`piece` gives the bytes of any token, those of control tokens included."""
        self._inner = inner
        self._limit = limit
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._thinking = limit.opened
        self._left = limit.tokens
        self._over = False
        self._forced: list[int] = []
        self._end_if_due()

    @property
    def seed(self) -> int:
        """See `abcli.generate.Sampler`, as for all that follows."""
        return self._inner.seed

    @property
    def finished(self) -> bool:
        return self._inner.finished

    @property
    def may_choose_any(self) -> bool:
        return bool(self._forced) or self._inner.may_choose_any

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        self._inner.accept_prompt(tokens)

    def confidence(self, logits: NDArray[np.float32]) -> float:
        return 1.0 if self._forced else self._inner.confidence(logits)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """The next token: a part of what ends the thought, or the other sampler's choice."""
        if self._forced:
            only = np.full_like(logits, -np.inf)
            only[self._forced.pop(0)] = 0
            return self._inner.sample(only)
        token = self._inner.sample(logits)
        if not self._over:
            self._follow(token)
        return token

    def close(self) -> None:
        self._inner.close()

    def _follow(self, token: int) -> None:
        """Find out whether the thought has begun, is over, or has to be."""
        limit = self._limit
        self._text += self._decoder.decode(self._piece(token))
        if not self._thinking:
            begun = self._text.lstrip()
            self._thinking = begun.startswith(limit.begin)
            self._over = not limit.begin.startswith(begun[: len(limit.begin)])
            self._text = begun[len(limit.begin) :] if self._thinking else self._text
        else:
            self._left -= 1
        self._over = self._over or (self._thinking and limit.end in self._text)
        self._end_if_due()

    def _end_if_due(self) -> None:
        """Force the end once the budget is used up, but within no character and not within the end itself."""
        if self._over or not self._thinking or self._left > 0:
            return
        end = self._limit.end
        within_end = any(self._text.endswith(end[:length]) for length in range(1, len(end)))
        # At the very budget's end only: a text that goes on like "<" is no end.
        if (within_end and self._left > -len(end)) or self._decoder.getstate()[0]:
            return
        self._forced, self._over = list(self._limit.closing), True
