"""How likely texts are: the merged log-probability of each of their tokens after what stands before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from abcli.engine.engine import Engine
from abcli.errors import ContextFullError
from abcli.merge import Merged, likeliest
from abcli.reuse import ReuseRule

# Fewer tokens than this are sooner computed than copied from another slot.
_WORTH_COPYING = 32

# Merges logits [buckets, vocabulary].
Merge = Callable[[NDArray[np.float32]], Merged]
Tokens = Sequence[int]


@dataclass(frozen=True)
class TokenScore:
    """A token of a text, and how likely the merged buckets find it, before temperature and penalties."""

    token: int
    log_probability: float
    """The natural logarithm."""
    likeliest: bool
    """Whether no token is likelier."""
    top: tuple[tuple[int, float], ...] = ()
    """As many as asked for of the likeliest tokens, each with its log-probability, the likeliest first."""


@dataclass(eq=False)
class Beginning:
    """What some continuations begin with: `length` tokens, of which `token` is the last."""

    token: int = -1
    length: int = 0
    following: dict[int, Beginning] = field(default_factory=dict)
    """By the tokens that they go on with."""


class Walk:
    """A way through all beginnings of some continuations, on which what they share is passed once."""

    def __init__(self, continuations: Sequence[Tokens]) -> None:
        """Common beginnings are joined; what is whole is no beginning of more, and not on the way."""
        self.root = Beginning()
        self.path: list[int] = []
        """The tokens of the last beginning that was taken."""
        for tokens in continuations:
            node = self.root
            for token in tokens:
                node = node.following.setdefault(token, Beginning(token, node.length + 1))
        self._left = [self.root] if self.root.following else []

    @property
    def next(self) -> Beginning | None:
        """What is taken next; first the root, at the end of the way nothing."""
        return self._left[-1] if self._left else None

    def take(self, limit: int) -> list[Beginning]:
        """The next beginnings, at most `limit`: each after the first has one token more than the one before."""
        taken: list[Beginning] = []
        while self._left and len(taken) < limit and (not taken or self._left[-1].length == taken[-1].length + 1):
            node = self._left.pop()
            taken.append(node)
            if node.length:
                self.path[node.length - 1 :] = [node.token]
            self._left += [child for child in reversed(node.following.values()) if child.following]
        return taken

    def along(self, tokens: Tokens) -> Iterator[Beginning]:
        """The beginning before each of the tokens of a continuation."""
        node = self.root
        for token in tokens:
            yield node
            node = node.following[token]


@dataclass(eq=False)
class _Group:
    """Continuations of one context; `places` are theirs among all that is asked."""

    context: Tokens
    places: list[int]
    walk: Walk
    scores: dict[Beginning, dict[int, TokenScore]] = field(default_factory=dict)


class Scorer:
    """Scores continuations in all slots of an engine, the first token of each with the end of its context.

    What contexts share is computed once, and so is what the continuations of a context begin with. One thread at a
    time; nothing else may be in progress in the slots.
    """

    def __init__(self, engine: Engine, merge: Merge, top: int = 0) -> None:
        """`top` likeliest tokens are told at each place."""
        self._engine = engine
        self._merge = merge
        self._top = top
        self._reuse = ReuseRule(engine.least_shared)
        self._active: dict[int, _Group] = {}
        # The contexts that were computed in the slots. What stands there of earlier work is used only where each
        # bucket computes prompts itself: no score depends on what came before it.
        shared = engine.least_shared > 1
        self._held: dict[int, Tokens] = {s: () if shared else tuple(engine.tokens(s)) for s in range(engine.slots)}

    def score(
        self, asked: Sequence[tuple[Tokens, Tokens]], on_done: Callable[[int], object] = lambda _done: None
    ) -> list[tuple[TokenScore, ...]]:
        """The scores of the tokens of each (context, continuation), of which contexts have one token or more.

        `on_done` gets the number of continuations that are done. Raises ContextFullError before anything is computed,
        CancelledError and NativeError.
        """
        for context, continuation in asked:
            needed = len(context) + len(continuation) - 1
            if needed > self._engine.context_size:
                raise ContextFullError(needed, self._engine.context_size)
        found: list[tuple[TokenScore, ...]] = [()] * len(asked)
        waiting = _groups(asked)
        done = sum(not continuation for _context, continuation in asked)
        try:
            while waiting or self._active:
                self._begin(waiting)
                self._advance()
                for group in self._finished():
                    for place in group.places:
                        tokens = asked[place][1]
                        before = zip(group.walk.along(tokens), tokens, strict=True)
                        found[place] = tuple(group.scores[beginning][token] for beginning, token in before)
                    done += len(group.places)
                    on_done(done)
        finally:
            for slot in self._active:
                self._engine.drop(slot)
            self._active.clear()
        return found

    def _finished(self) -> list[_Group]:
        """What is done; its slots are free then."""
        ended = [slot for slot, group in self._active.items() if group.walk.next is None]
        return [self._active.pop(slot) for slot in ended]

    def _begin(self, waiting: list[_Group]) -> None:
        """Give free slots the next contexts, unless one that is being computed will be of more use to them."""
        engine = self._engine
        for slot in range(engine.slots):
            if slot in self._active or not waiting:
                continue
            context = waiting[-1].context
            usable = {other: self._reuse.usable(held, context) for other, held in self._held.items()}
            source = max(usable, key=lambda other: (usable[other], other == slot))
            if self._engine.waiting(source) and usable[source] >= usable[slot] + _WORTH_COPYING:
                return
            if usable[source] >= usable[slot] + _WORTH_COPYING:
                engine.copy(source, slot)
                self._held[slot] = self._held[source]
                usable[slot] = usable[source]
            self._active[slot] = waiting.pop()
            kept = engine.truncate(slot, min(usable[slot], len(engine.tokens(slot))))
            self._held[slot] = context
            engine.begin(slot, context[kept:])

    def _advance(self) -> None:
        """Compute a piece of the contexts that wait, or else the next beginnings of every slot's continuations."""
        engine = self._engine
        if any(engine.waiting(slot) for slot in self._active):
            for slot, logits in engine.step({}).items():
                walk = self._active[slot].walk
                # Else it is what a recurrent model had to compute again.
                if walk.next is walk.root:
                    self._note(self._active[slot], walk.take(1), [logits])
            return
        room = engine.outputs
        taken: dict[int, list[Beginning]] = {}
        for index, (slot, group) in enumerate(self._active.items()):
            assert group.walk.next is not None  # noqa: S101 - it would have finished
            length = len(group.context) + group.walk.next.length - 1
            kept = engine.truncate(slot, length)
            if kept < length:
                # A recurrent model has forgotten everything.
                engine.begin(slot, [*group.context, *group.walk.path][kept:length])
                continue
            taken[slot] = group.walk.take(max(1, room // (len(self._active) - index)))
            room -= len(taken[slot])
        if taken:
            found = engine.read({slot: [beginning.token for beginning in run] for slot, run in taken.items()})
            for slot, run in taken.items():
                self._note(self._active[slot], run, found[slot])

    def _note(self, group: _Group, run: Sequence[Beginning], rows: Iterable[NDArray[np.float32]]) -> None:
        """Score what may follow beginnings; `rows` are the logits [buckets, vocabulary] after each."""
        for beginning, logits in zip(run, rows, strict=True):
            logs = self._merge(logits).log_probabilities
            best = logs.max()
            top = tuple((int(token), float(logs[token])) for token in likeliest(logs, self._top))
            group.scores[beginning] = {
                token: TokenScore(token, float(logs[token]), bool(logs[token] == best), top)
                for token in beginning.following
            }


def _groups(asked: Sequence[tuple[Tokens, Tokens]]) -> list[_Group]:
    """What is asked of each context together; the last comes first, and neighbours share most."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, (context, continuation) in enumerate(asked):
        if continuation:
            places.setdefault(tuple(context), []).append(place)
    return [
        _Group(context, places[context], Walk([asked[place][1] for place in places[context]]))
        for context in sorted(places, reverse=True)
    ]


def windows(tokens: Tokens, size: int, overlap: int = 1) -> list[tuple[Tokens, Tokens]]:
    """(context, continuation) pairs that cover all tokens but the first, each once, in order.

    A continuation has at least `overlap` tokens before it, as far as there are any, and a window holds `size` tokens
    beside the last one, which needs no place.
    """
    pairs = []
    start = 1
    while start < len(tokens):
        first = max(0, start - overlap)
        end = min(len(tokens), first + size + 1)
        # The last window is as long as the others: its tokens have more before them.
        first = max(0, min(first, end - size - 1))
        pairs.append((tokens[first:start], tokens[start:end]))
        start = end
    return pairs


def pair_tokens(
    tokenize: Callable[..., list[int]], context: str | Tokens, continuation: str | Tokens
) -> tuple[list[int], list[int]]:
    """The tokens of a context, none for an empty text, and of what continues it; texts are `tokenize`d together.

    White space at the end of a context counts as the continuation's, whose first token it mostly begins.
    """
    if isinstance(context, str) and isinstance(continuation, str) and context.rstrip():
        text = context.rstrip()
        before = tokenize(text)
        return before, tokenize(text + context[len(text) :] + continuation)[len(before) :]
    if isinstance(continuation, str):
        continuation = tokenize(continuation, add_special=False)
    if isinstance(context, str):
        context = tokenize(context) if context else []
    return list(context), list(continuation)
