"""What stands where the base class has its own context and model, of which others read a little."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import llama_cpp
from llama_cpp import _internals

from abcli.errors import UsageError
from abcli.llm import LLM
from abcli.native.model import Model


class NoContextError(UsageError):
    """Somebody asks for llama.cpp's context."""


class NoContext:
    """What stands for the base's context: there are several, or one of many sequences, and none to be handed out."""

    def __init__(self, size: int) -> None:
        self._size = size

    @property
    def ctx(self) -> Any:
        """Raises UsageError: who decodes by himself would get one bucket's logits, and confuse the others."""
        raise NoContextError(
            "a model with buckets has no single llama.cpp context (`ctx`)",
            "use generate, eval and sample; or a llama_cpp.Llama",
        )

    def n_ctx(self) -> int:
        return self._size

    def pooling_type(self) -> int:
        return int(llama_cpp.LLAMA_POOLING_TYPE_NONE)

    def kv_cache_seq_rm(self, _sequence: int, _start: int, _end: int) -> bool:
        """Nothing is dropped before it is known what comes instead."""
        return True

    def reset_timings(self) -> None: ...

    def print_timings(self) -> None: ...


class BorrowedModel(_internals.LlamaModel):  # type: ignore[misc]
    """The base's view of a model that an LLM owns."""

    def __init__(self, llm: LLM, *, verbose: bool) -> None:
        self._llm = llm
        self.path_model = str(llm.model.path)
        self.verbose = verbose

    @property
    def _native(self) -> Model:
        """The model. Raises UsageError once it is closed."""
        return self._llm.native

    @property
    def model(self) -> Any:
        return self._native.handle

    @property
    def vocab(self) -> Any:
        return self._native.vocabulary

    def detokenize(self, tokens: Iterable[int], special: bool = False) -> bytes:
        """As the base, for pieces of any length."""
        tokens = list(tokens)
        text = b"".join(self._native.piece(int(token), special=special) for token in tokens)
        return text[1:] if tokens and tokens[0] == self.token_bos() and text[:1] == b" " else text

    def close(self) -> None:
        """It is not ours to free."""
