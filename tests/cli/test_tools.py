"""Tools on the command line: `run`, `batch`, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from tests.cli.conftest import Command

SCHEMA = {"type": "object", "properties": {"city": {"type": "string", "maxLength": 20}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "get_weather", "description": "Weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]
FEW = ("-k", 1, "-c", 4096, "--temp", 0, "-n", 300, "--thinking-budget", 0)


@pytest.fixture
def tools(tmp_path: Path) -> Path:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS))
    return file


def test_run_prints_calls(tiny_model: Path, abcli: Command, tools: Path) -> None:
    arguments = ("run", tiny_model, "Weather in Paris?", *FEW, "--tools", tools, "--tool-choice", "get_weather")
    outcome = abcli(*arguments)
    assert outcome.code == 0
    assert b"knows no tools, so the system message lists them" in outcome.errors
    calls = [json.loads(line) for line in outcome.text.splitlines()]
    for call in calls:
        assert call["name"] == "get_weather"
        jsonschema.validate(call["arguments"], SCHEMA)
    report = json.loads(abcli(*arguments, "--json", "--no-parallel-tool-calls").text)
    (call,) = report["tool_calls"]
    assert (report["text"], report["finish_reason"], call["type"]) == ("", "tool_calls", "function")
    assert {"name": call["function"]["name"], "arguments": json.loads(call["function"]["arguments"])} == calls[0]


def test_a_batch_has_tools_for_all_lines_or_some(tiny_model: Path, abcli: Command, tools: Path, tmp_path: Path) -> None:
    prompt = [{"role": "user", "content": "Weather in Rome?"}]
    lines = [
        {"id": "run's", "messages": prompt, "tool_choice": "get_weather", "parallel_tool_calls": False},
        {"id": "own", "messages": prompt, "tools": [{"name": "look"}], "tool_choice": "required"},
        {"id": "none", "messages": prompt, "tool_choice": "none", "max_tokens": 3},
        {"id": "wrong", "messages": prompt, "tool_choice": "look"},
    ]
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ("batch", tiny_model, source, "-o", output, *FEW, "--slots", 2)
    outcome = abcli(*command, "--tools", tools)
    assert outcome.code == 1
    results = {result["id"]: result for result in map(json.loads, output.read_text().splitlines())}
    (call,) = results["run's"]["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMA)
    assert results["run's"]["finish_reason"] == "tool_calls"
    assert {call["function"]["name"] for call in results["own"]["tool_calls"]} == {"look"}
    assert "tool_calls" not in results["none"]
    assert "'look' is none of the tools" in results["wrong"]["error"]["message"]
    assert "tools" in abcli(*command).problem()[0]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--tools", "{missing}"), "there is no file"),
        (("--tools", "{broken}"), "is not JSON"),
        (("--tools", "{nameless}"), "tools[1].function.name is missing"),
        (("--tool-choice", "required"), "--tool-choice required needs tools"),
        (("--tools", "{tools}", "--tool-choice", "fly"), "--tool-choice 'fly' is none of the tools"),
        (("--chat-template-kwargs", "{{"), "--chat-template-kwargs is not JSON"),
        (("--thinking-budget", -5), "--thinking-budget -5 is impossible"),
        (("--tools", "{tools}", "--json-schema", "{{}}"), "both tools and a JSON schema are given"),
        (("--tools", "{tools}", "--raw"), "--raw has no place for tools"),
    ],
)
def test_what_is_wrong(
    tiny_model: Path, abcli: Command, tools: Path, tmp_path: Path, arguments: tuple[object, ...], problem: str
) -> None:
    files = {"missing": tmp_path / "missing", "tools": tools}
    for name, text in (("broken", "["), ("nameless", '[{"name": "f"}, {"type": "function", "function": {}}]')):
        files[name] = tmp_path / name
        files[name].write_text(text)
    words = [word.format(**files) if isinstance(word, str) else word for word in arguments]
    outcome = abcli("run", tiny_model, "Hi", "-k", 1, "-n", 4, *words)
    assert outcome.code in (1, 2)
    assert problem in outcome.problem()[0]
