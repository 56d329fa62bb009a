"""An answer as a message of Anthropic's: the events of a stream, and the object that they build.

The events are those of docs.anthropic.com/en/docs/build-with-claude/streaming.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from copy import deepcopy
from types import MappingProxyType
from typing import Any

from abcli.chat.answer import Answer, Usage
from abcli.chat.calls.events import ArgumentsText, CallBegun, CallDropped
from abcli.chat.calls.events import Event as CallEvent
from abcli.serve.blocks import Blocks, Events
from abcli.serve.chat_shapes import own_fields

# A thought of Anthropic's is signed; there is nobody here to check it.
_BESIDE: dict[str, dict[str, Any]] = {"thinking": {"signature": ""}, "text": {"citations": None}}
_CALLER = {"caller": {"type": "direct"}}
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageEvents(Blocks):
    """Tells of an answer in the events of a stream, and keeps the message as far as it has come.

    A call that was cut off is in the stream, as Anthropic's is, but not in the message.
    """

    thought, text = "thinking", "text"

    def __init__(self, body: Mapping[str, Any], model: str, buckets: Mapping[str, Any] = MappingProxyType({})) -> None:
        """`body` is the request; `buckets` what is told of bases and merge rule."""
        super().__init__()
        self._buckets = buckets
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
        self._begun = 0
        self._arguments = ""

    def begin(self, prompt_tokens: int) -> Events:
        """The events before the first piece."""
        self.message["usage"] = _usage(Usage(prompt_tokens, 0, 0))
        yield {"type": "message_start", "message": deepcopy(self.message)}
        yield {"type": "ping"}

    def write(self, kind: str, text: str) -> Events:
        """A piece of a thought or text, in a block of its own."""
        if not self.is_open(kind):
            yield from self._close()
            yield self._open({"type": kind, kind: "", **_BESIDE[kind]})
        assert self.block is not None  # noqa: S101 - one is open
        self.block[kind] += text
        yield self._delta({"type": f"{kind}_delta", kind: text})

    def call(self, event: CallEvent) -> Events:
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
        elif self.block is not None:
            self.block["input"] = json.loads(self._arguments)
            yield from self._close()

    def end(self, answer: Answer) -> Events:
        if not self._begun:
            yield self._open({"type": "text", "text": "", **_BESIDE["text"]})
        yield from self._close()
        usage = _usage(answer.usage)
        ending = _ending(self._reason(answer), answer.stopped_by or None)
        own = {**self._buckets, **own_fields(answer)}
        self.message.update(ending, usage=usage, abcli=own)
        yield {"type": "message_delta", "delta": ending, "usage": usage, "abcli": own}
        yield {"type": "message_stop"}

    def _reason(self, answer: Answer) -> str:
        # What was cut before the request's own limit was cut by the context.
        if answer.finish_reason == "length" and (self._most is None or answer.usage.completion_tokens < self._most):
            return "model_context_window_exceeded"
        return "stop_sequence" if answer.stopped_by else _REASONS[answer.finish_reason]

    def _open(self, block: dict[str, Any]) -> dict[str, Any]:
        self.opened(block)
        self._begun += 1
        self.message["content"].append(block)
        return {"type": "content_block_start", "index": self._begun - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._begun - 1, "delta": delta}

    def _close(self) -> Events:
        """End the block that is open, if one is."""
        if self.block is not None:
            self.block = None
            yield {"type": "content_block_stop", "index": self._begun - 1}


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
