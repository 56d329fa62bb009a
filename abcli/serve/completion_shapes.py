"""What answers look like on the wire, as OpenAI's older completions have it."""

from __future__ import annotations

import codecs
import secrets
from collections.abc import Iterator, Mapping, Sequence
from time import time
from typing import Any, Protocol

from abcli.chat.answer import Answer, Piece
from abcli.serve.chat_shapes import FINGERPRINT, finite, own_fields, timings_of
from abcli.serve.chosen import Chosen, Likely
from abcli.text_stream import TextStream

# Tokens of a prompt in a chunk.
_ECHOED = 128
_LEGACY = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class Answers(Protocol):
    """What is kept of an answer's tokens; see `abcli.serve.service.Answering`."""

    @property
    def chosen(self) -> Sequence[Chosen]: ...

    @property
    def scored(self) -> Sequence[Chosen]: ...


class CompletionShape:
    """The objects of one request."""

    def __init__(self, pieces: Sequence[bytes], model: str, buckets: Mapping[str, Any]) -> None:
        """`pieces` are the bytes of every token, which only echoes and log-probabilities need.

        `buckets` is what the answer tells of bases and merge rule.
        """
        self.pieces = pieces
        self.buckets = buckets
        self._head = {
            "id": f"cmpl-{secrets.token_hex(16)}",
            "object": "text_completion",
            "created": int(time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    def choice(
        self, number: int, answer: Answer, kept: Answers, prompt: Sequence[int] | None, *, logprobs: bool
    ) -> dict[str, Any]:
        """A finished choice; `prompt` has the tokens of one that is to be repeated."""
        begin = text_of(prompt, self.pieces) if prompt is not None else ""
        found = None
        if logprobs:
            tokens = LegacyLogprobs(self.pieces)
            if prompt is not None:
                tokens.add_prompt(prompt, kept.scored)
            tokens.add(kept.chosen)
            found = tokens.take()
        return {
            "index": number,
            "text": begin + answer.text,
            "logprobs": found,
            "finish_reason": answer.finish_reason,
            "abcli": own_fields(answer),
        }

    def completion(self, choices: list[dict[str, Any]], answers: Sequence[Answer], prompts: int) -> dict[str, Any]:
        """The whole response, or the chunk that tells the numbers of tokens."""
        # Each prompt counts once, however many answers it has.
        firsts = answers[:: max(1, len(answers) // prompts)]
        prompt = sum(answer.usage.prompt_tokens for answer in firsts)
        completion = sum(answer.usage.completion_tokens for answer in answers)
        return {
            **self._head,
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
                "prompt_tokens_details": {"cached_tokens": sum(answer.usage.cached_tokens for answer in firsts)},
            },
            "timings": timings_of(answers[0].usage, answers[0].timings),
            "abcli": {**self.buckets, **own_fields(answers[0])},
        }

    def chunks(self, number: int, kept: Answers, prompt: Sequence[int] | None, *, logprobs: bool) -> CompletionChunks:
        """What makes chunks of the pieces of one choice."""
        return CompletionChunks(self, number, kept, prompt, logprobs=logprobs)

    def chunk(self, number: int, text: str, logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
        """A chunk."""
        choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": finish_reason}
        return {**self._head, "choices": [choice]}


class CompletionChunks:
    """The chunks of one choice."""

    def __init__(
        self, shape: CompletionShape, number: int, kept: Answers, prompt: Sequence[int] | None, *, logprobs: bool
    ) -> None:
        self._kept = kept
        self._shape = shape
        self._number = number
        self._prompt = prompt
        self._told = 0
        self._tokens = LegacyLogprobs(shape.pieces) if logprobs else None

    def add(self, piece: Piece, chosen: Sequence[Chosen]) -> Iterator[dict[str, Any]]:
        """The chunks that a piece makes; `chosen` has all tokens so far. The first repeats a prompt that is wanted."""
        if self._prompt is not None:
            prompt, self._prompt = self._prompt, None
            yield from self._echo(prompt)
        if not piece.text and piece.answer is None:
            return
        if self._tokens is not None:
            self._tokens.add(chosen[self._told :])
            self._told = len(chosen)
        if piece.answer is None:
            yield self._shape.chunk(self._number, piece.text, self._take(), None)
            return
        last = self._shape.chunk(self._number, piece.text, self._take(), piece.answer.finish_reason)
        timings = timings_of(piece.answer.usage, piece.answer.timings)
        yield {**last, "timings": timings, "abcli": {**self._shape.buckets, **own_fields(piece.answer)}}

    def blank(self) -> dict[str, Any]:
        """A chunk that says nothing."""
        return self._shape.chunk(self._number, "", None, None)

    def _echo(self, prompt: Sequence[int]) -> Iterator[dict[str, Any]]:
        """The prompt in parts: how likely all its tokens are is much to tell at once."""
        decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        for begin in range(0, len(prompt), _ECHOED):
            end = begin + _ECHOED
            text = decode(b"".join(self._shape.pieces[token] for token in prompt[begin:end]), end >= len(prompt))
            if self._tokens is not None:
                self._tokens.add_prompt(prompt[begin:end], self._kept.scored[max(begin - 1, 0) : end - 1], begin)
            yield self._shape.chunk(self._number, text, self._take(), None)

    def _take(self) -> dict[str, Any] | None:
        return self._tokens.take() if self._tokens is not None else None


class LegacyLogprobs:
    """The object `logprobs` of a choice: parallel lists."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._offset = 0
        self._pieces = pieces
        self._stream = TextStream()
        self._fields: dict[str, list[Any]] = {name: [] for name in _LEGACY}

    def take(self) -> dict[str, Any]:
        """What was added since it was last taken."""
        found, self._fields = self._fields, {name: [] for name in _LEGACY}
        return found

    def add_prompt(self, tokens: Sequence[int], scored: Sequence[Chosen], begin: int = 0) -> None:
        """Tokens of a prompt, from the place `begin` on; of the first nothing is known, as nothing is before it."""
        if begin == 0:
            self._add(tokens[0], None, None)
        self.add(scored)

    def add(self, chosen: Sequence[Chosen]) -> None:
        """Further tokens."""
        for item in chosen:
            top = {self._name(likely.token): finite(likely.logprob) for likely in self._with_own(item)}
            self._add(item.token, finite(item.logprob), top)

    @staticmethod
    def _with_own(item: Chosen) -> tuple[Likely, ...]:
        """The likeliest tokens, and the one that it is, as OpenAI has it."""
        own = Likely(item.token, item.logprob)
        return item.top if any(likely.token == item.token for likely in item.top) else (*item.top, own)

    def _add(self, token: int, logprob: float | None, top: dict[str, float] | None) -> None:
        for name, value in zip(_LEGACY, (self._name(token), logprob, top, self._offset), strict=True):
            self._fields[name].append(value)
        self._offset += len(self._stream.feed(self._pieces[token]))

    def _name(self, token: int) -> str:
        """A token's text, or, where it is a part of a character, its bytes as OpenAI spells them."""
        data = self._pieces[token]
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def text_of(tokens: Sequence[int], pieces: Sequence[bytes]) -> str:
    """The text that tokens stand for."""
    return b"".join(pieces[token] for token in tokens).decode("utf-8", "replace")
