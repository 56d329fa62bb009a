"""The grammars of the public templates' formats allow what the templates write, and no other functions or types."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from abcli.chat.calls.format import NAME, NUMBER, CallFormat
from abcli.chat.calls.grammar import Choice, call_grammar
from abcli.chat.calls.rendering import format_of_source, render_source
from abcli.grammar.constraint import Constraint
from abcli.grammar.guidance import Matcher, Matchers
from tests.chat.calls.conftest import parse
from tests.chat.calls.test_public_formats import (
    ARGUMENTS,
    CLOCK,
    FALLBACKS,
    SEARCH,
    WITHOUT_HISTORY,
    path,
    written_calls,
)
from tests.grammar.conftest import END, in_bytes

__all__ = ["in_bytes", "path"]
TOOLS = (SEARCH, CLOCK)
# What is escaped or not in one notation or another is none of a grammar's business.
CALLS = [("search_files", {**ARGUMENTS[0], "text": "a q"}), ("clock-2", {})]
# These write lists and objects as Python does, and a blank line for no arguments; their grammars don't.
PYTHON_VALUES = {"ByteDance-Seed-OSS", "openbmb-MiniCPM5-1B"}
BLANK_LINES = {"deepseek-ai-DeepSeek-V4", "deepseek-ai-DeepSeek-V4-Flash-0731"}


def start(matchers: Matchers, form: CallFormat, choice: Choice) -> Matcher:
    return matchers.start(Constraint("lark", call_grammar(form, TOOLS, choice, True, {})))


def followed(matcher: Matcher, text: str) -> tuple[int, str]:
    """How many of the text's bytes are allowed, and its longest beginning that is a complete answer."""
    data, complete = text.encode(), 0
    for position, byte in enumerate(data):
        if matcher.finished or matcher.allows(END):
            complete = position
        if matcher.finished or not matcher.allows(byte):
            return position, data[:complete].decode()
        matcher.accept(byte)
    return len(data), text if matcher.finished or matcher.allows(END) else data[:complete].decode()


def calls_of(form: CallFormat, name: str) -> list[tuple[str, dict[str, Any]]]:
    """Calls that a template writes as its grammar has them."""
    calls = CALLS if form.several else CALLS[:1]
    if name in PYTHON_VALUES:
        calls = [(name, {key: arguments[key] for key in arguments if key != "options"}) for name, arguments in calls]
    return [call for call in calls if call[1] or name not in BLANK_LINES]


def test_what_a_template_writes_is_allowed(path: Path, in_bytes: Matchers) -> None:
    source = path.read_text(encoding="utf-8")
    render, form = render_source(source), format_of_source(source)
    if path.stem in FALLBACKS | WITHOUT_HISTORY:
        return
    calls = calls_of(form, path.stem)
    written = written_calls(render, calls, "")
    opening = (form.section_begin + form.call_begin)[:12].partition(NAME)[0].partition(NUMBER)[0]
    text = written[written.index(opening) :]
    for choice in ("required", "auto"):
        _, allowed = followed(start(in_bytes, form, choice), text)
        read = parse(form, [allowed], TOOLS).calls
        assert [(name, json.loads(arguments)) for name, arguments in read] == calls, (choice, text, allowed)
    for wrong in (text.replace("search_files", "search_folders"), text.replace("7", "x", 1)):
        length, complete = followed(start(in_bytes, form, "required"), wrong)
        assert length < len(wrong.encode())
        assert not complete
    assert not followed(start(in_bytes, form, CLOCK), text)[1]
