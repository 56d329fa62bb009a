"""`abcli trace`, `abcli run --trace` and `/trace` in a chat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Command

ASKED = ("hello there", "-n", 4, "--temp", 0, "-c", 256)


def test_a_trace_is_written_beside_the_answer(tiny_model: Path, abcli: Command, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    plain = abcli("run", tiny_model, *ASKED)
    traced = abcli("trace", tiny_model, *ASKED)
    assert (traced.code, traced.output) == (0, plain.output)
    assert b"written to trace.html" in traced.errors
    assert "What the buckets saw" in (tmp_path / "trace.html").read_text()
    through_run = abcli("run", tiny_model, *ASKED, "--trace", "run.json")
    assert (through_run.code, through_run.output, through_run.errors) == (0, plain.output, b"")
    printed = abcli("trace", "--json", tiny_model, *ASKED)
    assert (printed.code, printed.errors) == (0, b"")
    told = json.loads(printed.output)
    assert "".join(step["text"] for step in told["steps"]).startswith(plain.text)
    stored = json.loads((tmp_path / "run.json").read_text())
    assert [step["token"] for step in stored["steps"]] == [step["token"] for step in told["steps"]]
    assert told["attention"]["heads"]


@pytest.mark.parametrize("command", [("trace", "-o"), ("run", "--trace")])
@pytest.mark.parametrize(
    ("name", "what"), [("a.pdf", "cannot be written as 'a.pdf'"), ("no/a.html", "cannot be written")]
)
def test_a_name_that_cannot_be_is_refused_before_the_work(
    tiny_model: Path, abcli: Command, tmp_path: Path, command: tuple[str, str], name: str, what: str
) -> None:
    outcome = abcli(command[0], tiny_model, *ASKED, command[1], tmp_path / name)
    assert (outcome.code, outcome.output) == (2, b"")
    assert what in outcome.problem()[0]


def test_a_chat_writes_the_trace_of_its_last_answer(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    path = tmp_path / "chat.html"
    script = f"/trace {path}\nhello\n/trace\n/trace chat.txt\n/trace {path}\nand now\n"
    outcome = abcli("chat", tiny_model, "-n", 4, "--temp", 0, "-c", 256, "--no-save", stdin=script.encode())
    errors = outcome.errors.decode()
    assert "there is no answer to trace" in errors
    assert "/trace needs a file name" in errors
    assert "cannot be written as 'chat.txt'" in errors
    assert f"written to {path}" in errors
    assert "What the buckets saw" in path.read_text()
