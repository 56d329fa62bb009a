"""What takes part in a benchmark: an engine, or llama.cpp's own calls on a batch of sequences."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from abcli.config import CONTEXT_STEP, ContextConfig
from abcli.engine.engine import Engine
from abcli.engine.workers import available_cores
from abcli.native.compute_thread import run_on_compute_thread
from abcli.native.context import BatchPart, Sequences, context_parameters
from abcli.native.llama import CancelFlag
from abcli.native.model import Model
from abcli.native.owner import Owner


@dataclass(frozen=True)
class Text:
    """The tokens that are read, and those that are decoded one by one after them."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @classmethod
    def random(cls, prompt: int, answer: int, vocabulary: int) -> Text:
        """The same random tokens every time; speed does not depend on what a text says."""
        tokens = np.random.default_rng(0).integers(0, vocabulary, prompt + answer).tolist()
        return cls(tuple(tokens[:prompt]), tuple(tokens[prompt:]))


class Player(Protocol):
    """A contender, ready to read and to decode the text it was made with."""

    @property
    def prompt_note(self) -> str:
        """How it reads prompts, and why, in a few words."""

    @property
    def turning_note(self) -> str:
        """How rows of one batch come to have several bases; empty where they need not."""

    @property
    def shares(self) -> bool:
        """Whether one bucket reads for all."""

    def empty(self) -> None:
        """Forget everything."""

    def read(self, limit: int | None = None) -> None:
        """Read the prompt, or its first `limit` tokens, into an empty context."""

    def rewind(self) -> None:
        """Hold the prompt and nothing else."""

    def decode(self) -> None:
        """Decode the tokens after the prompt."""


class EnginePlayer:
    """An engine's own prefill and steps; merging and sampling are not part of it."""

    def __init__(self, engine: Engine, text: Text) -> None:
        """The engine stays the caller's; its first slot is used."""
        self._engine = engine
        self._text = text

    @property
    def prompt_note(self) -> str:
        """See `Player.prompt_note`."""
        return str(self._engine.sharing)

    @property
    def turning_note(self) -> str:
        """See `Player.turning_note`."""
        return self._engine.turning

    @property
    def shares(self) -> bool:
        """See `Player.shares`."""
        return self._engine.sharing.shared

    def empty(self) -> None:
        """See `Player.empty`."""
        self._engine.truncate(0, 0)

    def read(self, limit: int | None = None) -> None:
        """See `Player.read`."""
        self._engine.prefill(0, self._text.prompt[:limit])

    def rewind(self) -> None:
        """See `Player.rewind`."""
        # A recurrent model forgets everything or nothing.
        kept = self._engine.truncate(0, len(self._text.prompt))
        if kept < len(self._text.prompt):
            self._engine.prefill(0, self._text.prompt[kept:])

    def decode(self) -> None:
        """See `Player.decode`."""
        for token in self._text.answer:
            self._engine.step({0: token})


class RawPlayer(Owner):
    """One `llama_decode` per token for a batch of sequences under one base, without any callback."""

    prompt_note = "exact prefill"
    turning_note = ""
    shares = False

    def __init__(self, model: Model, config: ContextConfig, count: int, text: Text) -> None:
        """A context with `count` sequences. Raises NativeError if it cannot be made."""
        cancel = CancelFlag()
        threads = config.threads or available_cores()
        parameters = context_parameters(model, model.native_base, config, threads, cancel)
        parameters.n_ctx = config.context_size * count
        parameters.n_seq_max = parameters.n_outputs_max = count
        # Each sequence passes over its own cells only, which is the faster way for separate texts.
        parameters.kv_unified = False
        self._cancel = cancel
        with ExitStack() as stack:
            self._context = stack.enter_context(Sequences(model, parameters, cancel))
            self._stack = stack.pop_all()
        self._text = text
        self._logits: NDArray[np.float32] = np.empty((count, model.vocabulary_size), np.float32)
        self._piece = max(1, min(self._context.ubatch_size, self._context.batch_size) // count)
        self._length = 0

    def empty(self) -> None:
        """See `Player.empty`."""
        self._truncate(0)
        self._length = 0

    def read(self, limit: int | None = None) -> None:
        """See `Player.read`."""
        prompt = self._text.prompt[:limit]
        for start in range(0, len(prompt), self._piece):
            piece = prompt[start : start + self._piece]
            self._compute(piece, output=start + len(piece) == len(prompt))

    def rewind(self) -> None:
        """See `Player.rewind`."""
        if self._length < len(self._text.prompt) or not self._truncate(len(self._text.prompt)):
            self.empty()
            self.read()

    def decode(self) -> None:
        """See `Player.decode`."""
        for token in self._text.answer:
            self._compute((token,), output=True)

    def _truncate(self, length: int) -> bool:
        """Forget what follows `length` tokens; False if the model cannot forget a part."""
        # A list: every sequence is asked, also after one has refused.
        kept = all([self._context.truncate(sequence, length) for sequence in range(len(self._logits))])  # noqa: C419
        if kept:
            self._length = length
        return kept

    def _compute(self, tokens: tuple[int, ...], *, output: bool) -> None:
        count = len(self._logits)
        parts = [BatchPart(sequence, self._length, tokens, output) for sequence in range(count)]
        rows = list(self._logits) if output else [None] * count
        run_on_compute_thread(lambda: self._context.decode(parts, rows), self._cancel.set)
        self._length += len(tokens)


def sized(config: ContextConfig, text: Text) -> ContextConfig:
    """`config` with a context that holds `text` and hardly more."""
    tokens = max(1, len(text.prompt) + len(text.answer))
    return replace(config, context_size=-(-tokens // CONTEXT_STEP) * CONTEXT_STEP)
