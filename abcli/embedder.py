"""A model that makes embeddings: opened once, then from texts to vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from abcli.config import Buckets, ContextConfig, ModelConfig, Pooling
from abcli.engine.memory import check_memory
from abcli.engine.workers import available_cores
from abcli.errors import ContextFullError, PromptError
from abcli.gguf.check import check_kind_of_file, is_embedding_model
from abcli.gguf.checked import check_model
from abcli.gguf.header import read_header
from abcli.native.compute_thread import run_on_compute_thread
from abcli.native.crash_probe import ensure_loadable
from abcli.native.embedding import EmbeddingContext
from abcli.native.llama import CancelFlag
from abcli.native.model import Model
from abcli.native.owner import Owner
from abcli.prepare import check_context
from abcli.text import gibibytes
from abcli.turn import Turn

# Short texts are computed together, so many of them and of their tokens; others have their turn in between.
_TOGETHER = 32
_TOKENS_TOGETHER = 512


def makes_embeddings(path: Path) -> bool:
    """Whether a model file is one of an embedding model. Raises ModelFileError for what is no GGUF file."""
    check_kind_of_file(path)
    return is_embedding_model(read_header(path))


class Embedder(Owner):
    """A loaded embedding model. Any thread may use it: while one computes, the others wait. Close it."""

    def __init__(
        self,
        config: ModelConfig,
        context: ContextConfig,
        *,
        pooling: Pooling | None = None,
        say: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Load a model, with a context of at most the length that it was trained with.

        `pooling` is how the states of all tokens become one vector, None: as the model's file says.

        Raises ModelFileError, UnsupportedModelError, UsageError, OutOfMemoryError and NativeError.
        """
        check_context(context)
        checked = check_model(config, embeds=True)
        trained = checked.header.trained_context
        size = min(context.context_size or trained, trained)
        # A text is computed at once, without buckets.
        context = replace(context, context_size=size, batch_size=size, ubatch_size=size, slots=1, engine="contexts")
        base = checked.header.native_base
        self.memory = check_memory(checked, context, Buckets((base,), base))
        say(f"loading {checked.name}: about {gibibytes(self.memory.total)} of memory")
        ensure_loadable(checked, embeds=True)
        self.checked = checked
        self.context_size = size
        """The most tokens that a text may have."""
        self._turn = Turn()
        self._cancel = CancelFlag()
        with ExitStack() as stack:
            self._native = stack.enter_context(Model(checked))
            self._context = stack.enter_context(
                EmbeddingContext(
                    self._native,
                    context,
                    pooling,
                    together=_TOGETHER,
                    threads=context.threads or available_cores(),
                    cancel=self._cancel,
                )
            )
            self._stack = stack.pop_all()
        self.width = self._context.width
        """Numbers of an embedding."""
        self.description = self._native.description
        self.vocabulary_size = self._native.vocabulary_size

    def close(self) -> None:
        """Free everything; a computation of another thread is cancelled first. A second call does nothing."""
        self.cancel()
        with self._turn.last():
            self._stack.close()

    def cancel(self) -> None:
        """Make what is computed now raise CancelledError soon."""
        self._cancel.set()

    def tokenize(self, text: str) -> list[int]:
        """The tokens of a text as the model reads it; control tokens in it are text. Raises PromptError."""
        with self._turn.text():
            return self._native.tokenize(text, add_special=True, parse_special=False)

    def check(self, tokens: Sequence[int]) -> None:
        """Raise PromptError for tokens of which no embedding can be made, ContextFullError for too many of them."""
        if not tokens:
            raise PromptError("a text is empty", "give it some text")
        for token in tokens:
            if not 0 <= token < self.vocabulary_size:
                raise PromptError(f"token {token} is not in the vocabulary", f"it ends at {self.vocabulary_size - 1}")
        if len(tokens) > self.context_size:
            raise ContextFullError(len(tokens), self.context_size)

    def embed(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The embeddings (float32 [texts, width], each of length 1) of the tokens of texts, which `check` lets pass.

        Raises CancelledError and NativeError.
        """
        found = [self.embed_together(batch) for batch in batches(texts, self.context_size)]
        return np.concatenate(found) if found else np.empty((0, self.width), np.float32)

    def embed_together(self, batch: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """As `embed`, for one of what `batches` gives: nobody else has a turn in between."""
        with self._turn.take():
            self._cancel.clear()
            vectors = run_on_compute_thread(partial(self._context.embed, batch), self._cancel.set)
        return unit(vectors)


def batches(texts: Sequence[Sequence[int]], context_size: int) -> Iterator[Sequence[Sequence[int]]]:
    """Texts, as tokens, in their order, in batches that are computed together."""
    most = min(context_size, _TOKENS_TOGETHER)
    begin = tokens = 0
    for number, text in enumerate(texts):
        if number > begin and (tokens + len(text) > most or number - begin == _TOGETHER):
            yield texts[begin:number]
            begin, tokens = number, 0
        tokens += len(text)
    if begin < len(texts):
        yield texts[begin:]


def unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors [n, width] at the length 1; those of zeros stay."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    return np.asarray(vectors / np.where(lengths == 0, 1, lengths), np.float32)
