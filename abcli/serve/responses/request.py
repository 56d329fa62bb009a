"""From a request for a response to one for a chat's answer.

The fields are those of platform.openai.com/docs/api-reference/responses/create; others, such as llama.cpp's sampling
settings, stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from abcli.errors import UsageError
from abcli.serve.fields import wrong
from abcli.serve.reading import (
    chat_tool,
    function_call,
    read_list,
    read_object,
    read_string,
    read_text_part,
    read_texts,
)

# What a chat request calls otherwise, or does not have.
_OWN = frozenset((
    "background", "conversation", "include", "input", "instructions", "max_output_tokens", "max_tool_calls", "metadata",
    "n", "previous_response_id", "prompt", "prompt_cache_key", "prompt_cache_retention", "reasoning",
    "safety_identifier", "service_tier", "store", "text", "tool_choice", "tools", "top_logprobs", "truncation", "user",
))  # fmt: skip
_KEPT_ELSEWHERE = ("conversation", "previous_response_id", "prompt")
_ROLES = ("user", "assistant", "system", "developer")
_PARTS = {"input_text": "text", "output_text": "text", "text": "text", "refusal": "refusal"}
_THOUGHTS = {"reasoning_text": "text", "summary_text": "text", "text": "text"}
_LOGPROBS = "message.output_text.logprobs"


def chat_request(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a chat request that asks for the same. Raises UsageError that names the field."""
    for name in _KEPT_ELSEWHERE:
        if body.get(name) is not None:
            raise wrong(name, body[name], "this server keeps no responses: send the whole conversation as `input`")
    if body.get("background"):
        raise wrong("background", body["background"], "this server answers at once: leave it out")
    request = {name: value for name, value in body.items() if name not in _OWN}
    request["messages"] = _messages(body)
    if body.get("max_output_tokens") is not None:
        request["max_completion_tokens"] = body["max_output_tokens"]
    reasoning = read_object(body.get("reasoning") or {}, "reasoning")
    if reasoning.get("effort") is not None:
        request["reasoning_effort"] = read_string(reasoning["effort"], "reasoning.effort")
    request |= _tools(body) | _format(body) | _logprobs(body)
    return request


def usable_tools(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tools of a request that a model here can call: functions. What a server of OpenAI's runs is passed over."""
    tools = [read_object(tool, f"tools[{number}]") for number, tool in enumerate(read_list(body.get("tools"), "tools"))]
    functions = [tool for tool in tools if tool.get("type", "function") == "function"]
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping) and choice.get("type") == "allowed_tools":
        names = [
            read_object(tool, f"tool_choice.tools[{number}]").get("name")
            for number, tool in enumerate(read_list(choice.get("tools"), "tool_choice.tools"))
        ]
        functions = [tool for tool in functions if tool.get("name") in names]
    return functions


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": read_string(body["instructions"], "instructions")})
    given = body.get("input")
    if isinstance(given, str):
        return [*messages, {"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise wrong("input", given, 'write a text, or [{"role": "user", "content": "..."}]')
    for number, item in enumerate(given):
        _add(messages, read_object(item, f"input[{number}]"), f"input[{number}]")
    return messages


def _add(messages: list[dict[str, Any]], item: Mapping[str, Any], place: str) -> None:
    """What an item of the input says, behind the messages before it."""
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in _ROLES:
            raise wrong(f"{place}.role", role, f"use one of {', '.join(_ROLES)}")
        content = read_texts(item.get("content"), f"{place}.content", _PARTS)
        if role == "assistant" and messages and _only_thought(messages[-1]):
            messages[-1]["content"] = content
        else:
            messages.append({"role": role, "content": content})
    elif kind == "function_call":
        _assistants(messages).setdefault("tool_calls", []).append(
            function_call(
                read_string(item.get("call_id"), f"{place}.call_id"),
                read_string(item.get("name"), f"{place}.name"),
                read_string(item.get("arguments"), f"{place}.arguments"),
            )
        )
    elif kind == "function_call_output":
        content = read_texts(item.get("output"), f"{place}.output", _PARTS)
        identifier = read_string(item.get("call_id"), f"{place}.call_id")
        messages.append({"role": "tool", "tool_call_id": identifier, "content": content})
    elif kind == "reasoning":
        messages.append({"role": "assistant", "content": "", "reasoning_content": _thought(item, place)})
    else:
        known = "message, function_call, function_call_output or reasoning"
        raise wrong(f"{place}.type", kind, f"use {known}; this server keeps no items and runs no tools of its own")


def _assistants(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The last message if it is the assistant's, or else a new one."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def _only_thought(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and not message["content"] and "tool_calls" not in message


def _thought(item: Mapping[str, Any], place: str) -> str:
    """What was thought, or else its summary."""
    for name in ("content", "summary"):
        parts = read_list(item.get(name), f"{place}.{name}")
        if parts:
            return "\n\n".join(
                read_text_part(part, f"{place}.{name}[{number}]", _THOUGHTS)["text"]
                for number, part in enumerate(parts)
            )
    return ""


def _tools(body: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    functions = usable_tools(body)
    if functions:
        found["tools"] = [chat_tool(function, "parameters") for function in functions]
    choice = body.get("tool_choice")
    if isinstance(choice, Mapping):
        kind = choice.get("type")
        if kind == "allowed_tools":
            choice = choice.get("mode", "auto")
        elif kind == "function":
            choice = {"type": "function", "function": {"name": choice.get("name")}}
        else:
            raise wrong("tool_choice.type", kind, "use function or allowed_tools; this server runs no tools of its own")
    if choice is not None and (functions or choice not in ("auto", "none")):
        found["tool_choice"] = choice
    return found


def _format(body: Mapping[str, Any]) -> dict[str, Any]:
    """The form that the text shall have."""
    text = read_object(body.get("text") or {}, "text")
    form = read_object(text.get("format") or {"type": "text"}, "text.format")
    kind = form.get("type")
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"response_format": {"type": kind}}
    if kind == "json_schema":
        schema = {name: form[name] for name in ("name", "schema", "strict", "description") if name in form}
        return {"response_format": {"type": kind, "json_schema": schema}}
    raise wrong("text.format.type", kind, "use text, json_object or json_schema")


def _logprobs(body: Mapping[str, Any]) -> dict[str, Any]:
    include = read_list(body.get("include"), "include")
    most = body.get("top_logprobs")
    if most is not None and (type(most) is not int or not 0 <= most <= 20):
        raise UsageError(f"`top_logprobs` {most!r:.80} is impossible", "choose 0 to 20", setting="top_logprobs")
    if _LOGPROBS not in include and not most:
        return {}
    return {"logprobs": True, "top_logprobs": most or 0}
