"""Conversations with a call in them, in a form that a template takes, and what it writes for them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

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


# Texts that no template has of itself.
QUESTION, ANSWER, THOUGHT = "qzquestionqz", "qzanswerqz", "qzthoughtqz"
NAMES = ("qzfirstfunctionqz", "qzsecondfunctionqz")
KEYS = ("qzkeyaqz", "qzkeybqz", "qzkeycqz", "qzkeydqz", "qzkeyeqz")
VALUES = ("qzvalueaqz", "qzvaluebqz")
# Nine letters or digits, as Mistral's templates want ids.
IDS = ("qz1234567", "qz7654321")
_TOOL = {
    "type": "function",
    "function": {
        "name": "qzlistedqz",
        "description": "d",
        "parameters": {"type": "object", "properties": {"p": {"type": "string", "description": "d"}}, "required": []},
    },
}


# A stranger's template may take its time for each of some forty renderings.
_SECONDS = 10.0


@dataclass(frozen=True)
class Form:
    """How a template takes an answer with calls."""

    arguments_as_text: bool
    empty: str | None


_FORMS = tuple(Form(as_text, empty) for empty in ("", None) for as_text in (False, True))


class Probes:
    """Renders probe conversations through one template."""

    def __init__(self, render: Render) -> None:
        self._render = render
        self._until = time.monotonic() + _SECONDS

    @cached_property
    def everything(self) -> str:
        """What is written for a question with tools and for an answer that calls one."""
        calls = self.calls(self.form, {KEYS[0]: VALUES[0]}) if self.form else ""
        return self._written([{"role": "user", "content": QUESTION}]) + calls

    def prompt(self, **variables: Any) -> str:
        """What is written after a question when an answer is to come; empty if the template fails."""
        return self._after_question([], add_generation_prompt=True, **variables)

    def answer(self, **fields: Any) -> str:
        """What is written after a question for an answer with these fields; empty if the template fails."""
        return self._after_question([{"role": "assistant", "content": ANSWER, **fields}])

    def calls(self, form: Form, *calls: Mapping[str, Any], content: str = "") -> str:
        """What is written after a question for an answer that makes calls with these arguments, empty on failure."""
        written = []
        for name, identifier, arguments in zip(NAMES, IDS, calls, strict=False):
            value = json.dumps(arguments) if form.arguments_as_text else arguments
            written.append({"id": identifier, "type": "function", "function": {"name": name, "arguments": value}})
        message = {"role": "assistant", "content": content or form.empty, "tool_calls": written}
        return self._after_question([message])

    @cached_property
    def form(self) -> Form | None:
        """The first form in which a call's name and argument are written."""
        return next((form for form in _FORMS if self._shows_calls(form)), None)

    def _shows_calls(self, form: Form) -> bool:
        text = self.calls(form, {KEYS[0]: VALUES[0]})
        return NAMES[0] in text and VALUES[0] in text and f'\\"{KEYS[0]}' not in text

    def _after_question(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        text = self._written([{"role": "user", "content": QUESTION}, *messages], **variables)
        return text.rpartition(QUESTION)[2] if QUESTION in text else ""

    def _written(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """What is written for messages and a tool; empty if the template fails, or has been too slow."""
        try:
            return self._render(messages, [_TOOL], **variables) if time.monotonic() < self._until else ""
        except TemplateError:
            return ""
