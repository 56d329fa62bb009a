"""A model's tokens as structured answers see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import llama_cpp.llama_cpp as llama

from abcli.grammar.guidance import Vocabulary

if TYPE_CHECKING:
    from abcli.native.model import Model

_SPECIAL = llama.LLAMA_TOKEN_ATTR_UNKNOWN | llama.LLAMA_TOKEN_ATTR_CONTROL | llama.LLAMA_TOKEN_ATTR_UNUSED
# Stands before a text whose tokens are asked for, where the tokenizer would put a space before it.
_SENTINEL = "\x01"


def read_vocabulary(model: Model) -> Vocabulary:
    """The tokens of a model; those that no answer is to contain as text are marked with 0xff."""
    tokens: list[bytes] = []
    ends: list[int] = []
    for token in range(model.vocabulary_size):
        attributes, is_end = model.attributes(token), model.is_end(token)
        text = model.piece(token, special=True)
        named = attributes & llama.LLAMA_TOKEN_ATTR_USER_DEFINED and text.startswith(b"<") and text.endswith(b">")
        if is_end:
            ends.append(token)
        # Without a text of its own a special token still needs a name.
        special = is_end or attributes & _SPECIAL or named or not text
        tokens.append(b"\xff" + (text or b"<token %d>" % token) if special else text)
    return Vocabulary(tokens, ends, _tokenizer(model))


def _tokenizer(model: Model) -> Callable[[str], list[int]]:
    def plain(text: str) -> list[int]:
        return [] if model.closed else model.tokenize(text, add_special=False, parse_special=False)

    def after_sentinel(text: str) -> list[int]:
        return plain(_SENTINEL + text)[len(sentinel) :]

    sentinel = plain(_SENTINEL)
    return plain if _text(model, plain("a")) == b"a" else after_sentinel


def _text(model: Model, tokens: list[int]) -> bytes:
    return b"".join(model.piece(token) for token in tokens)
