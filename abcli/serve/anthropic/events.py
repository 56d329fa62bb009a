"""An answer as a message of Anthropic's: the events of a stream, and the object that they build.

The events are those of docs.anthropic.com/en/docs/build-with-claude/streaming.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from abcli.chat.answer import Answer, Piece, Usage
from abcli.chat.calls.events import ArgumentsText, CallBegun, CallDropped
from abcli.chat.calls.events import Event as CallEvent

# A thought of Anthropic's is signed; there is nobody here to check it.
_BESIDE: dict[str, dict[str, Any]] = {"thinking": {"signature": ""}, "text": {"citations": None}}
_CALLER = {"caller": {"type": "direct"}}
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageEvents:
    """Tells of an answer in the events of a stream, and keeps the message as far as it has come.

    A thought, a text and each call are blocks, in the order in which they came; a text of white space alone beside
    others is none. A call that was cut off is in the stream, as Anthropic's is, but not in the message.
    """

    def __init__(self, body: Mapping[str, Any], model: str) -> None:
        """`body` is the request."""
        self.message: dict[str, Any] = {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            **_ending(None),
            "usage": _usage(Usage(0, 0, 0)),
        }
        self._most = body.get("max_tokens")
        self._block: dict[str, Any] | None = None
        self._begun = 0
        self._blank = ""
        self._arguments = ""

    def begin(self, prompt_tokens: int) -> Iterator[dict[str, Any]]:
        """The events before the first piece."""
        self.message["usage"] = _usage(Usage(prompt_tokens, 0, 0))
        yield {"type": "message_start", "message": deepcopy(self.message)}
        yield {"type": "ping"}

    def add(self, piece: Piece) -> Iterator[dict[str, Any]]:
        """The events of a piece; those of the last one end the stream."""
        if piece.reasoning:
            yield from self._write("thinking", piece.reasoning)
        if piece.text:
            yield from self._say(piece.text)
        for event in piece.events:
            yield from self._call(event)
        if piece.answer is not None:
            yield from self._end(piece.answer)

    def _say(self, text: str) -> Iterator[dict[str, Any]]:
        """A piece of the text; white space waits for what comes behind it."""
        text, self._blank = self._blank + text, ""
        if self._is_open("text") or not text.isspace():
            yield from self._write("text", text)
        else:
            self._blank = text

    def _write(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        """A piece of a thought or text, in a block of its own."""
        if not self._is_open(kind):
            yield from self._close()
            yield self._open({"type": kind, kind: "", **_BESIDE[kind]})
        assert self._block is not None  # noqa: S101 - one is open
        self._block[kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def _call(self, event: CallEvent) -> Iterator[dict[str, Any]]:
        if isinstance(event, CallBegun):
            yield from self._close()
            self._arguments = ""
            yield self._open({"type": "tool_use", "id": event.id, "name": event.name, "input": {}, **_CALLER})
        elif isinstance(event, ArgumentsText):
            self._arguments += event.text
            yield self._delta({"type": "input_json_delta", "partial_json": event.text})
        elif isinstance(event, CallDropped):
            yield from self._close()
            self.message["content"].pop()
        elif self._block is not None:
            self._block["input"] = json.loads(self._arguments)
            yield from self._close()

    def _end(self, answer: Answer) -> Iterator[dict[str, Any]]:
        if not self._begun:
            yield self._open({"type": "text", "text": "", **_BESIDE["text"]})
        yield from self._close()
        usage = _usage(answer.usage)
        ending = _ending(self._reason(answer), answer.stopped_by or None)
        self.message.update(ending, usage=usage)
        yield {"type": "message_delta", "delta": ending, "usage": usage}
        yield {"type": "message_stop"}

    def _reason(self, answer: Answer) -> str:
        # What was cut before the request's own limit was cut by the context.
        if answer.finish_reason == "length" and (self._most is None or answer.usage.completion_tokens < self._most):
            return "model_context_window_exceeded"
        return "stop_sequence" if answer.stopped_by else _REASONS[answer.finish_reason]

    def _open(self, block: dict[str, Any]) -> dict[str, Any]:
        self._block = block
        self._blank = ""
        self._begun += 1
        self.message["content"].append(block)
        return {"type": "content_block_start", "index": self._begun - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._begun - 1, "delta": delta}

    def _close(self) -> Iterator[dict[str, Any]]:
        """End the block that is open, if one is."""
        if self._block is not None:
            self._block = None
            yield {"type": "content_block_stop", "index": self._begun - 1}

    def _is_open(self, kind: str) -> bool:
        return self._block is not None and self._block["type"] == kind


def _ending(reason: str | None, stop: str | None = None) -> dict[str, Any]:
    """Why a message ended."""
    return {"stop_reason": reason, "stop_sequence": stop, "stop_details": None, "container": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """The numbers of tokens; Anthropic counts what was there already apart."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
        **dict.fromkeys(("cache_creation", "inference_geo", "output_tokens_details", "server_tool_use")),
        "service_tier": "standard",
    }
