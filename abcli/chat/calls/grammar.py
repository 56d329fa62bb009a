"""A Lark grammar of the answers in which every call names a tool and has the arguments that its schema wants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from abcli.chat.calls.format import CallFormat
from abcli.chat.control_text import ControlText
from abcli.chat.messages import Tool
from abcli.errors import UsageError

Choice: TypeAlias = "Literal['auto', 'required'] | Tool"
"""Whether calls may or must be made, or the tool that has to be called."""

# Between a thought and what follows it.
_GAP = r"/\n{0,2}/"
_TEXT = r"TEXT: /(.|\n)*/"
# With one of these, what `properties` does not name may be named elsewhere.
_COMBINED = ("additionalProperties", "patternProperties", "allOf", "anyOf", "oneOf", "$ref")


def call_grammar(
    form: CallFormat,
    tools: Sequence[Tool],
    choice: Choice,
    parallel: bool,
    special_tokens: Mapping[str, int],
    *,
    thought_opened: bool = False,
) -> str:
    """The grammar, for `Constraint("lark", ...)`, of a whole answer from its first token on.

    With "auto" anything may be said before calls, or instead of them; else there is nothing but calls. A thought may
    come first, and has to where `thought_opened`, the end of the prompt having begun it. `parallel` allows more than
    one call, where the format does. `special_tokens` (text -> token) are those that the vocabulary does not take for
    text (`Vocabulary.special_tokens`). Raises UsageError if there are no tools.
    """
    chosen = [choice] if isinstance(choice, Tool) else list(tools)
    if not chosen:
        raise UsageError("there are no tools to call", "give some")
    rules = _Rules(form, ControlText(special_tokens))
    calls = rules.calls(chosen, several=parallel and form.several)
    opening = form.section_begin + form.call_begin
    if choice == "auto":
        start = f"TEXT | {rules.after_text(opening.lstrip())} {calls}"
    else:
        start = f"{rules.written(opening)} {calls}"
    return rules.grammar(start, thought_opened)


class _Rules:
    """The rules of one grammar."""

    def __init__(self, form: CallFormat, control: ControlText) -> None:
        self._form = form
        self._control = control
        self._rules: list[str] = []

    def grammar(self, start: str, thought_opened: bool) -> str:
        """All of the grammar; `start` is what comes after a thought."""
        thoughts = self._form.thoughts
        lines = [f"start: {start}"]
        if thoughts:
            rest = f"{self.after_text(thoughts.end)} {_GAP} answer"
            begin = self.written(thoughts.begin)
            lines = [f"start: {rest}" if thought_opened else f"start: answer | {begin} {rest}", f"answer: {start}"]
        return "\n".join([*lines, *self._rules, _TEXT])

    def calls(self, tools: Sequence[Tool], *, several: bool) -> str:
        """Calls, from the first one's name on."""
        form = self._form
        self._add("call", " | ".join(self._call(tool) for tool in tools))
        more = f"({self.written(form.between + form.call_begin)} call)*" if several else ""
        return f"call {more} {self.written(form.section_end)}"

    def written(self, text: str) -> str:
        """A text that has to come, its special tokens as such."""
        parts = self._control.split(text)
        return " ".join(f"<[{part}]>" if isinstance(part, int) else json.dumps(part) for part in parts)

    def after_text(self, marker: str) -> str:
        """Any text up to a marker, and the marker."""
        first = self._control.split(marker)[0]
        if isinstance(first, int):
            return f"TEXT {self.written(marker)}"
        # What has no white space in it is what the text ends with.
        word = first.split()[0]
        behind = first[len(word) :]
        name = f"until_{len(self._rules)}"
        self._rules.append(f"{name}[lazy]: TEXT {json.dumps(word)}")
        return f"{name} {self.written(behind + marker[len(first) :])}"

    def _add(self, name: str, rule: str) -> str:
        self._rules.append(f"{name}: {rule}")
        return name

    def _call(self, tool: Tool) -> str:
        form = self._form
        name = json.dumps(tool.name, ensure_ascii=False)[1:-1] if form.keys else tool.name
        parts = [self.written(name + form.name_end), self._arguments(tool), self.written(form.call_end)]
        return " ".join(filter(None, parts))

    def _arguments(self, tool: Tool) -> str:
        return f"%json {json.dumps(arguments_schema(tool), ensure_ascii=False)}"


def arguments_schema(tool: Tool) -> dict[str, Any]:
    """The schema of a tool's arguments, an object that has nothing but what the schema names, if it names anything."""
    schema = {"type": "object", **tool.parameters}
    if not any(key in schema for key in _COMBINED):
        schema["additionalProperties"] = False
    return schema
