"""What an engine stands on: keys and values of slots under several RoPE bases, computed or carried over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from abcli.config import MergeRule
from abcli.native.llama import CancelFlag

# From so many tokens on, llama.cpp's flash attention on CPUs sums in float32, below in float16 (GGML_FA_TILE_Q): which
# of both a prompt gets must not depend on the prompts beside it.
TILED_TOKENS = 64


@dataclass(frozen=True)
class Sharing:
    """Whether one column computes prompts for all, and why, or under which base."""

    shared: bool
    reason: str = ""

    def __str__(self) -> str:
        """In a few words: "shared prefill at base 10000; ..." or "exact prefill: ..."."""
        if self.shared:
            return f"shared prefill {self.reason}"
        return f"exact prefill: {self.reason}" if self.reason else "exact prefill"


@dataclass(frozen=True, eq=False)
class Part:
    """Tokens that continue `slot` at `position`; the logits go to `logits`, if given, one array for each column.

    It is [vocab] for those after the last token, [n, vocab] for those after each of the last n.
    """

    slot: int
    position: int
    tokens: Sequence[int]
    logits: Sequence[NDArray[np.float32]] | None = None

    @property
    def outputs(self) -> int:
        """After how many of its tokens the logits are asked for."""
        return 0 if self.logits is None else len(np.atleast_2d(self.logits[0]))


class Backend(Protocol):
    """Slots under several bases: a *column* is what one base makes of all slots.

    The first columns are the buckets'; the leader, which computes shared prefills and whose cells are stored, is one of
    them or the last column. After an exception the caller truncates the slots. Computing raises CancelledError soon
    after `cancel` is set, and NativeError. One thread at a time may use a backend.
    """

    bases: tuple[float, ...]
    """The RoPE base of each column."""
    buckets: int
    leader: int
    native: int
    """The column whose base is nearest to the model's own: it decides alone where it is sure."""
    sharing: Sharing
    turning: str
    """How rows of one batch come to have several bases, and why so; empty where they need not."""
    outputs: int
    """After how many tokens one computation gives the logits, in all its parts; more where each slot has one."""
    native_outputs: int
    """The same for the native column alone."""
    cancel: CancelFlag
    cell_format: tuple[str, str]
    """What bytes of cells depend on beside model, base and cache types: the rotation's scaling, and their layout."""

    def piece(self, columns: int) -> int:
        """The most tokens of a prompt that are computed at once in so many columns."""

    def compute(
        self, parts: Sequence[Part], columns: Sequence[int], merge: MergeRule | None = None
    ) -> Mapping[int, float]:
        """Append each part's tokens to its slot in each of `columns`, which ascend: all buckets, the native column,
        all buckets but that, or the leader.

        With `merge`, a backend may merge the buckets' distributions where it computes them: only the merged logits then
        go to the first row of `logits` (see `abcli.merge`). The agreement of each slot for which it did so.

        What a part gives does not depend on those beside it: single tokens, or prompts of at most a piece in all.
        """

    def share(self, slot: int, source: int, targets: Sequence[int], start: int, tokens: Sequence[int]) -> None:
        """Append what column `source` holds of `tokens` from position `start` on to the columns `targets`, which hold
        exactly what stands before.
        """

    def length(self, slot: int, column: int) -> int:
        """The number of tokens that a column holds of a slot."""

    def truncate(self, slot: int, length: int, columns: Sequence[int] | None = None) -> bool:
        """Forget what follows the first `length` tokens in `columns`, else in all; False where a part cannot be."""

    def copy(self, source: int, target: int) -> None:
        """Make slot `target` hold what slot `source` holds in every column."""

    def read_cells(self, slot: int, start: int, end: int) -> NDArray[np.uint8]:
        """What the leader holds of the tokens start to end, as bytes (uint8 [n]). Raises NativeError."""

    def append_cells(self, slot: int, start: int, tokens: Sequence[int], data: NDArray[np.uint8]) -> None:
        """Append `tokens`, which `data` from `read_cells` stands for, to what the leader holds: `start` tokens.

        Raises StateError for bytes of another form, NativeError.
        """

    def close(self) -> None:
        """Free everything; a second call does nothing."""
