"""Vocabularies to follow schemas in: one token per byte, and the real model's."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from abcli.grammar.constraint import Constraint, Kind
from abcli.grammar.guidance import Matcher, Matchers, Vocabulary
from tests.native.conftest import model
from tests.support.models import open_model

__all__ = ["model"]

END = 256
BYTES = Vocabulary(
    [bytes([byte]) for byte in range(256)] + [b"\xff<end>", b"\xff<unused>"], [END], lambda text: list(text.encode())
)


@pytest.fixture(scope="session")
def in_bytes() -> Matchers:
    return Matchers(BYTES, "bytes")


@pytest.fixture(scope="session")
def in_words(real_model) -> tuple[Matchers, Callable[[str], list[int]], int]:
    """The real model's matchers, its tokenizer and the token that ends its answers."""
    with open_model(real_model) as opened:
        vocabulary = opened.read_vocabulary()
        words = {piece: token for token, piece in enumerate(vocabulary.tokens)}
    longest = max(map(len, words))

    def tokenize(text: str) -> list[int]:
        data, found = text.encode(), []
        while data:
            length = next(size for size in range(longest, 0, -1) if data[:size] in words)
            found.append(words[data[:length]])
            data = data[length:]
        return found

    return Matchers(Vocabulary(vocabulary.tokens, vocabulary.ends, tokenize), "words"), tokenize, vocabulary.ends[0]


def constraint(schema: object, kind: Kind = "json_schema", *, lenient: bool = False) -> Constraint:
    text = schema if isinstance(schema, str) else json.dumps(schema, ensure_ascii=False)
    return Constraint(kind, text, lenient)


def follows(matcher: Matcher, tokens: list[int], end: int) -> bool:
    """Whether an answer of these tokens is complete; the mask has to say the same of each as `allows`."""
    for token in tokens:
        if matcher.finished:
            return False
        allowed = matcher.allows(token)
        if not allowed:
            assert not matcher.mask()[token]
            return False
        matcher.accept(token)
    return matcher.finished or matcher.allows(end)


def writes(matchers: Matchers, wanted: Constraint, text: str) -> bool:
    """Whether the text is a complete answer, byte by byte."""
    return follows(matchers.start(wanted), list(text.encode()), END)
