"""Embeddings, checked against llama-cpp-python's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from numpy.typing import NDArray

from abcli.config import ContextConfig, ModelConfig
from abcli.embedder import Embedder, batches, makes_embeddings
from abcli.errors import ContextFullError, PromptError, UnsupportedModelError, UsageError
from tests.support.tiny_gguf import write_tiny_bert, write_tiny_model

TEXTS = ["hello", "hello world", "a", "the quick brown fox", "zzz !"]
# Flash attention, the default, rounds to 16 bits.
CONTEXT = ContextConfig(context_size=64, threads=1, flash_attention="off")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("bert") / "bert.gguf")


@pytest.fixture(scope="module")
def embedder(bert: Path) -> Iterator[Embedder]:
    with Embedder(ModelConfig(bert), CONTEXT) as found:
        yield found


def reference(path: Path, tokens: list[list[int]], pooling: int = -1) -> NDArray[np.float32]:
    """What llama-cpp-python makes of the same tokens, one text after the other, each at the length 1."""
    llama = llama_cpp.Llama(
        str(path), embedding=True, n_ctx=64, n_batch=64, n_ubatch=64, pooling_type=pooling, n_threads=1, verbose=False
    )
    texts = iter(tokens)
    # Its tokenizer is not what is checked here.
    llama.tokenize = lambda _text: next(texts)  # type: ignore[method-assign]
    try:
        return np.array([llama.embed("", normalize=True) for _ in tokens], np.float32)
    finally:
        llama.close()


def test_an_encoder_gives_what_llama_cpp_python_gives(embedder: Embedder, bert: Path) -> None:
    tokens = [embedder.tokenize(text) for text in TEXTS]
    # [CLS] at the beginning, [SEP] at the end.
    assert all(item[0] == 2 and item[-1] == 3 for item in tokens)
    found = embedder.embed(tokens)
    assert found.shape == (len(TEXTS), embedder.width) == (5, 32)
    np.testing.assert_allclose(found, reference(bert, tokens), atol=2e-4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    # They differ from each other, or nothing were shown.
    assert np.abs(found @ found.T - np.eye(5)).max() < 0.999


@pytest.mark.parametrize(("pooling", "native"), [("mean", 1), ("cls", 2), ("last", 3)])
@pytest.mark.parametrize("writes", [False, True])
def test_every_way_to_pool(pooling: Any, native: int, writes: bool, bert: Path, tmp_path: Path) -> None:
    path = write_tiny_model(tmp_path / "tiny.gguf") if writes else bert
    with Embedder(ModelConfig(path), CONTEXT, pooling=pooling) as embedder:
        tokens = [embedder.tokenize(text) for text in TEXTS]
        np.testing.assert_allclose(embedder.embed(tokens), reference(path, tokens, native), atol=1e-3)


def test_what_stands_beside_a_text_does_not_change_it(embedder: Embedder) -> None:
    tokens = [embedder.tokenize(text) for text in TEXTS * 20]
    alone = np.concatenate([embedder.embed([text]) for text in tokens[:5]])
    np.testing.assert_allclose(embedder.embed(tokens), np.tile(alone, (20, 1)), atol=2e-4)


def test_texts_are_computed_in_batches_that_fit() -> None:
    texts = [[1] * length for length in (30, 30, 64, 1, 1, 63, *[1] * 70)]
    found = list(batches(texts, 64))
    assert [text for batch in found for text in batch] == texts
    assert all(sum(map(len, batch)) <= 64 and len(batch) <= 32 for batch in found)
    assert [len(batch) for batch in found[:4]] == [2, 1, 2, 2]
    assert list(batches([], 64)) == []


def test_what_cannot_be_embedded_is_said_before_anything_is_computed(embedder: Embedder) -> None:
    # The longest that fits does.
    longest = [2] * embedder.context_size
    embedder.check(longest)
    assert np.isfinite(embedder.embed([longest])).all()
    with pytest.raises(ContextFullError):
        embedder.check([*longest, 3])
    for tokens in ([], [-1], [embedder.vocabulary_size]):
        with pytest.raises(PromptError):
            embedder.check(tokens)


def test_a_context_is_no_longer_than_an_encoder_was_trained_for(bert: Path) -> None:
    with Embedder(ModelConfig(bert), ContextConfig(threads=1)) as embedder:
        assert embedder.context_size == 64


def test_which_models_make_embeddings(bert: Path, tmp_path: Path) -> None:
    writer = write_tiny_model(tmp_path / "writer.gguf")
    pooled = write_tiny_model(tmp_path / "pooled.gguf", metadata={"llama.pooling_type": 3})
    ranker = write_tiny_model(tmp_path / "ranker.gguf", metadata={"llama.pooling_type": 4})
    assert [makes_embeddings(path) for path in (bert, writer, pooled, ranker)] == [True, False, True, True]
    with pytest.raises(UnsupportedModelError, match="is a reranker"):
        Embedder(ModelConfig(ranker), CONTEXT)
    with pytest.raises(UnsupportedModelError, match="does not say how"):
        Embedder(ModelConfig(writer), CONTEXT)
    with Embedder(ModelConfig(pooled), CONTEXT) as embedder:
        tokens = [embedder.tokenize("hello")]
        np.testing.assert_allclose(embedder.embed(tokens), reference(pooled, tokens, 3), atol=1e-3)


def test_a_closed_one_says_so(bert: Path) -> None:
    embedder = Embedder(ModelConfig(bert), CONTEXT)
    embedder.close()
    embedder.close()
    with pytest.raises(UsageError):
        embedder.embed([[2, 3]])
