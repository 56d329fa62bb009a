"""A backend, an engine, a tokenizer and a sampler without llama.cpp, so that the layers above run in milliseconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from abcli.config import MergeRule
from abcli.engine.backend import Part, Sharing
from abcli.engine.engine import NO_GATES, Engine, Gate
from abcli.errors import CancelledError
from abcli.native.llama import CancelFlag
from abcli.native.state import StateError
from abcli.sampling import SamplingConfig

# Tokens 0..255 are bytes; this one ends an answer.
END = 256
VOCABULARY = 257
PIECE = 4
# What a column holds in cells that have no keys yet.
NO_TOKEN = -1

# Given the tokens of a slot and the number of a bucket: the token that bucket finds most likely.
NextToken = Callable[[Sequence[int], int], int]


class FakeBackend:
    """Implements `Backend` with lists of tokens and a function that names the most likely next one.

    It insists on what the protocol promises: columns that go on where they end, and cells that were there to share.
    """

    def __init__(
        self,
        next_token: NextToken,
        bases: Sequence[float] = (1e4,),
        slots: int = 1,
        *,
        leader: float | None = None,
        native: int = 0,
        shared: bool = False,
        piece: int = PIECE,
        forgets_parts: bool = True,
    ) -> None:
        self.buckets = len(bases)
        self.bases = (*bases, *([] if leader is None else [leader]))
        self.leader = 0 if leader is None else self.buckets
        self.native = native
        self.turning = ""
        self.sharing = Sharing(shared, "as asked for" if shared else "")
        self.cancel = CancelFlag()
        self.cell_format = ("none", "lists")
        self.next_token = next_token
        self.forgets_parts = forgets_parts
        self.held: list[list[list[int]]] = [[[] for _ in range(slots)] for _ in self.bases]
        self.outputs = self.native_outputs = piece
        self.calls: list[tuple[str, list[int]]] = []
        """What was computed: "rows" (or "native" or "others", if not in all buckets), "piece" (or "owed", if in the
        others alone) or "lead", and the number of tokens of each part."""
        self.fail: Callable[[str], None] = lambda _verb: None
        self.closed = False
        self._piece = piece

    def piece(self, columns: int) -> int:
        return self._piece

    def compute(
        self, parts: Sequence[Part], columns: Sequence[int], merge: MergeRule | None = None
    ) -> Mapping[int, float]:
        buckets = list(range(self.buckets))
        others = [bucket for bucket in buckets if bucket != self.native]
        assert list(columns) in (buckets, others, [self.native], [self.leader])
        assert len({part.slot for part in parts}) == len(parts)
        sizes = [len(part.tokens) for part in parts]
        rows = all(len(part.tokens) == 1 and part.logits is not None for part in parts)
        assert rows or sum(sizes) <= self.piece(len(columns))
        assert rows or sum(part.outputs for part in parts) <= self.outputs
        if len(columns) == self.buckets:
            kind = "rows" if rows else "piece"
        elif rows:
            kind = "native" if list(columns) == [self.native] else "others"
        else:
            kind = "lead" if self.sharing.shared else "owed"
        self.calls.append((kind, sizes))
        self._work("compute")
        for part in parts:
            for row, column in enumerate(columns):
                held = self.held[column][part.slot]
                assert len(held) == part.position
                held += part.tokens
                if part.logits is not None:
                    targets = np.atleast_2d(part.logits[row])
                    for end, target in enumerate(targets, len(held) + 1 - len(targets)):
                        target[:] = self.logits(held[:end], column)
        return {}

    def logits(self, tokens: Sequence[int], column: int) -> NDArray[np.float32]:
        row = np.zeros(VOCABULARY, np.float32)
        row[self.next_token(tokens, column)] = 9.0
        return row

    def share(self, slot: int, source: int, targets: Sequence[int], start: int, tokens: Sequence[int]) -> None:
        assert len(tokens)
        assert self.held[source][slot][start : start + len(tokens)] == list(tokens)
        for target in targets:
            assert len(self.held[target][slot]) == start
            self.held[target][slot] += [NO_TOKEN] * len(tokens)
        self._work("share")
        for target in targets:
            self.held[target][slot][start:] = tokens

    def length(self, slot: int, column: int) -> int:
        return len(self.held[column][slot])

    def truncate(self, slot: int, length: int, columns: Sequence[int] | None = None) -> bool:
        asked = [self.held[column] for column in (range(len(self.bases)) if columns is None else columns)]
        if not self.forgets_parts and any(0 < length < len(column[slot]) for column in asked):
            return False
        for column in asked:
            del column[slot][length:]
        return True

    def copy(self, source: int, target: int) -> None:
        for column in self.held:
            column[target] = list(column[source])

    def read_cells(self, slot: int, start: int, end: int) -> NDArray[np.uint8]:
        self._work("read_cells")
        found = self.held[self.leader][slot][start:end]
        assert len(found) == end - start
        return np.array(found, "<u2").view(np.uint8)

    def append_cells(self, slot: int, start: int, tokens: Sequence[int], data: NDArray[np.uint8]) -> None:
        held = self.held[self.leader][slot]
        assert len(held) == start
        self._work("append_cells")
        if len(data) != 2 * len(tokens):
            raise StateError("bytes of another form")
        held += tokens

    def close(self) -> None:
        self.closed = True

    def _work(self, verb: str) -> None:
        self.fail(verb)
        if self.cancel.is_set():
            raise CancelledError


class FakeEngine(Engine):
    """An engine on a `FakeBackend` that counts what is computed."""

    def __init__(
        self,
        next_token: NextToken,
        *,
        bases: tuple[float, ...] = (1e4,),
        slots: int = 1,
        context_size: int = 64,
        piece: int = PIECE,
        vocabulary: int = VOCABULARY,
    ) -> None:
        self.backend = FakeBackend(next_token, bases, slots, piece=piece)
        super().__init__(self.backend, slots=slots, context_size=context_size, vocabulary_size=vocabulary)
        self.step_sizes: list[int] = []
        self.advanced: list[int] = []
        """How many slots had logits after each step."""

    @property
    def computed(self) -> int:
        """The tokens computed so far."""
        return sum(sum(sizes) for _kind, sizes in self.backend.calls)

    @property
    def together(self) -> list[int]:
        """How many prompts each piece had a part of."""
        return [len(sizes) for kind, sizes in self.backend.calls if kind == "piece"]

    def step(
        self, tokens: Mapping[int, int], merge: MergeRule | None = None, gates: Mapping[int, Gate] = NO_GATES
    ) -> dict[int, NDArray[np.float32]]:
        if tokens:
            self.step_sizes.append(len(tokens))
        found = super().step(tokens, merge, gates)
        self.advanced.append(len(found))
        return found


class ByteTokenizer:
    """Token = byte."""

    def piece(self, token: int, *, special: bool = False) -> bytes:
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
        self.finished = False
        self.may_choose_any = False
        GreedySampler.opened += 1

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        self.prompt += tokens

    def confidence(self, logits: NDArray[np.float32]) -> float:
        return float(1 / np.exp(logits - logits.max()).sum())

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
