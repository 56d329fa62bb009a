"""From a request for a message of Anthropic's to one for a chat's answer.

The fields are those of docs.anthropic.com/en/api/messages; others, such as llama.cpp's sampling settings, stay as they
are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from abcli.serve.fields import wrong
from abcli.serve.reading import (
    chat_tool,
    function_call,
    read_list,
    read_object,
    read_string,
    read_text_part,
    read_texts,
    text_part,
)

# What a chat request calls otherwise, or does not have.
_OWN = frozenset((
    "cache_control", "container", "context_management", "inference_geo", "mcp_servers", "metadata", "n",
    "output_config", "output_format", "service_tier", "speed", "stop_sequences", "system", "thinking", "tool_choice",
    "tools",
))  # fmt: skip
_TEXT = {"text": "text"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def chat_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a chat request that asks for the same. Raises UsageError that names the field."""
    request = {name: value for name, value in body.items() if name not in _OWN}
    request["messages"] = _messages(body)
    if body.get("stop_sequences") is not None:
        request["stop"] = [
            read_string(text, f"stop_sequences[{number}]")
            for number, text in enumerate(read_list(body["stop_sequences"], "stop_sequences"))
        ]
    return request | _tools(body) | _thinking(body) | _output(body)


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.get("system"):
        messages.append({"role": "system", "content": read_texts(body["system"], "system", _TEXT)})
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise wrong("messages", given, 'write [{"role": "user", "content": "..."}]')
    for number, item in enumerate(given):
        place = f"messages[{number}]"
        message = read_object(item, place)
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system"):
            raise wrong(f"{place}.role", role, "use user or assistant")
        if isinstance(content, str):
            messages.append({"role": role, "content": content})
        elif not isinstance(content, list):
            raise wrong(f"{place}.content", content, "make it a text or a list of blocks")
        elif role == "assistant":
            messages.append(_assistants(content, f"{place}.content"))
        else:
            messages += _others(role, content, f"{place}.content")
    return messages


def _assistants(blocks: list[Any], place: str) -> dict[str, Any]:
    """A message of the assistant: its thought, its text and its calls."""
    content, thoughts, calls = [], [], []
    for number, item in enumerate(blocks):
        where = f"{place}[{number}]"
        block = read_object(item, where)
        kind = block.get("type")
        if kind == "thinking":
            thoughts.append(read_string(block.get("thinking"), f"{where}.thinking"))
        elif kind == "tool_use":
            name = read_string(block.get("name"), f"{where}.name")
            arguments = json.dumps(read_object(block.get("input"), f"{where}.input"), ensure_ascii=False)
            calls.append(function_call(read_string(block.get("id"), f"{where}.id"), name, arguments))
        # What another server has hidden says nothing to a model here.
        elif kind != "redacted_thinking":
            content.append(read_text_part(block, where, _TEXT))
    message: dict[str, Any] = {"role": "assistant", "content": content or ""}
    if thoughts:
        message["reasoning_content"] = "\n\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _others(role: str, blocks: list[Any], place: str) -> list[dict[str, Any]]:
    """The messages in one of the user's: what tools gave, and what was said."""
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(blocks):
        where = f"{place}[{number}]"
        block = read_object(item, where)
        kind = block.get("type")
        if kind == "tool_result":
            identifier = read_string(block.get("tool_use_id"), f"{where}.tool_use_id")
            content = read_texts(block.get("content") or "", f"{where}.content", _TEXT)
            messages.append({"role": "tool", "tool_call_id": identifier, "content": content})
            continue
        part = _document(block, where) if kind == "document" else read_text_part(block, where, _TEXT)
        if not messages or messages[-1]["role"] != role:
            messages.append({"role": role, "content": []})
        messages[-1]["content"].append(part)
    return messages


def _document(block: Mapping[str, Any], place: str) -> dict[str, str]:
    """A document, if it is text, below its title."""
    source = read_object(block.get("source"), f"{place}.source")
    if source.get("type") not in ("text", "content"):
        raise wrong(f"{place}.source.type", source.get("type"), "only text can be read here: use text or content")
    if source["type"] == "text":
        parts = [text_part(read_string(source.get("data"), f"{place}.source.data"))]
    else:
        parts = read_texts(source.get("content"), f"{place}.source.content", _TEXT)
    title = block.get("title")
    lines = [read_string(title, f"{place}.title")] if title else []
    return text_part("\n".join([*lines, *(part["text"] for part in parts)]))


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """Tools that a model here can call; those that Anthropic defines or runs are passed over."""
    tools = [read_object(item, f"tools[{number}]") for number, item in enumerate(read_list(body.get("tools"), "tools"))]
    own = [chat_tool(tool, "input_schema") for tool in tools if tool.get("type") in (None, "custom")]
    found: dict[str, Any] = {"tools": own} if own else {}
    if body.get("tool_choice") is None:
        return found
    choice = read_object(body["tool_choice"], "tool_choice")
    kind = choice.get("type")
    if kind == "tool":
        found["tool_choice"] = {"type": "function", "function": {"name": choice.get("name")}}
    elif not isinstance(kind, str) or kind not in _CHOICES:
        raise wrong("tool_choice.type", kind, "use auto, any, tool or none")
    elif own or kind == "any":
        found["tool_choice"] = _CHOICES[kind]
    if choice.get("disable_parallel_tool_use"):
        found["parallel_tool_calls"] = False
    return found


def _thinking(body: Mapping[str, Any]) -> dict[str, Any]:
    if body.get("thinking") is None:
        return {}
    thinking = read_object(body["thinking"], "thinking")
    kind = thinking.get("type")
    if kind == "disabled":
        return {"enable_thinking": False}
    if kind == "enabled":
        budget = thinking.get("budget_tokens")
        if budget is None:
            return {"enable_thinking": True}
        if type(budget) is not int or budget < 0:
            raise wrong("thinking.budget_tokens", budget, "choose 0 or more")
        return {"enable_thinking": True, "thinking_budget_tokens": budget}
    if kind in ("adaptive", "between_tools"):
        return {}
    raise wrong("thinking.type", kind, "use enabled, adaptive or disabled")


def _output(body: Mapping[str, Any]) -> dict[str, Any]:
    """How much effort an answer shall take, and what form it shall have."""
    config = read_object(body.get("output_config") or {}, "output_config")
    found: dict[str, Any] = {}
    if config.get("effort") is not None:
        found["reasoning_effort"] = read_string(config["effort"], "output_config.effort")
    place = "output_format" if body.get("output_format") else "output_config.format"
    form = read_object(body.get("output_format") or config.get("format") or {}, place)
    if form:
        if form.get("type") != "json_schema":
            raise wrong(f"{place}.type", form.get("type"), "use json_schema")
        schema = {"name": "answer", "schema": form.get("schema"), "strict": True}
        found["response_format"] = {"type": "json_schema", "json_schema": schema}
    return found
