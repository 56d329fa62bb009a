"""Look-up drafts: what an answer says next is guessed from what was said before, and checked several tokens at once.

An answer that repeats its prompt, as an edited file does, is guessed right for long stretches. A draft is only a guess:
every token is chosen from what the buckets say of it, so that the answer is what it is without drafts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import floor, log

# A guess is what followed the same tokens before, so many at least; more are worth more, up to so many.
_LEAST_MATCH = 3
_LONGEST_MATCH = 16
# As many of the latest places with the same tokens are compared.
_PLACES = 8
# Time that may be lost, in tokens' worth: in an answer at first, and for every token that is chosen without a draft.
_FIRST_CREDIT = 1.0
_CREDIT_PER_TOKEN = 0.005
_MOST_CREDIT = 16.0
# What a draft's token is taken to cost before any was measured, in tokens' worth.
_FIRST_COST = 0.75
# How much a new measurement counts beside the older ones.
_NEW_SHARE = 0.25
# A measurement of a busy machine says little: no token of a draft costs more than one alone.
_LEAST_COST, _MOST_COST = 0.01, 1.0
# How often the next token of a draft is taken to be right in an answer that had none, and how much one more counts.
_FIRST_RIGHT = 0.8
_NEW_RIGHT = 0.1
_MOST_RIGHT = 0.999


class Lookup:
    """The places of all runs of a few tokens in one text that grows."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._places: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)

    def draft(self, tokens: Sequence[int], longest: int) -> list[int]:
        """At most `longest` tokens that may follow `tokens`, which begin with those of the call before."""
        held = self._tokens
        for token in tokens[len(held) :]:
            if len(held) >= _LEAST_MATCH:
                self._places[tuple(held[-_LEAST_MATCH:])].append(len(held))
            held.append(token)
        places = self._places.get(tuple(held[-_LEAST_MATCH:]), [])[-_PLACES:]
        if longest < 1 or not places:
            return []
        best = max(places, key=lambda place: (self._match(place), place))
        return held[best : best + longest]

    def _match(self, place: int) -> int:
        """How many tokens before `place` are those at the end."""
        held = self._tokens
        most = min(place, _LONGEST_MATCH)
        return next(
            (length for length in range(_LEAST_MATCH, most) if held[place - 1 - length] != held[-1 - length]), most
        )


class Budget:
    """How long drafts may be, so that they pay: their time and how often they are right are measured, and what they
    lose is bounded."""

    def __init__(self) -> None:
        self._cost = _FIRST_COST
        self._seconds = 0.0
        self.begin()

    def begin(self) -> None:
        """An answer begins: what drafts cost is known from those before, what they are worth is not."""
        self._credit = _FIRST_CREDIT
        self._right = _FIRST_RIGHT
        self._after_draft = False

    @property
    def tokens(self) -> int:
        """The most tokens that the next draft may have; none until a token was chosen without a draft.

        The k-th token saves one with probability right^k, so that it pays up to k = log(cost) / log(right).
        """
        paying = max(1, floor(log(self._cost) / log(self._right)))
        return min(paying, int(self._credit / self._cost)) if self._seconds else 0

    def chosen(self, seconds: float) -> None:
        """A token was chosen without a draft, in `seconds`."""
        if self._after_draft:
            # llama.cpp builds its graph for one token anew.
            self._after_draft = False
            self._credit -= min(_MOST_COST, max(0.0, seconds / self._seconds - 1))
            return
        self._seconds += (seconds - self._seconds) * (_NEW_SHARE if self._seconds else 1)
        self._credit = max(self._credit, min(_FIRST_CREDIT, self._credit + _CREDIT_PER_TOKEN))

    def tried(self, drafted: int, gained: int, seconds: float) -> None:
        """A draft of `drafted` tokens, of which `gained` were right, took `seconds` with the token before it."""
        if not self._seconds:
            return
        self._after_draft = True
        cost = min(_MOST_COST, max(_LEAST_COST, (seconds / self._seconds - 1) / drafted))
        self._cost += (cost - self._cost) * _NEW_SHARE
        self._credit = min(_MOST_CREDIT, self._credit + gained - cost * drafted)
        for place in range(min(drafted, gained + 1)):
            self._right += (_MOST_RIGHT * (place < gained) - self._right) * _NEW_RIGHT
