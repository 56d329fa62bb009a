"""Tools for models whose template knows none: what the Hermes and Qwen models are told about them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from abcli.chat.messages import Tool

_BEFORE = (
    "You may call one or more functions to help with the user's request. Their signatures stand within <tools></tools>:"
)
_AFTER = (
    "For each function call, return a JSON object with the function's name and arguments within "
    '<tool_call></tool_call>:\n<tool_call>\n{"name": <function-name>, "arguments": <arguments-object>}\n</tool_call>'
)


def tools_text(tools: Sequence[Tool]) -> str:
    """What the system message has to say for a model to know the tools and how to call them."""
    listed = "\n".join(json.dumps(tool.fields, ensure_ascii=False) for tool in tools)
    return f"{_BEFORE}\n<tools>\n{listed}\n</tools>\n\n{_AFTER}"
