"""Ctrl-C under `make chat` reaches the chat and not make, and Ctrl-Z stops both."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest

from tests.conftest import REPOSITORY

SCRIPT = REPOSITORY / "scripts" / "at_the_terminal.py"
# Like a chat: Ctrl-C stops an answer, the end of the input leaves.
CHAT = """
import signal, sys
signal.signal(signal.SIGINT, lambda *_: print("stopped", flush=True))
print("ready", flush=True)
for line in sys.stdin:
    if line.startswith("quit"):
        sys.exit(int(line.split()[1]))
    print("heard " + line.strip(), flush=True)
print("left", flush=True)
"""


@pytest.fixture
def makefile(tmp_path: Path) -> Path:
    """A Makefile that runs a chat as ours does."""
    if shutil.which("make") is None or shutil.which("bash") is None:
        pytest.skip("there is no make or no bash")
    (tmp_path / "chat.py").write_text(CHAT)
    recipe = f"chat:\n\t@{sys.executable} {SCRIPT} {sys.executable} chat.py\n"
    (tmp_path / "Makefile").write_text(recipe)
    return tmp_path


def start(folder: Path, command: str, *arguments: str) -> pexpect.spawn:
    return pexpect.spawn(command, list(arguments), cwd=str(folder), encoding="utf-8", timeout=60)


def test_the_makefile_runs_the_chat_with_it() -> None:
    def recipe(*variables: str) -> str:
        command = ["make", "-n", "chat", "MODEL=m", *variables]
        return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout

    assert f"scripts/{SCRIPT.name} .venv/bin/abcli chat" in recipe()
    # It takes the buckets that `abcli chat` takes, unless others are asked for.
    assert "--buckets" not in recipe()
    assert "--buckets 6" in recipe("BUCKETS=6")


def test_ctrl_c_is_the_chats_alone(makefile: Path) -> None:
    make = start(makefile, "make", "chat")
    make.expect_exact("ready")
    make.sendintr()
    make.expect_exact("stopped")
    make.sendline("more")
    make.expect_exact("heard more")
    make.sendeof()
    make.expect(pexpect.EOF)
    make.close()
    assert "left" in make.before
    assert "***" not in make.before
    assert make.exitstatus == 0


@pytest.mark.parametrize(("code", "shown"), [(130, None), (3, "Error 3")])
def test_errors_are_passed_on_but_not_an_interruption(makefile: Path, code: int, shown: str | None) -> None:
    make = start(makefile, "make", "chat")
    make.expect_exact("ready")
    make.sendline(f"quit {code}")
    make.expect(pexpect.EOF)
    make.close()
    assert ("***" in make.before) == (shown is not None)
    assert (shown or "") in make.before
    assert make.exitstatus == (0 if shown is None else 2)


def test_ctrl_z_stops_make_and_fg_comes_back(makefile: Path) -> None:
    shell = start(makefile, "bash", "--norc", "--noprofile", "-i")
    shell.sendline("make chat")
    shell.expect_exact("ready")
    shell.send("\x1a")
    shell.expect_exact("Stopped")
    shell.sendline("echo $((6 * 7))")
    shell.expect_exact("42")
    shell.sendline("fg")
    shell.expect_exact("make chat")
    shell.sendline("more")
    shell.expect_exact("heard more")
    shell.sendintr()
    shell.expect_exact("stopped")
    shell.sendeof()
    shell.expect_exact("left")
    shell.sendline("echo status $?")
    shell.expect_exact("status 0")
    shell.close(force=True)


def test_without_a_terminal_the_command_takes_its_place() -> None:
    command = [sys.executable, str(SCRIPT), sys.executable, "-c", "import sys; print(input()); sys.exit(130)"]
    done = subprocess.run(command, input="piped\n", capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "piped\n", "")
