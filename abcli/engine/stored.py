"""Prompts whose state lies on the disk: read instead of computed, and written once computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from abcli.engine.prompt_cache import Piece, PromptCache
from abcli.native.state import StateError

# What is read must save at least this many tokens, and what is written have cost as many.
MIN_GAIN = 128


class Cells(Protocol):
    """An engine's slots as bytes; one state stands for all buckets."""

    def read(self, slot: int, start: int, end: int) -> NDArray[np.uint8]:
        """The state of the slot's tokens start to end (uint8 [n]). Raises NativeError."""

    def append(self, slot: int, start: int, tokens: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Append `tokens`, whose state is `data`, to a slot that holds `start` tokens.

        Raises StateError for bytes of another form, NativeError; the caller then truncates.
        """

    def truncate(self, slot: int, length: int) -> None:
        """Forget what follows the first `length` tokens of the slot."""


class StoredPrompts:
    """Fills slots from a `PromptCache` and fills the cache from slots."""

    def __init__(self, cache: PromptCache, cells: Cells, piece: int) -> None:
        """The state is written in pieces of at most `piece` tokens."""
        self._cache = cache
        self._cells = cells
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
                self._cells.append(slot, done, self._piece_tokens(tokens, piece), piece.data)
            except StateError:
                self._cells.truncate(slot, done)
                break
            done = min(piece.end, entry.common)
            if piece.end > done:
                self._cells.truncate(slot, done)
        return done

    def store(self, slot: int, tokens: Sequence[int]) -> None:
        """Write the state of `tokens`, which `slot` holds, to the disk."""
        self._cache.write(tokens, self._pieces(slot, len(tokens)))

    @staticmethod
    def _piece_tokens(tokens: Sequence[int], piece: Piece) -> list[int]:
        """The tokens of a piece; those beyond the wanted ones, which are soon forgotten, stand as zeros."""
        known = list(tokens[piece.start : piece.end])
        return known + [0] * (piece.end - piece.start - len(known))

    def _pieces(self, slot: int, length: int) -> Iterator[Piece]:
        for start in range(0, length, self._piece):
            end = min(start + self._piece, length)
            yield Piece(start, end, self._cells.read(slot, start, end))
