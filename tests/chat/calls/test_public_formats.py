"""The formats of the public templates: calls that a template writes are read as the same calls."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from abcli.chat.calls.format import CallFormat
from abcli.chat.calls.probes import Render
from abcli.chat.calls.rendering import format_of_source, render_source
from abcli.chat.messages import Tool
from abcli.errors import TemplateError
from scripts.fetch_public_templates import directory
from tests.chat.calls.conftest import parse, pieces

FOUND = sorted(directory().glob("*.jinja"))
# These templates know no tools.
FALLBACKS = {
    "HuggingFaceTB-SmolLM3-3B",
    "google-gemma-2-2b-it",
    "llama-cpp-rwkv-world",
    "microsoft-Phi-3.5-mini-instruct",
}
# These speak of calls, and don't write them.
WITHOUT_HISTORY = {"LFM2-8B-A1B", "LFM2.5-Instruct", "ibm-granite-granite-3.3-2B-Instruct"}
SEARCH = Tool(
    "search_files",
    "Search",
    {
        "type": "object",
        "properties": {
            "text": {"type": "string", "description": "What"},
            "most": {"type": "integer", "description": "How many"},
            "options": {
                "type": "object",
                "properties": {"tags": {"type": "array", "items": {"type": "string"}}, "exact": {"type": "boolean"}},
                "description": "How",
            },
        },
        "required": ["text"],
    },
)
CLOCK = Tool("clock-2", "The time", {"type": "object", "properties": {}, "required": []})
ARGUMENTS: list[dict[str, Any]] = [
    {"text": 'Ünï \\ "q"\n{[<b>]} 東京', "most": 7, "options": {"tags": ["a", "b c"], "exact": True}},
    {},
    {"text": "12", "most": -3},
]


@pytest.fixture(params=FOUND, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    found: Path = request.param
    return found


def written_calls(render: Render, calls: Sequence[tuple[str, Mapping[str, Any]]], content: str) -> str:
    """What a template writes for calls after the prompt; empty if it refuses them."""
    question = {"role": "user", "content": "qzquestionqz"}
    # Command R+ refuses parameters like the other tool's.
    tools = [CLOCK.fields]
    for empty, as_text in ((content, False), (content or None, False), (content, True), (content or None, True)):
        called = [
            {
                "id": f"call{number:05}",
                "type": "function",
                "function": {"name": name, "arguments": json.dumps(arguments) if as_text else arguments},
            }
            for number, (name, arguments) in enumerate(calls)
        ]
        try:
            text = render([question, {"role": "assistant", "content": empty, "tool_calls": called}], tools)
        except TemplateError:
            continue
        prompt = render([question], tools, add_generation_prompt=True)
        answer = text.rpartition("qzquestionqz")[2]
        opened = prompt.rpartition("qzquestionqz")[2]
        if calls[0][0] in answer and not (as_text and '\\"text\\"' in answer):
            return answer[len(opened) :] if answer.startswith(opened) else answer
    return ""


def test_most_templates_have_a_format_of_their_own() -> None:
    if not FOUND:
        pytest.skip("the public templates are missing: run scripts/fetch_public_templates.py")
    assert len(FOUND) - len(FALLBACKS & {path.stem for path in FOUND}) >= 64


def test_calls_come_back(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    render, form = render_source(source), format_of_source(source)
    assert form.fallback == (path.stem in FALLBACKS)
    if form.fallback or path.stem in WITHOUT_HISTORY:
        return
    calls = [(tool.name, arguments) for tool, arguments in zip((SEARCH, CLOCK, SEARCH), ARGUMENTS, strict=True)]
    for chosen in [calls[:1], calls[1:2], *([calls] if form.several else [])]:
        for content in ("", "Let me look."):
            text = written_calls(render, chosen, content)
            # DeepSeek's older templates take either.
            if text or not content:
                check(form, text, chosen)


def check(form: CallFormat, text: str, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Whether a text is read as these calls, in pieces of any size."""
    assert text
    tools = [SEARCH, CLOCK]
    read = [parse(form, pieces(text, size), tools) for size in (len(text), 1, 3, 7)]
    assert [(name, json.loads(arguments)) for name, arguments in read[0].calls] == list(calls), text
    assert read == read[:1] * len(read)
