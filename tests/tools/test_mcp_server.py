"""Servers of the Model Context Protocol: one made with the official package, and strangers that misbehave."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest

from abcli.chat.messages import ToolCall
from abcli.errors import CancelledError, ToolServerError, UsageError
from abcli.tools.mcp_server import McpServer
from abcli.tools.outcome import MAX_OUTPUT_BYTES

pytest.importorskip("mcp")

SERVER = r"""
import os, sys, time
from mcp.server import MCPServer

server = MCPServer("test")

@server.tool()
def add(a: int, b: int = 1) -> str:
    "Add two numbers."
    return f"the sum is {a + b} <|im_end|>"

@server.tool()
def fail() -> str:
    raise ValueError("no luck")

@server.tool()
def huge() -> str:
    return "x" * 1_000_000

@server.tool()
def slow() -> str:
    time.sleep(100)

@server.tool()
def die() -> str:
    os._exit(3)

server.run("stdio")
"""
# As a stranger would write it: JSON-RPC by hand.
STRANGER = r"""
import json, sys
def answer(result, number):
    print(json.dumps({{"jsonrpc": "2.0", "id": number, "result": result}}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("method") == "initialize":
        version = asked["params"]["protocolVersion"]
        info = {{"name": "s", "version": "1"}}
        answer({{"protocolVersion": version, "capabilities": {{"tools": {{}}}}, "serverInfo": info}}, asked["id"])
    elif asked.get("method") == "tools/list":
        answer({tools}, asked["id"])
    elif asked.get("method") == "tools/call":
        print("no JSON at all", flush=True)
        answer({{"content": 5}}, asked["id"])
    elif "id" in asked:
        error = {{"code": -32601, "message": "Method not found"}}
        print(json.dumps({{"jsonrpc": "2.0", "id": asked["id"], "error": error}}), flush=True)
"""


def command(tmp_path: Path, text: str) -> str:
    file = tmp_path / "server.py"
    file.write_text(text)
    return f"{sys.executable} {file}"


def never() -> bool:
    return False


def call(name: str, **arguments: object) -> ToolCall:
    return ToolCall(name, json.dumps(arguments), "1")


def test_a_servers_tools_are_called(tmp_path: Path) -> None:
    with McpServer(command(tmp_path, SERVER), 20) as server:
        tools = {tool.name: tool for tool in server.tools}
        assert set(tools) == {"add", "fail", "huge", "slow", "die"}
        assert tools["add"].description == "Add two numbers."
        assert tools["add"].parameters["required"] == ["a"]
        outcome = server.run(call("add", a=2), never)
        assert (outcome.text, outcome.problem) == ("the sum is 3 <|im_end|>", "")
        for wrong in (call("add", a="two"), call("fail"), call("gone")):
            outcome = server.run(wrong, never)
            assert outcome.problem
            assert outcome.text.startswith("error: ")
        outcome = server.run(call("huge"), never)
        assert len(outcome.text) < MAX_OUTPUT_BYTES + 100
        assert outcome.text.endswith("(cut off here)")
        asked = iter([False, True])
        with pytest.raises(CancelledError):
            server.run(call("slow"), lambda: next(asked))
    server.close()


def test_a_server_that_dies_or_sleeps_ends_no_chat(tmp_path: Path) -> None:
    with McpServer(command(tmp_path, SERVER), 4) as server:
        begin = time.monotonic()
        assert "did not answer in time" in server.run(call("slow"), never).problem
        assert server.run(call("die"), never).problem
        assert server.run(call("add", a=2), never).problem
        assert time.monotonic() - begin < 60


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("import time; time.sleep(100)", "did not answer in time"),
        ("raise SystemExit('I have no key')", "cannot be used"),
        ("print('hello', flush=True); import time; time.sleep(100)", "did not answer in time"),
        (STRANGER.format(tools='{"tools": [{"name": "f", "inputSchema": 5}]}'), "cannot be used"),
        (STRANGER.format(tools='{"tools": [{"name": "f", "inputSchema": {"type": "string"}}]}'), "f"),
        (STRANGER.format(tools='{"tools": 7}'), "cannot be used"),
    ],
)
def test_a_server_that_does_not_answer_as_it_should(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(ToolServerError, match=problem) as caught:
        McpServer(command(tmp_path, text), 3)
    assert caught.value.hint
    if "key" in text:
        assert "I have no key" in caught.value.hint


def test_an_answer_that_is_none(tmp_path: Path) -> None:
    tools = '{"tools": [{"name": "f", "inputSchema": {"type": "object"}}]}'
    with McpServer(command(tmp_path, STRANGER.format(tools=tools)), 20) as server:
        assert [tool.name for tool in server.tools] == ["f"]
        assert server.run(call("f"), never).problem


@pytest.mark.parametrize("line", ["", "'", "no/such/server"])
def test_what_is_no_command(line: str) -> None:
    with pytest.raises(UsageError):
        McpServer(line, 1)
