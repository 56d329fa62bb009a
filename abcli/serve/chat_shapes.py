"""What answers look like on the wire, as OpenAI's chat completions have it."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from time import time
from typing import Any

from abcli.chat.answer import Answer, Piece, Timings, Usage
from abcli.chat.calls.events import ArgumentsText, CallBegun
from abcli.chat.message_format import call_fields
from abcli.sampling import GenerationConfig
from abcli.serve.chosen import Chosen, Likely
from abcli.serve.service import Service, Wanted
from abcli.version import __version__

FINGERPRINT = f"abcli-{__version__}"


def usage_of(answers: Sequence[Answer]) -> dict[str, Any]:
    """The tokens of the choices of one request, whose prompt counts once."""
    prompt = answers[0].usage.prompt_tokens if answers else 0
    completion = sum(answer.usage.completion_tokens for answer in answers)
    cached = min((answer.usage.cached_tokens for answer in answers), default=0)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def timings_of(usage: Usage, timings: Timings) -> dict[str, Any]:
    """llama-server's `timings`: numbers of tokens, milliseconds, and tokens per second."""
    computed = usage.prompt_tokens - usage.cached_tokens
    predicted = usage.completion_tokens
    prefill, decode = timings.prefill, timings.decode
    return {
        "cache_n": usage.cached_tokens,
        "prompt_n": computed,
        "prompt_ms": prefill * 1e3,
        "prompt_per_second": computed / prefill if prefill > 0 else 0.0,
        "predicted_n": predicted,
        "predicted_ms": decode * 1e3,
        "predicted_per_second": max(predicted - 1, 0) / decode if decode > 0 else 0.0,
    }


def own_fields(answer: Answer) -> dict[str, Any]:
    """What only buckets have to tell of an answer."""
    return {"agreement": round(answer.agreement, 6), "asked": round(answer.asked, 6), "seed": answer.seed}


class ChatShape:
    """The objects of one request."""

    def __init__(self, service: Service, model: str, generation: GenerationConfig) -> None:
        """`generation` is how the answers are decoded."""
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(16)}",
            "created": int(time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }
        self._buckets = service.buckets_of(generation)
        self._service = service

    def completion(
        self, answers: Sequence[Answer], chosen: Sequence[Sequence[Chosen]], wanted: Wanted
    ) -> dict[str, Any]:
        """The whole response."""
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [
                {
                    "index": number,
                    "message": message_of(answer),
                    "logprobs": logprobs_of(found, self._service.pieces) if wanted.top is not None else None,
                    "finish_reason": answer.finish_reason,
                    "abcli": own_fields(answer),
                }
                for number, (answer, found) in enumerate(zip(answers, chosen, strict=True))
            ],
            "usage": usage_of(answers),
            "timings": timings_of(answers[0].usage, answers[0].timings),
            "abcli": {**self._buckets, **own_fields(answers[0])},
        }

    def chunks(self, number: int, wanted: Wanted) -> Chunks:
        """What makes chunks of the pieces of one choice."""
        pieces = self._service.pieces if wanted.top is not None else ()
        return Chunks(self._chunk, number, pieces, self._buckets)

    def usage_chunk(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The last chunk, where the numbers of tokens are wanted."""
        timings = {"timings": timings_of(answers[0].usage, answers[0].timings)} if answers else {}
        return {**self._chunk([]), "usage": usage_of(answers), **timings}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": "chat.completion.chunk", "choices": choices}


class Chunks:
    """The chunks of one choice."""

    def __init__(
        self,
        chunk: Callable[[list[dict[str, Any]]], dict[str, Any]],
        number: int,
        pieces: Sequence[bytes],
        buckets: dict[str, Any],
    ) -> None:
        self._chunk = chunk
        self._number = number
        self._pieces = pieces
        self._buckets = buckets
        self._told = 0
        self._calls = -1

    def first(self) -> dict[str, Any]:
        """The chunk that says who speaks."""
        return self._of({"role": "assistant", "content": None})

    def blank(self) -> dict[str, Any]:
        """A chunk that says nothing."""
        return self._of({})

    def add(self, piece: Piece, chosen: Sequence[Chosen]) -> Iterator[dict[str, Any]]:
        """The chunks that a piece makes; `chosen` has all tokens so far."""
        deltas: list[dict[str, Any]] = []
        if piece.reasoning:
            deltas.append({"reasoning_content": piece.reasoning})
        if piece.text:
            deltas.append({"content": piece.text})
        for event in piece.events:
            if isinstance(event, CallBegun):
                # One that turns out to be none was sent already: the next one has a number of its own.
                self._calls += 1
                function = {"name": event.name, "arguments": ""}
                call = {"index": self._calls, "id": event.id, "type": "function", "function": function}
                deltas.append({"tool_calls": [call]})
            elif isinstance(event, ArgumentsText):
                call = {"index": self._calls, "function": {"arguments": event.text}}
                deltas.append({"tool_calls": [call]})
        news = chosen[self._told :] if deltas or piece.answer is not None else ()
        self._told += len(news)
        for number, delta in enumerate(deltas):
            yield self._of(delta, news if number == 0 else ())
        if piece.answer is not None:
            last = self._of({}, () if deltas else news, piece.answer.finish_reason)
            own = {**self._buckets, **own_fields(piece.answer)}
            yield {**last, "timings": timings_of(piece.answer.usage, piece.answer.timings), "abcli": own}

    def _of(
        self, delta: dict[str, Any], chosen: Sequence[Chosen] = (), finish_reason: str | None = None
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": self._number, "delta": delta, "finish_reason": finish_reason}
        if self._pieces:
            choice["logprobs"] = logprobs_of(chosen, self._pieces) if chosen else None
        return self._chunk([choice])


def message_of(answer: Answer) -> dict[str, Any]:
    """The assistant's message."""
    message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.tool_calls:
        message["content"] = answer.text or None
        message["tool_calls"] = [call_fields(call) for call in answer.tool_calls]
    return message


def logprobs_of(chosen: Sequence[Chosen], pieces: Sequence[bytes]) -> dict[str, Any]:
    """The object `logprobs` of a choice."""
    return {"content": [_token_fields(item, pieces) for item in chosen], "refusal": None}


def _token_fields(item: Chosen, pieces: Sequence[bytes]) -> dict[str, Any]:
    fields = {
        **_likely_fields(Likely(item.token, item.logprob), pieces),
        "top_logprobs": [_likely_fields(likely, pieces) for likely in item.top],
    }
    if item.agreement is not None:
        fields["agreement"] = round(item.agreement, 6)
    if item.buckets:
        fields["buckets"] = [
            {"weight": round(view.weight, 6), "top_logprobs": [_likely_fields(likely, pieces) for likely in view.top]}
            for view in item.buckets
        ]
    return fields


def _likely_fields(likely: Likely, pieces: Sequence[bytes]) -> dict[str, Any]:
    data = pieces[likely.token]
    return {
        "id": likely.token,
        "token": data.decode("utf-8", "replace"),
        "bytes": list(data),
        "logprob": finite(likely.logprob),
    }


def finite(logprob: float) -> float:
    """A log-probability for JSON, which has no infinity: OpenAI's clients know -9999 as "never"."""
    return max(logprob, -9999.0)
