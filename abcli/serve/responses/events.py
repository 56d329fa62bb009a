"""An answer as a response of OpenAI's: the events of a stream, and the object that they build.

The events are those of platform.openai.com/docs/api-reference/responses-streaming.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from copy import deepcopy
from types import MappingProxyType
from typing import Any

from abcli.chat.answer import Answer, Piece
from abcli.chat.calls.events import ArgumentsText, CallBegun, CallDropped, CallFinished
from abcli.chat.calls.events import Event as CallEvent
from abcli.sampling import SamplingConfig
from abcli.serve.blocks import Blocks, Events
from abcli.serve.chat_shapes import own_fields
from abcli.serve.responses.request import usable_tools

_ECHOED = ("instructions", "max_output_tokens", "max_tool_calls", "prompt_cache_key", "safety_identifier")


class ResponseEvents(Blocks):
    """Tells of an answer in the events of a stream, and keeps the response as far as it has come.

    Blocks are items of the output; one that was cut off has the status "incomplete".
    """

    thought, text = "reasoning", "message"

    def __init__(self, body: Mapping[str, Any], model: str, buckets: Mapping[str, Any] = MappingProxyType({})) -> None:
        """`body` is the request, whose settings the response repeats; `buckets` is told of bases and merge rule."""
        super().__init__()
        self._buckets = buckets
        self.response = _blank_response(body, model)
        self._count = 0
        self._logprobs: list[Mapping[str, Any]] = []
        self._thought_tokens = 0

    def begin(self) -> Events:
        """The events before the first piece."""
        yield self._lifecycle("created")
        yield self.goes_on()

    def goes_on(self) -> dict[str, Any]:
        """The event that nothing is new."""
        return self._lifecycle("in_progress")

    def add(self, piece: Piece, logprobs: Sequence[Mapping[str, Any]] = ()) -> Events:
        """The events of a piece; those of the last one end the stream.

        `logprobs` are those of the text's tokens since the piece before, as chat completions have them.
        """
        self._logprobs += logprobs
        self._thought_tokens += bool(piece.reasoning)
        return super().add(piece)

    def fail(self, message: str) -> Events:
        """The events of an error in the middle of the answer."""
        self.response.update(status="failed", error={"code": "server_error", "message": message})
        yield self._lifecycle("failed")

    def write(self, kind: str, text: str) -> Events:
        """A piece of a thought or text, in an item of its own."""
        if not self.is_open(kind):
            yield from self._close()
            yield from self._open(kind)
        part = self._part
        part["text"] += text
        # Tokens of thoughts and calls have nowhere to tell of theirs.
        news, self._logprobs = self._logprobs, []
        if kind == "message":
            part["logprobs"] += news
            yield self._in_part("response.output_text.delta", delta=text, logprobs=news)
        else:
            yield self._in_part("response.reasoning_text.delta", delta=text)

    def call(self, event: CallEvent) -> Events:
        self._logprobs = []
        if isinstance(event, CallBegun):
            yield from self._close()
            call = {"id": _identifier("fc"), "type": "function_call", "status": "in_progress", "call_id": event.id}
            yield from self._add_item({**call, "name": event.name, "arguments": ""})
        elif self.block is not None and isinstance(event, ArgumentsText):
            self.block["arguments"] += event.text
            yield self._in_item("response.function_call_arguments.delta", delta=event.text)
        elif isinstance(event, CallFinished):
            yield from self._close()
        elif isinstance(event, CallDropped):
            yield from self._close("incomplete")

    def end(self, answer: Answer) -> Events:
        if not self.response["output"]:
            yield from self._open("message")
        status = "incomplete" if answer.finish_reason == "length" else "completed"
        yield from self._close(status)
        if status == "incomplete":
            self.response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.response["completed_at"] = int(time.time())
        usage = answer.usage
        computed = usage.prompt_tokens - usage.cached_tokens
        self.response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": computed},
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": self._thought_tokens},
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        }
        self.response["status"] = status
        self.response["abcli"] = {**self._buckets, **own_fields(answer)}
        yield self._lifecycle(status)

    def _open(self, kind: str) -> Events:
        """Begin an item with a text, of a message or a thought."""
        item: dict[str, Any]
        part: dict[str, Any]
        if kind == "message":
            item = {"id": _identifier("msg"), "type": kind, "status": "in_progress", "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        else:
            item = {"id": _identifier("rs"), "type": kind, "status": "in_progress", "summary": [], "content": []}
            part = {"type": "reasoning_text", "text": ""}
        yield from self._add_item(item)
        item["content"].append(part)
        yield self._in_part("response.content_part.added", part=part)

    def _add_item(self, item: dict[str, Any]) -> Events:
        self.opened(item)
        self.response["output"].append(item)
        yield self._event("response.output_item.added", output_index=self._place, item=item)

    def _close(self, status: str = "completed") -> Events:
        """End the item that is open, if one is."""
        item = self.block
        if item is None:
            return
        item["status"] = status
        if item["type"] == "function_call":
            arguments = {"name": item["name"], "arguments": item["arguments"]}
            yield self._in_item("response.function_call_arguments.done", **arguments)
        else:
            part = self._part
            logprobs = {"logprobs": part["logprobs"]} if "logprobs" in part else {}
            yield self._in_part(f"response.{part['type']}.done", text=part["text"], **logprobs)
            yield self._in_part("response.content_part.done", part=part)
        yield self._event("response.output_item.done", output_index=self._place, item=item)
        self.block = None

    @property
    def _place(self) -> int:
        """Where in the output the open item stands: it is the last."""
        return len(self.response["output"]) - 1

    @property
    def _part(self) -> dict[str, Any]:
        """The text of the open item."""
        assert self.block is not None  # noqa: S101 - one is open
        part: dict[str, Any] = self.block["content"][0]
        return part

    def _in_part(self, name: str, /, **fields: Any) -> dict[str, Any]:
        return self._in_item(name, content_index=0, **fields)

    def _in_item(self, name: str, /, **fields: Any) -> dict[str, Any]:
        assert self.block is not None  # noqa: S101 - one is open
        return self._event(name, item_id=self.block["id"], output_index=self._place, **fields)

    def _lifecycle(self, status: str) -> dict[str, Any]:
        return self._event(f"response.{status}", response=self.response)

    def _event(self, name: str, /, **fields: Any) -> dict[str, Any]:
        """An event as it is now: what it tells of goes on changing."""
        self._count += 1
        return {"type": name, "sequence_number": self._count - 1, **deepcopy(fields)}


def _blank_response(body: Mapping[str, Any], model: str) -> dict[str, Any]:
    """A response without output, with the settings of its request or what holds where that names none."""
    text, reasoning = body.get("text") or {}, body.get("reasoning") or {}
    form = text.get("format") or {"type": "text"}
    if form["type"] == "json_schema":
        form = {"name": "", "description": "", "schema": None, "strict": False, **form}
    numbers = {name: getattr(SamplingConfig, name) for name in ("presence_penalty", "frequency_penalty")}
    numbers |= {"temperature": SamplingConfig.temperature, "top_p": SamplingConfig.top_p, "top_logprobs": 0}
    given = {name: body[name] for name in numbers if body.get(name) is not None}
    choice = body.get("tool_choice")
    return {
        "id": _identifier("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        **{name: body.get(name) for name in _ECHOED},
        **numbers,
        **given,
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "tool_choice": "auto" if choice is None else choice,
        "tools": [_shown_tool(tool) for tool in usable_tools(body)],
        "text": {"format": form},
        "reasoning": {"effort": reasoning.get("effort"), "summary": None},
        "metadata": body.get("metadata") or {},
        "usage": None,
        # What this server does not do.
        "background": False,
        "previous_response_id": None,
        "service_tier": "default",
        "store": False,
        "truncation": "disabled",
    }


def _shown_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.get("name"),
        "description": tool.get("description"),
        "parameters": tool.get("parameters"),
        "strict": bool(tool.get("strict")),
    }


def _identifier(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"
