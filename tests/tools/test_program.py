"""Programs that run calls: their output, their failures, their ends."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from abcli.chat.messages import ToolCall
from abcli.errors import CancelledError, UsageError
from abcli.tools.outcome import MAX_OUTPUT_BYTES, Outcome
from abcli.tools.program import Program, parse_programs

ARGUMENTS = json.dumps({"city": "Paris; $(touch x) 'é'"}, ensure_ascii=False)
CALL = ToolCall("f", ARGUMENTS, "1")


def python(code: str, seconds: float = 30) -> Program:
    return Program((sys.executable, "-c", code), seconds)


def never() -> bool:
    return False


def test_arguments_come_in_and_output_goes_out() -> None:
    told = python("import sys; sys.stdout.write(sys.stdin.read() + '\\n')").run(CALL, never)
    assert told == Outcome(ARGUMENTS)
    large = ToolCall("f", json.dumps({"text": "x" * 200_000}))
    assert python("import sys; print(len(sys.stdin.read()))").run(large, never).text == str(len(large.arguments))
    assert python("pass").run(CALL, never) == Outcome("(no output)")
    assert python("import os; os.write(1, b'a\\xff\\0b')").run(CALL, never).text == "a\ufffdb"


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("import sys; print('so far'); sys.exit('no city')", "it ended with the exit code 1"),
        ("import os, signal; print('so far', flush=True); os.kill(os.getpid(), signal.SIGTERM)", "ended by SIGTERM"),
        ("import sys\nprint('so far')\nwhile True: print('x' * 1000)", "it wrote more than"),
        ("import sys\nprint('so far')\nwhile True: sys.stderr.write('x' * 1000)", "it wrote more than"),
    ],
)
def test_a_failure_is_told_to_the_model_and_the_person(code: str, problem: str) -> None:
    outcome = python(code).run(CALL, never)
    assert problem in outcome.problem
    assert outcome.text.startswith(f"error: {outcome.problem}\nso far")
    assert len(outcome.text) < 2 * MAX_OUTPUT_BYTES + 1000
    assert ("no city" in outcome.text) == ("no city" in code)


def test_a_program_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    file = tmp_path / "child"
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(file)!r}, 'w').write(str(child.pid))\ntime.sleep(60)"
    )
    begin = time.monotonic()
    outcome = python(code, seconds=1).run(CALL, never)
    assert time.monotonic() - begin < 20
    assert outcome.problem == "it took more than 1 second"
    deadline = time.monotonic() + 10
    while Path(f"/proc/{file.read_text()}/cmdline").exists() and time.monotonic() < deadline:
        # A zombie whose parent is gone has no command line any more.
        if not Path(f"/proc/{file.read_text()}/cmdline").read_bytes():
            break
        time.sleep(0.05)
    assert time.monotonic() < deadline


def test_a_person_can_stop_it() -> None:
    asked = iter([False, True])
    with pytest.raises(CancelledError):
        python("import time; time.sleep(60)").run(CALL, lambda: next(asked))


def test_a_program_that_cannot_be_run(tmp_path: Path) -> None:
    assert "No such file" in Program((str(tmp_path / "gone"),), 1).run(CALL, never).problem


def test_programs_are_named_after_tools(tmp_path: Path) -> None:
    program = tmp_path / "my tool"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    found = parse_programs([f"a='{program}' --fast $HOME", "b.c=cat"], ["a", "b.c"], 3)
    assert found["a"] == Program((str(program), "--fast", "$HOME"), 3)
    assert found["b.c"].description == "cat"
    assert os.fspath(program) in found["a"].description


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("cat", "not NAME=PROGRAM"),
        ("g=cat", "not NAME=PROGRAM"),
        ("f=", "not NAME"),
        ("f=no/such", "there is no program"),
        ("f='", "cannot be read"),
    ],
)
def test_what_is_no_program(text: str, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_programs([text], ["f"], 1)
