"""What a request says beside its messages: tools, whether to think, and what else the template shall know."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from abcli.chat.functions import as_tools
from abcli.chat.message_format import shown
from abcli.chat.messages import Tool
from abcli.chat.tools import read_tools
from abcli.errors import UsageError

Thinking = Literal["auto", "on", "off"]
ReasoningFormat = Literal["auto", "none", "deepseek", "deepseek-legacy"]
TOOL_CHOICES = ("auto", "none", "required")
# What is abcli's own to say to a template.
_OWN_VARIABLES = ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token")


@dataclass(frozen=True)
class ChatOptions:
    """How a conversation is put to a model, and how its answer is read.

    `tool_choice` is "auto", "none", "required" or the name of the tool to call. `thinking_budget` is the most tokens of
    a thought, -1 for no limit. `chat_template_kwargs` is the text of a JSON object: variables for the template.
    """

    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    parallel_tool_calls: bool = True
    thinking: Thinking = "auto"
    thinking_budget: int = -1
    reasoning_effort: str = ""
    reasoning_format: ReasoningFormat = "auto"
    chat_template_kwargs: str = ""

    @property
    def usable_tools(self) -> tuple[Tool, ...]:
        """The tools that the model is told of and may call."""
        return () if self.tool_choice == "none" else self.tools

    def variables(self) -> dict[str, Any]:
        """What the template gets beside the messages; what has no value is left undefined."""
        found: dict[str, Any] = {}
        if self.usable_tools:
            found = tool_variables([tool.fields for tool in self.usable_tools])
        if self.thinking != "auto":
            # DeepSeek's and Granite's templates call it otherwise.
            found["enable_thinking"] = found["thinking"] = self.thinking == "on"
        if self.reasoning_effort:
            found["reasoning_effort"] = self.reasoning_effort
        return {**found, **json.loads(self.chat_template_kwargs or "{}")}


def tool_variables(tools: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What templates get to know tools by; SmolLM3 and FireFunction have their own names for them."""
    return {"tools": tools, "xml_tools": tools, "functions": json.dumps(tools, ensure_ascii=False, indent=2)}


OPTIONS: tuple[str, ...] = tuple(field.name for field in fields(ChatOptions))


def chat_options(settings: Mapping[str, Any], base: ChatOptions | None = None) -> ChatOptions:
    """`base` with settings by the names of its fields, as OpenAI's clients or the library's callers write them.

    `tools` may hold `Tool`s, mappings and Python functions; `tool_choice` may be OpenAI's object that names a function;
    `reasoning_effort="none"` switches thinking off. Raises UsageError and PromptError for values that make no sense.
    """
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in OPTIONS:
            raise UsageError(f"there is no option `{name}`", f"choose one of: {', '.join(OPTIONS)}", setting=name)
        changes[name] = _READERS[name](name, value)
    if changes.get("reasoning_effort") == "none":
        changes.update(reasoning_effort="", thinking="off")
    options = replace(base or ChatOptions(), **changes)
    _check_choice(options)
    return options


def _check_choice(options: ChatOptions) -> None:
    choice = options.tool_choice
    names = [tool.name for tool in options.tools]
    if choice in ("auto", "none") or choice in names or (choice == "required" and names):
        return
    if not names:
        raise UsageError(f"`tool_choice={choice}` needs tools", "give `tools`", setting="tool_choice")
    raise UsageError(
        f"`tool_choice` {choice!r:.80} is none of the tools",
        f"choose one of: {', '.join([*TOOL_CHOICES, *names])}",
        setting="tool_choice",
    )


def _tools(name: str, value: Any) -> tuple[Tool, ...]:
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Iterable):
        return read_tools(value)
    return as_tools(value)


def _choice(name: str, value: Any) -> str:
    if isinstance(value, Mapping) and value.get("type", "function") == "function":
        function = value.get("function", value)
        value = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(value, str) or not value:
        hint = f'use {", ".join(TOOL_CHOICES)} or {{"type": "function", "function": {{"name": "..."}}}}'
        raise UsageError(f"`{name}` is {shown(value)}", hint, setting=name)
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise UsageError(f"`{name}` is {shown(value)}", "make it true or false", setting=name)
    return value


def _budget(name: str, value: Any) -> int:
    if type(value) is not int or not -1 <= value < 2**31:
        raise UsageError(f"`{name}` {shown(value)} is impossible", "choose 0 or more, or -1", setting=name)
    return value


def _thinking(name: str, value: Any) -> str:
    # Plain Python has a better word for two of them.
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else _word(name, value, get_args(Thinking))


def _format(name: str, value: Any) -> str:
    return _word(name, value, get_args(ReasoningFormat))


def _word(name: str, value: Any, known: tuple[str, ...]) -> str:
    if value not in known:
        raise UsageError(f"`{name}` {shown(value)} is impossible", f"choose one of {', '.join(known)}", setting=name)
    return str(value)


def _effort(name: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > 40:
        raise UsageError(f"`{name}` is {shown(value)}", "make it a word such as low, medium or high", setting=name)
    return value


def _variables(name: str, value: Any) -> str:
    """The variables as JSON, from a text of it or a mapping."""
    hint = 'write a JSON object, as in {"enable_thinking": false}'
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except (ValueError, RecursionError) as error:
            raise UsageError(f"`{name}` is not JSON: {error}", hint, setting=name) from None
    if not isinstance(value, Mapping):
        raise UsageError(f"`{name}` is {shown(value)}", hint, setting=name)
    for variable, content in value.items():
        if variable in _OWN_VARIABLES:
            raise UsageError(f"`{name}` sets {variable}, which is not its to set", "leave it out", setting=name)
        if variable == "enable_thinking" and not isinstance(content, bool):
            raise UsageError(f"enable_thinking in `{name}` is {shown(content)}", "make it true or false", setting=name)
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"`{name}` is not JSON: {error}", hint, setting=name) from None
    return text if value else ""


_READERS: dict[str, Any] = {
    "tools": _tools,
    "tool_choice": _choice,
    "parallel_tool_calls": _flag,
    "thinking": _thinking,
    "thinking_budget": _budget,
    "reasoning_effort": _effort,
    "reasoning_format": _format,
    "chat_template_kwargs": _variables,
}


def option_fields(options: ChatOptions) -> dict[str, Any]:
    """What differs from the defaults, as JSON values that `chat_options` reads back."""
    found = {name: getattr(options, name) for name in OPTIONS if getattr(options, name) != getattr(ChatOptions(), name)}
    if options.tools:
        found["tools"] = [tool.fields for tool in options.tools]
    return found
