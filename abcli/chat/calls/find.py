"""Finding out how a model writes calls and thoughts, from what its chat template writes for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from abcli.chat.calls.format import HERMES, CallFormat, Thoughts
from abcli.errors import TemplateError


class Render(Protocol):
    """Renders a conversation through a chat template; raises TemplateError where the template fails or refuses."""

    def __call__(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        **variables: Any,
    ) -> str:
        """The text for messages and tools as the template takes them, as plain JSON values."""


_NAME = "qzfunctionqz"
_CALL = {"id": "qzid12345", "type": "function", "function": {"name": _NAME, "arguments": {"qzkeyqz": "qzvalueqz"}}}
_MESSAGES = ({"role": "user", "content": "qzquestionqz"}, {"role": "assistant", "content": "", "tool_calls": [_CALL]})


def find_format(render: Render) -> CallFormat:
    """The format that a template writes, or the Hermes models' as a fallback for a template that knows no tools."""
    try:
        written = render(_MESSAGES)
    except TemplateError:
        written = ""
    thoughts = Thoughts("<think>", "</think>")
    return replace(HERMES, thoughts=thoughts, fallback=HERMES.call_begin + _NAME not in written)
