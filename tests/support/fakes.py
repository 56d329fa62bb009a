"""An engine, a tokenizer and a sampler without llama.cpp, so that the layers above run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from abcli.engine.protocol import Progress
from abcli.errors import CancelledError, ContextFullError
from abcli.sampling import SamplingConfig

# Tokens 0..255 are bytes; this one ends an answer.
END = 256
VOCABULARY = 257
PIECE = 4

# Given the tokens of a slot and the number of a bucket: the token that bucket finds most likely.
NextToken = Callable[[Sequence[int], int], int]


class FakeEngine:
    """Implements `Engine` by asking a function for the most likely next token; counts what is computed."""

    def __init__(
        self, next_token: NextToken, *, bases: tuple[float, ...] = (1e4,), slots: int = 1, context_size: int = 64
    ) -> None:
        self._next_token = next_token
        self.bases = bases
        self.vocabulary_size = VOCABULARY
        self.slots = slots
        self.context_size = context_size
        self.prefill_note = "exact prefill"
        self.computed = 0
        self.computed_tokens = 0
        self.step_sizes: list[int] = []
        self.together: list[int] = []
        self.cancel_after: int | None = None
        self.closed = False
        self._held: list[list[int]] = [[] for _ in range(slots)]

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def tokens(self, slot: int) -> Sequence[int]:
        return self._held[slot]

    def prefill(self, slot: int, tokens: Sequence[int], on_progress: Progress | None = None) -> NDArray[np.float32]:
        before = list(self._held[slot])
        self.computed_tokens = len(tokens)
        if len(before) + len(tokens) > self.context_size:
            raise ContextFullError(len(before) + len(tokens), self.context_size)
        try:
            for start in range(0, len(tokens), PIECE):
                self._count(len(tokens[start : start + PIECE]))
                if on_progress is not None:
                    on_progress(min(start + PIECE, len(tokens)), len(tokens))
        except BaseException:
            self._held[slot] = before
            raise
        self._held[slot] += tokens
        return self._logits(slot)

    def prefill_together(self, prompts: Mapping[int, Sequence[int]]) -> NDArray[np.float32]:
        before = {slot: list(self._held[slot]) for slot in prompts}
        self.together.append(len(prompts))
        try:
            for slot, tokens in prompts.items():
                self.prefill(slot, tokens)
        except BaseException:
            self._held = [before.get(slot, held) for slot, held in enumerate(self._held)]
            raise
        return np.stack([self._logits(slot) for slot in prompts])

    def step(self, tokens: Mapping[int, int]) -> NDArray[np.float32]:
        for slot in tokens:
            if len(self._held[slot]) + 1 > self.context_size:
                raise ContextFullError(len(self._held[slot]) + 1, self.context_size)
        self._count(len(tokens))
        self.step_sizes.append(len(tokens))
        for slot, token in tokens.items():
            self._held[slot].append(token)
        return np.stack([self._logits(slot) for slot in tokens])

    def truncate(self, slot: int, length: int) -> int:
        del self._held[slot][length:]
        return len(self._held[slot])

    def copy(self, source: int, target: int) -> None:
        self._held[target] = list(self._held[source])

    def cancel(self) -> None:
        self.cancel_after = self.computed

    def close(self) -> None:
        self.closed = True

    def _count(self, tokens: int) -> None:
        if self.cancel_after is not None and self.computed >= self.cancel_after:
            self.cancel_after = None
            raise CancelledError
        self.computed += tokens

    def _logits(self, slot: int) -> NDArray[np.float32]:
        logits = np.zeros((len(self.bases), VOCABULARY), np.float32)
        for bucket in range(len(self.bases)):
            logits[bucket, self._next_token(self._held[slot], bucket)] = 9.0
        return logits


class ByteTokenizer:
    """Token = byte."""

    def piece(self, token: int) -> bytes:
        return bytes([token]) if token < END else b""

    def is_end(self, token: int) -> bool:
        return token == END


class GreedySampler:
    """Takes the most likely token; remembers what it was shown and whether it was closed."""

    opened = 0

    def __init__(self, config: SamplingConfig) -> None:
        self.seed = max(config.seed, 0)
        self.prompt: list[int] = []
        self.closed = False
        GreedySampler.opened += 1

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        self.prompt += tokens

    def sample(self, logits: NDArray[np.float32]) -> int:
        return int(logits.argmax())

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            GreedySampler.opened -= 1


def reciting(text: bytes, prompt_length: int) -> NextToken:
    """Every bucket continues a prompt of `prompt_length` tokens with `text`, then ends."""

    def next_token(tokens: Sequence[int], _bucket: int) -> int:
        position = len(tokens) - prompt_length
        return text[position] if position < len(text) else END

    return next_token
