"""Prompts whose state lies on the disk: read instead of computed, and written once computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from abcli.engine.prompt_cache import Piece, PromptCache
from abcli.engine.shared import SharedPrefill
from abcli.native.context import Context
from abcli.native.ggml import aligned_bytes
from abcli.native.state import StateError, parse_state

# What is read must save at least this many tokens, and what is written have cost as many.
MIN_GAIN = 128


class StoredPrompts:
    """Fills slots from a `PromptCache` and fills the cache from slots, by way of the leader's state."""

    def __init__(
        self,
        cache: PromptCache,
        leader: Context,
        others: Sequence[Context],
        shared: SharedPrefill | None,
        piece: int,
    ) -> None:
        """`shared` turns the leader's keys for the `others`; without others it is not needed."""
        self._cache = cache
        self._leader = leader
        self._others = others
        self._shared = shared
        self._piece = piece

    def restore(self, slot: int, tokens: Sequence[int], held: int, empty: Callable[[], None]) -> int:
        """Let `slot`, which holds the first `held` of `tokens`, hold more of them from the disk.

        The number of tokens it then holds. If there is nothing worth reading nothing changes; else `empty` is
        called to clear the slot first. Raises NativeError; the caller then truncates.
        """
        entry = self._cache.find(tokens)
        if entry is None or entry.common < held + MIN_GAIN:
            return held
        empty()
        done = 0
        for piece in self._cache.read(entry):
            try:
                parse_state(piece.data)
            except StateError:
                break
            self._leader.write_spare(piece.data)
            self._leader.append_spare(slot)
            if self._shared is not None and self._others:
                self._shared.give(piece.data, self._leader, self._others, slot)
            done = min(piece.end, entry.common)
            if piece.end > done:
                for context in (self._leader, *self._others):
                    context.truncate(slot, done)
        return done

    def store(self, slot: int, tokens: Sequence[int]) -> None:
        """Write the state of `tokens`, which the leader holds in `slot`, to the disk."""
        self._cache.write(tokens, self._pieces(slot, len(tokens)))

    def _pieces(self, slot: int, length: int) -> Iterator[Piece]:
        for start in range(0, length, self._piece):
            end = min(start + self._piece, length)
            self._leader.take_range(slot, start, end)
            try:
                data = aligned_bytes(self._leader.spare_state_size())
                self._leader.read_spare(data)
            finally:
                self._leader.drop_spare()
            yield Piece(start, end, data)
