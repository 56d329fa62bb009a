"""The list of commands: complete, true to the commands' own help, and free of what only a command needs."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from abcli.cli._commands import COMMANDS
from tests.cli.conftest import Command

HEAVY = ("numpy", "llama_cpp", "huggingface_hub", "jinja2", "prompt_toolkit")


def words(text: str) -> str:
    """The words of a help page without its frames and line breaks."""
    return " ".join(word for word in text.split() if word != "\u2502")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_says_in_its_help_what_the_list_says(abcli: Command, name: str) -> None:
    listed, own = abcli("--help"), abcli(name, "--help")
    assert listed.code == own.code == 0
    assert f"{name} {COMMANDS[name].help}" in words(listed.text)
    assert words(own.text).startswith(f"Usage: abcli {name} ")
    # `abcli batch` is `abcli batch run`, in its help as well.
    assert name == "batch" or COMMANDS[name].help in words(own.text)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_speaks_to_people(abcli: Command, name: str) -> None:
    text = words(abcli(name, "--help").text)
    # Names of Python's types, and words that the parser puts between parentheses.
    assert "list[" not in text
    assert "[default: (" not in text
    assert "None" not in text


@pytest.mark.parametrize("arguments", [["--help"], ["no-such-command"], ["models", "known"]])
def test_what_needs_no_model_loads_no_library_of_models(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom abcli.cli.main import call\n"
        f"call({arguments!r})\nprint(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    loaded = done.stderr.splitlines()[-1]
    assert loaded == "[]" or (arguments[0] == "models" and loaded == "['numpy']")


def test_a_mistyped_command_is_answered_with_the_nearest(abcli: Command) -> None:
    outcome = abcli("chta")
    assert outcome.code == 2
    problem, _hint = outcome.problem()
    assert "chta" in problem
    assert "'chat'" in problem


def test_ctrl_c_while_modules_are_imported_shows_no_traceback() -> None:
    program = (
        "import os, signal, sys\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer':\n"
        "            os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from abcli.cli._entry import main\nmain()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")
