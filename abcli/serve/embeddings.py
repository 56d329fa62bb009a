"""POST /v1/embeddings: a vector for each text; and the models that make them."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from time import monotonic
from typing import Any

import numpy as np
from numpy.typing import NDArray
from starlette.responses import Response
from starlette.routing import Route

from abcli.chat.message_format import read_text
from abcli.embedder import Embedder, batches, unit
from abcli.errors import CancelledError, ContextFullError, UsageError
from abcli.serve.fields import Fields
from abcli.serve.problems import RefusedError, blaming, out_of_time, problem_of
from abcli.serve.routing import Body, post, written
from abcli.serve.service import Served, Settings, described

# OpenAI's limit.
MAX_TEXTS = 2048
_INPUTS = "a text, a list of texts, a list of tokens or a list of such lists"


class EmbeddingService(Served):
    """A model that makes embeddings."""

    lacks = "is an embedding model, which writes no text; ask another model"

    def __init__(self, embedder: Embedder, settings: Settings) -> None:
        """The embedder is the caller's to close, after `close`."""
        super().__init__(settings)
        self.embedder = embedder
        self._stopping = False
        # Batches of all requests, in turn.
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="abcli-embed")

    def close(self) -> None:
        """End what is computed, and wait for that."""
        self.stop_soon()
        self._computing.shutdown(cancel_futures=True)
        super().close()

    def stop_soon(self) -> None:
        """As `close` without waiting; for signal handlers."""
        self._stopping = True
        self.embedder.cancel()

    @property
    def accepts(self) -> bool:
        """Whether requests are taken."""
        return not self._stopping

    @property
    def description(self) -> Mapping[str, Any]:
        """What `/v1/models` tells of the model beside its name."""
        return described(self.embedder, self.embedder.checked, n_embd=self.embedder.width)

    async def embed(self, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The embeddings [texts, width] of the tokens of texts. Other requests have their turn between batches.

        Raises RefusedError where too many wait or it takes too long, CancelledError and NativeError.
        """
        self.check_room(1)
        deadline = monotonic() + self.settings.seconds
        found = []
        self.opened(1)
        try:
            for batch in batches(texts, self.embedder.context_size):
                if self._stopping:
                    raise CancelledError
                if monotonic() > deadline:
                    raise out_of_time()
                work = partial(self.embedder.embed_together, batch)
                found.append(await asyncio.get_running_loop().run_in_executor(self._computing, work))
        finally:
            self.opened(-1)
        return np.concatenate(found)


@dataclass(frozen=True)
class EmbeddingRequest:
    """A request, read."""

    texts: tuple[tuple[int, ...], ...]
    model: str
    as_base64: bool
    dimensions: int


def routes() -> list[Route]:
    """The routes of this module."""
    return [post(path, embeddings, kind=EmbeddingService) for path in ("/v1/embeddings", "/embeddings")]


async def embeddings(service: EmbeddingService, body: Body) -> Response:
    """Embed texts."""
    request = await service.prepare(partial(read_request, service, body))
    vectors = await service.embed(request.texts)
    return await written(partial(_answer, request, vectors))


def read_request(service: EmbeddingService, body: Body) -> EmbeddingRequest:
    """A request as clients of OpenAI write it. Raises UsageError with the field to blame, and RefusedError."""
    fields = Fields(body)
    width = service.embedder.width
    return EmbeddingRequest(
        model=fields.text("model", service.settings.alias),
        as_base64=fields.word("encoding_format", ("float", "base64"), "float") == "base64",
        dimensions=fields.whole("dimensions", width, 1, width),
        texts=tuple(_tokens(service.embedder, text) for text in _inputs(fields)),
    )


def _inputs(fields: Fields) -> list[Any]:
    value = fields.any("input")
    if not isinstance(value, str | list) or not value:
        raise fields.wrong("input", _INPUTS)
    found = value if isinstance(value, list) and type(value[0]) is not int else [value]
    if len(found) > MAX_TEXTS:
        raise UsageError(f"'input' has {len(found):,} texts", f"send at most {MAX_TEXTS:,}", setting="input")
    if not all(
        isinstance(text, str) or (isinstance(text, list) and all(type(t) is int for t in text)) for text in found
    ):
        raise fields.wrong("input", _INPUTS)
    return found


def _tokens(embedder: Embedder, text: str | list[int]) -> tuple[int, ...]:
    with blaming("input"):
        tokens = embedder.tokenize(read_text(text, "input")) if isinstance(text, str) else text
        try:
            embedder.check(tokens)
        except ContextFullError as error:
            raise RefusedError(replace(problem_of(error), param="input")) from None
    return tuple(tokens)


def _answer(request: EmbeddingRequest, vectors: NDArray[np.float32]) -> dict[str, Any]:
    if request.dimensions < vectors.shape[1]:
        vectors = unit(vectors[:, : request.dimensions])
    count = sum(map(len, request.texts))
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": number, "embedding": _written(vector, request)}
            for number, vector in enumerate(vectors)
        ],
        "model": request.model,
        "usage": {"prompt_tokens": count, "total_tokens": count},
    }


def _written(vector: NDArray[np.float32], request: EmbeddingRequest) -> str | list[float]:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode() if request.as_base64 else vector.tolist()
