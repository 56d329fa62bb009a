"""Ways to run the command line: in this process, as a process of its own, on a pseudo-terminal."""

from __future__ import annotations

import io
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from abcli.cli.main import call
from tests.cli.pseudo_terminal import PseudoTerminal

# Generous, because a test machine may be busy; nothing waits for it to pass.
PATIENCE = 120


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    output: bytes
    errors: bytes

    @property
    def text(self) -> str:
        """Standard output without the newline at its end."""
        return self.output.decode().removesuffix("\n")

    def problem(self) -> tuple[str, str]:
        """The error and the hint, after a check that there is nothing else."""
        lines = self.errors.decode().splitlines()
        assert len(lines) == 2, lines
        assert lines[0].startswith("error: "), lines
        assert lines[1].startswith("hint: "), lines
        assert "internal error" not in lines[0]
        return lines[0].removeprefix("error: "), lines[1].removeprefix("hint: ")


Command = Callable[..., Outcome]


@pytest.fixture
def abcli(capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command line in this process; what llama.cpp itself prints is captured, too."""

    def run(*arguments: object, stdin: bytes = b"") -> Outcome:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8"))
        capfdbinary.readouterr()
        code = call([str(argument) for argument in arguments])
        captured = capfdbinary.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def command_line(*arguments: object) -> list[str | bytes]:
    """The command line of a process of its own; bytes stay as they are."""
    words = [argument if isinstance(argument, bytes) else str(argument) for argument in arguments]
    return [sys.executable, "-m", "abcli", *words]


@pytest.fixture
def process() -> Command:
    """Run a command line as a process of its own, which may crash."""

    def run(*arguments: object, stdin: bytes = b"") -> Outcome:
        done = subprocess.run(command_line(*arguments), input=stdin, capture_output=True, timeout=PATIENCE, check=False)
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


@pytest.fixture
def spawn() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process with pipes; it is killed after the test if it still runs."""
    running: list[subprocess.Popen[bytes]] = []

    def start(*arguments: object) -> subprocess.Popen[bytes]:
        pipe = subprocess.PIPE
        started = subprocess.Popen(command_line(*arguments), stdin=pipe, stdout=pipe, stderr=pipe)
        running.append(started)
        return started

    yield start
    for one in running:
        one.kill()
        one.wait()
        for stream in (one.stdin, one.stdout, one.stderr):
            if stream is not None:
                stream.close()


@pytest.fixture
def terminal() -> Iterator[Callable[..., PseudoTerminal]]:
    """Start a command on a pseudo-terminal, standard output to `output` if given; killed after the test.

    `command` is another one than abcli.
    """
    running: list[PseudoTerminal] = []

    def start(
        *arguments: object,
        output: Path | None = None,
        columns: int = 120,
        kind: str = "xterm",
        command: list[str] | None = None,
    ) -> PseudoTerminal:
        environment = {**os.environ, "TERM": kind, "PROMPT_TOOLKIT_NO_CPR": "1", "NO_COLOR": "1"}
        command = command or [str(word) for word in command_line(*arguments)]
        if output is not None:
            command = ["sh", "-c", 'exec "$@" >' + shlex.quote(str(output)), "sh", *command]
        started = PseudoTerminal(command, environment, PATIENCE, columns)
        running.append(started)
        return started

    yield start
    for one in running:
        one.kill()
