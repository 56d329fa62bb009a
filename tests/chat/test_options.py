"""What a request says beside its messages."""

from __future__ import annotations

import json
from typing import Any

import pytest

from abcli.chat.messages import Tool
from abcli.chat.options import ChatOptions, chat_options, option_fields
from abcli.errors import PromptError, UsageError

TOOLS = [{"type": "function", "function": {"name": "f"}}, {"name": "g"}]
ALL: dict[str, Any] = {
    "tools": TOOLS,
    "tool_choice": "f",
    "parallel_tool_calls": False,
    "thinking": "on",
    "thinking_budget": 7,
    "reasoning_effort": "high",
    "reasoning_format": "none",
    "chat_template_kwargs": {"a": [1, "\u00e9"]},
}


def test_options_are_read_and_written() -> None:
    options = chat_options(ALL)
    assert options.tools == (Tool("f"), Tool("g"))
    assert chat_options(option_fields(options)) == options
    assert hash(options) == hash(chat_options(json.loads(json.dumps(option_fields(options)))))
    assert option_fields(ChatOptions()) == {}
    assert chat_options({"thinking": False}, options).thinking == "off"
    assert chat_options({}, options) == options


def test_what_the_template_gets() -> None:
    assert ChatOptions().variables() == {}
    found = chat_options(ALL).variables()
    assert [tool["function"]["name"] for tool in found["tools"]] == ["f", "g"]
    assert (found["enable_thinking"], found["reasoning_effort"], found["a"]) == (True, "high", [1, "\u00e9"])
    assert "tools" not in chat_options({**ALL, "tool_choice": "none"}).variables()
    assert chat_options({"thinking": "off", "chat_template_kwargs": '{"enable_thinking": true}'}).variables() == {
        "enable_thinking": True,
        "thinking": False,
    }
    assert chat_options({"reasoning_effort": "none"}) == ChatOptions(thinking="off")


@pytest.mark.parametrize("choice", ["f", {"name": "f"}, {"type": "function", "function": {"name": "f"}}])
def test_a_function_is_chosen_in_several_words(choice: Any) -> None:
    assert chat_options({"tools": TOOLS, "tool_choice": choice}).tool_choice == "f"


@pytest.mark.parametrize(
    ("settings", "setting"),
    [
        ({"tool": []}, "tool"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "h", "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": {"type": "allowed_tools"}, "tools": TOOLS}, "tool_choice"),
        ({"tool_choice": 3}, "tool_choice"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"thinking": "maybe"}, "thinking"),
        ({"thinking": ["on"]}, "thinking"),
        ({"thinking_budget": -2}, "thinking_budget"),
        ({"thinking_budget": True}, "thinking_budget"),
        ({"reasoning_effort": 3}, "reasoning_effort"),
        ({"reasoning_format": "other"}, "reasoning_format"),
        ({"chat_template_kwargs": "{"}, "chat_template_kwargs"),
        ({"chat_template_kwargs": "[]"}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"enable_thinking": "false"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": object()}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"a": "\ud800"}}, "chat_template_kwargs"),
    ],
)
def test_an_error_names_the_option(settings: dict[str, Any], setting: str) -> None:
    with pytest.raises(UsageError) as caught:
        chat_options(settings)
    assert caught.value.setting == setting
    assert caught.value.hint


@pytest.mark.parametrize("tools", ["f", {"name": "f"}, 3, [3]])
def test_what_is_no_list_of_tools(tools: Any) -> None:
    with pytest.raises(PromptError):
        chat_options({"tools": tools})
