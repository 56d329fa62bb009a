"""Thoughts of bounded length: when a thought has had its tokens, the model's own marker ends it."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from abcli.protocols import Sampler
from abcli.sampling import ThoughtLimit


class LimitedSampler:
    """A sampler that ends thoughts that have had their tokens; it chooses as another sampler does otherwise."""

    def __init__(self, inner: Sampler, limit: ThoughtLimit, piece: Callable[[int], bytes]) -> None:
        """`piece` gives the bytes of any token, those of control tokens included."""
        self._inner = inner
        self._limit = limit
        self._piece = piece
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._thinking = limit.opened
        self._left = limit.tokens
        self._over, self._ended = False, False
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
        """Find out whether a thought has begun, is over, or has to be."""
        limit = self._limit
        self._text += self._decoder.decode(self._piece(token))
        if self._thinking:
            self._left -= 1
            if limit.end in self._text:
                self._stop_thinking()
        else:
            self._look_for_begin()
        self._end_if_due()

    def _look_for_begin(self) -> None:
        begin = self._limit.begin
        if self._limit.saying:
            before, found, after = self._text.partition(begin)
            begun = found + after
            # No more of it can belong to a marker that is still to come.
            self._text = before[-len(begin) :]
        else:
            begun = self._text.lstrip()
            self._over = not begin.startswith(begun[: len(begin)])
        if begun.startswith(begin):
            self._thinking, self._text = True, begun[len(begin) :]

    def _stop_thinking(self) -> None:
        self._thinking, self._text = False, ""
        self._over = not self._limit.saying

    def _end_if_due(self) -> None:
        """Force the end once the budget is used up, but within no character and not within the end itself."""
        if not self._thinking or self._left > 0:
            return
        end = self._limit.end
        within_end = any(self._text.endswith(end[:length]) for length in range(1, len(end)))
        # At the very budget's end only: a text that goes on like "<" is no end.
        if (within_end and self._left > -len(end)) or self._decoder.getstate()[0]:
            return
        self._forced = [*self._limit.closing, *(self._limit.saying if self._ended else ())]
        self._ended = True
        self._stop_thinking()
