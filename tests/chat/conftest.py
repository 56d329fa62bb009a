"""Models for the tests of the chat: the real one, and tiny ones with other tokenizers and control tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gguf import TokenType

from abcli.native.model import Model
from tests.support.models import open_model
from tests.support.tiny_gguf import byte_pair_vocabulary, sentence_piece_vocabulary, write_tiny_model

SIZE = 320
# What other families use, and what is awkward: inside one another, a single character, blanks at the ends.
FAMILIES = ("[INST]", "[/INST]", "<start_of_turn>", "<end_of_turn>", "<|endoftext|>", "<|end|>", "<|end|>>", "\u00a7")


def sentence_piece_model(path: Path, **metadata: object) -> Path:
    """A tiny SentencePiece model whose last tokens are the control tokens FAMILIES."""
    vocabulary = sentence_piece_vocabulary(SIZE)
    tokens = [*vocabulary.tokens[: -len(FAMILIES)], *(text.encode() for text in FAMILIES)]
    types = [*vocabulary.types[: -len(FAMILIES)], *[TokenType.CONTROL] * len(FAMILIES)]
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types, **metadata}
    return write_tiny_model(path, vocabulary_size=SIZE, tokenizer="llama", metadata=changes)


@pytest.fixture(scope="session")
def bpe(real_model: Path) -> Iterator[Model]:
    """SmolLM2: byte-pair encoding, no BOS added."""
    with open_model(real_model, gpu_layers=0) as model:
        yield model


@pytest.fixture(scope="session")
def spm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """SentencePiece with many control tokens; BOS and a space are put before a text."""
    with open_model(sentence_piece_model(tmp_path_factory.mktemp("spm") / "spm.gguf"), gpu_layers=0) as model:
        yield model


@pytest.fixture(scope="session")
def stripping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Like `spm`, but llama.cpp lets control tokens swallow white space, as it does for this name."""
    path = sentence_piece_model(tmp_path_factory.mktemp("phi") / "phi.gguf", **{"general.name": "phi3"})
    with open_model(path, gpu_layers=0) as model:
        yield model


@pytest.fixture(scope="session")
def masking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """Byte-pair encoding with a control token "<mask>" that swallows the white space before it."""
    vocabulary = byte_pair_vocabulary(SIZE)
    # The token before the three control tokens is the last that a merge makes.
    vocabulary.tokens[-4], vocabulary.types[-4] = b"<mask>", TokenType.CONTROL
    changes = {
        "tokenizer.ggml.pre": "jina-v2-de",
        "tokenizer.ggml.tokens": vocabulary.tokens,
        "tokenizer.ggml.token_type": vocabulary.types,
        "tokenizer.ggml.merges": vocabulary.merges[:-1],
    }
    path = tmp_path_factory.mktemp("jina") / "jina.gguf"
    with open_model(write_tiny_model(path, vocabulary_size=SIZE, metadata=changes), gpu_layers=0) as model:
        yield model


@pytest.fixture(params=["bpe", "spm", "stripping"])
def model(request: pytest.FixtureRequest) -> Model:
    """Each of the models in turn."""
    found: Model = request.getfixturevalue(request.param)
    return found
