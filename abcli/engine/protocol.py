"""What every engine can do, in terms of slots and tokens; an engine knows nothing about text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

# Called with (tokens done, tokens in all) after each piece of a prefill.
Progress = Callable[[int, int], None]


class Engine(Protocol):
    """N buckets decoding the same tokens in several slots.

    Logits are float32 [buckets, vocab] views of a buffer that stays valid until the next prefill or step.
    After an exception every slot holds what it held before the call (a recurrent model's slot may be empty).
    One thread at a time may use an engine; only `cancel` may be called from any thread or signal handler.
    """

    @property
    def bases(self) -> tuple[float, ...]:
        """The RoPE base of each bucket."""

    @property
    def vocabulary_size(self) -> int:
        """The number of logits per bucket."""

    @property
    def slots(self) -> int:
        """The number of slots, numbered from 0."""

    @property
    def context_size(self) -> int:
        """The number of tokens each slot can hold."""

    @property
    def prefill_note(self) -> str:
        """How prompts are computed, and why, in a few words."""

    @property
    def least_shared(self) -> int:
        """How many new tokens a prompt must have to be computed once for all buckets."""

    @property
    def computed_tokens(self) -> int:
        """How many tokens the last prefill had to compute; the others came from a prompt cache."""

    def tokens(self, slot: int) -> Sequence[int]:
        """The tokens `slot` holds, oldest first."""

    def prefill(self, slot: int, tokens: Sequence[int], on_progress: Progress | None = None) -> NDArray[np.float32]:
        """Append `tokens` (one or more) to `slot` and return the logits [buckets, vocab] after the last.

        Raises ContextFullError if they don't fit, CancelledError after `cancel`, NativeError.
        """

    def prefill_together(self, prompts: Mapping[int, Sequence[int]]) -> NDArray[np.float32]:
        """Append tokens (one or more) to each slot named; logits [len(prompts), buckets, vocab] in the mapping's order.

        Short prompts take less time than one after the other. No prompt cache is asked. Raises as `prefill` does.
        """

    def step(self, tokens: Mapping[int, int]) -> NDArray[np.float32]:
        """Append one token to each slot named; logits [len(tokens), buckets, vocab] in the mapping's order.

        Raises as `prefill` does.
        """

    def truncate(self, slot: int, length: int) -> int:
        """Forget what follows the first `length` tokens; the number of tokens kept.

        A recurrent model cannot forget a part: it then forgets everything and 0 is returned.
        """

    def copy(self, source: int, target: int) -> None:
        """Make slot `target` hold what slot `source` holds."""

    def cancel(self) -> None:
        """Make the running prefill or step raise CancelledError soon; without one, do nothing."""

    def close(self) -> None:
        """Free everything; a second call does nothing."""

    def __enter__(self) -> Engine:
        """The engine itself; leaving the block closes it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the engine."""
