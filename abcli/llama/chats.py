"""Chats that follow a schema or call tools, answered by abcli and told in the words of `llama_cpp.Llama`."""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from abcli.errors import UsageError
from abcli.llm import LLM
from abcli.serve.chat_shapes import Chunks, logprobs_of, message_of, usage_of
from abcli.serve.chosen import Watcher

SLOT = 0
"""The slot in which everything is computed."""


def answer(llm: LLM, seed: int, messages: Any, constraint: Mapping[str, Any], settings: Mapping[str, Any]) -> Any:
    """An answer with calls of tools, or one that follows a schema, or its chunks with `stream`; `seed` draws its own.

    Raises UsageError, and what `LLM.ask` and `LLM.answer` raise.
    """
    given = {"temperature": 0.2, **{name: value for name, value in settings.items() if value is not None}}
    for name in ("grammar", "logits_processor"):
        if name in given:
            raise UsageError(f"`{name}` is given beside tools or a schema", "give only one of them")
    head = {"id": f"chatcmpl-{secrets.token_hex(16)}", "created": int(time.time())}
    head["model"] = given.pop("model", str(llm.model.path))
    stream, top = given.pop("stream", False), given.pop("top_logprobs", 0)
    watcher = Watcher(top) if given.pop("logprobs", False) else None
    given["max_tokens"] = limit if (limit := given.pop("max_tokens", 0)) > 0 else -1
    given["seed"] = given.get("seed", random.Random(seed).randint(0, 2**31))  # noqa: S311 - as the base
    if mode := given.pop("mirostat_mode", 0):
        given["mirostat"] = mode
    given.pop("tfs_z", None)
    if bias := given.pop("logit_bias", None):
        given["logit_bias"] = tuple((int(token), float(value)) for token, value in bias.items())
    options, config = llm.split({**constraint, **given, "observer": watcher})
    asked = llm.ask(list(messages), options, config, held=llm.held(SLOT))
    pieces = llm.pieces if watcher is not None else ()
    if stream:
        return _chunks(llm, asked, Chunks(partial(_chunk, head), 0, pieces, {}), watcher)
    for piece in llm.answer(asked):
        whole = piece.answer
    assert whole is not None  # noqa: S101 - the last piece has it
    choice = {"index": 0, "message": message_of(whole), "finish_reason": whole.finish_reason, "logprobs": None}
    if watcher is not None:
        choice["logprobs"] = logprobs_of(watcher.take(len(whole.tokens)), pieces)
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage_of([whole])}


def _chunks(llm: LLM, asked: Any, chunks: Chunks, watcher: Watcher | None) -> Iterator[Any]:
    yield chunks.first()
    chosen: list[Any] = []
    for piece in llm.answer(asked):
        if watcher is not None and piece.running is not None:
            chosen += watcher.take(len(piece.running.tokens))
        yield from chunks.add(piece, chosen)


def _chunk(head: Mapping[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {**head, "object": "chat.completion.chunk", "choices": choices}
