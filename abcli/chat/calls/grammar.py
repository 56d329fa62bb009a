"""A Lark grammar of the answers in which every call names a tool and has the arguments that its schema wants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from abcli.chat.calls.argument_rules import ArgumentRules
from abcli.chat.calls.format import NAME, CallFormat
from abcli.chat.calls.rules import Rules
from abcli.chat.messages import Tool
from abcli.errors import UsageError

Choice: TypeAlias = "Literal['auto', 'required'] | Tool"
"""Whether calls may or must be made, or the tool that has to be called."""

# Between a thought and what follows it.
_GAP = r"/\n{0,2}/"
# What is said where a brace would begin a call.
_SAID_WITHOUT_BRACE = r"/([^{](.|\n)*)?/"
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
    rules = Rules(special_tokens)
    calls = _calls(form, rules, chosen, several=parallel and form.several)
    opening = form.section_begin + ("" if NAME in form.call_begin else form.call_begin)
    answer = f"{rules.written(opening)} {calls}"
    if choice == "auto":
        said = _before_calls(form, rules, opening, calls)
        answer = " | ".join([*said, answer] if form.channels or form.bare else said)
    name = rules.rule(answer, name="answer")
    thoughts = form.thoughts
    if thoughts is None:
        return rules.grammar(name)
    rest = f"{rules.until(form.between)} {name}" if form.channels else f"{rules.until(thoughts.end)} {_GAP} {name}"
    return rules.grammar(rest if thought_opened else f"{name} | {rules.written(thoughts.begin)} {rest}")


def _before_calls(form: CallFormat, rules: Rules, opening: str, calls: str) -> list[str]:
    """Answers in which something is said, and calls may follow."""
    begin, *ends = form.framing or ("",)
    if form.channels:
        return [f"{rules.written(begin)} TEXT", f"{rules.written(begin)} {rules.until(form.between)} {calls}"]
    if form.bare:
        return [_SAID_WITHOUT_BRACE]
    found = ["TEXT", f"{rules.until(opening)} {calls}"]
    if begin and ends:
        after = f"({rules.written(''.join(ends[1:]))})?" if ends[1:] else ""
        framed = rules.rule(f"{rules.written(begin)} {rules.until(ends[0])}")
        found += [f"{framed} {after}", f"{framed} {rules.written(opening)} {calls} {after}"]
    return found


def _calls(form: CallFormat, rules: Rules, tools: Sequence[Tool], *, several: bool) -> str:
    """Calls, from the first one's name on, or all of them where the name is in their beginning, too."""
    arguments = ArgumentRules(form, rules)
    begun = form.call_begin if NAME in form.call_begin else ""
    written = []
    for tool in tools:
        name = json.dumps(tool.name, ensure_ascii=False)[1:-1] if form.keys else tool.name
        is_json = not form.tags and form.notation == "json"
        values = _schema(tool) if is_json else arguments.of(tool)
        head = rules.written(begun.replace(NAME, name) + name + form.name_end)
        written.append(f"{head} {values} {rules.written(form.call_end)}")
    call = rules.rule(" | ".join(written), name="call")
    between = rules.written(form.between + ("" if begun else form.call_begin))
    return f"{call} {f'({between} {call})*' if several else ''} {rules.written(form.section_end)}"


def _schema(tool: Tool) -> str:
    """The arguments as a JSON object, which has nothing but what the schema names, if it names anything."""
    schema: dict[str, Any] = {"type": "object", **tool.parameters}
    if not any(key in schema for key in _COMBINED):
        schema["additionalProperties"] = False
    return f"%json {json.dumps(schema, ensure_ascii=False)}"
