"""What shells are told at Tab: by the answers themselves, and in real shells on a pseudo-terminal."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.cli import _completion
from abcli.cli._command_tree import command_tree
from abcli.cli._completion import candidates, completion
from abcli.cli.main import app
from abcli.config import MERGE_RULES, completion_file, profiles_directory
from abcli.hub.aliases import set_alias
from tests.support.hub import HubStandIn

TREE = command_tree(app)
PATIENCE = 60


def values(*words: str) -> list[str]:
    return [one.value for one in candidates(TREE, words[:-1], words[-1])]


def asked(shell: str, line: str) -> str:
    """The answer to a shell about a line of which the cursor is at the end."""
    words = line.split(" ")
    environment = {"_ABCLI_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line}
    environment |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    answer = completion(environment)
    assert answer is not None
    return answer[0]


@pytest.fixture(autouse=True)
def tree_at_hand(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_completion, "_tree", lambda: TREE)


def test_commands_come_first() -> None:
    assert {"run", "chat", "batch", "models"} <= set(values(""))
    assert values("ch") == ["chat"]
    assert values("models", "") == ["list", "known", "rm", "alias"]


def test_flags_and_their_values() -> None:
    assert values("run", "--merg") == ["--merge"]
    assert values("run", "--merge", "") == list(MERGE_RULES)
    assert values("run", "--merge=m") == ["--merge=mean", "--merge=max"]
    assert "-ngl" in values("run", "-n")
    assert not any(value.startswith("-") and not value.startswith("--") for value in values("run", "-"))


def test_what_follows_two_dashes_is_no_flag() -> None:
    assert values("run", "--", "--merg") == []


def test_a_value_is_not_taken_for_a_command_or_a_model() -> None:
    assert "chat" not in values("run", "--temp", "")
    assert values("run", "--stop", "models", "--merg") == ["--merge"]


def test_models_by_name() -> None:
    set_alias("mine", "/somewhere/model.gguf")
    assert values("run", "mi") == ["mine"]
    assert "gemma-3-1b-it" in values("chat", "gem")
    assert "default" in values("run", "-m", "")
    assert values("run", "default", "gem") == []
    assert "default" not in values("pull", "")


def test_models_of_the_hub_s_cache(hub: HubStandIn, cache: Path) -> None:
    snapshot = cache / "models--someone--Small-GGUF" / "snapshots" / "0123456789abcdef"
    snapshot.mkdir(parents=True)
    (snapshot / "small-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert values("run", "someo") == ["someone/Small-GGUF:Q4_K_M"]
    # Bash replaces only what follows the colon.
    assert asked("bash", "abcli run someone/Small-GGUF : Q4") == "Q4_K_M"
    assert asked("bash", "abcli run someone/Small-GGUF :") == "Q4_K_M"
    assert asked("zsh", "abcli run someone/Small-GGUF:Q") == (
        """_arguments '*: :(("someone/Small-GGUF\\:Q4_K_M":"on this machine"))'"""
    )


def test_profiles_by_name() -> None:
    profiles_directory().mkdir(parents=True)
    (profiles_directory() / "0123456789abcdef-my-own.json").write_text("{}")
    found = values("run", "--profile", "")
    assert {"my-own", "none", "needle-1024"} <= set(found)
    assert "my-own" in values("profiles", "show", "")


def test_batch_needs_no_name_for_its_run() -> None:
    assert {"run", "merge", "default"} <= set(values("batch", ""))
    assert values("batch", "--orde") == ["--ordered"]
    assert values("batch", "--ordered", "--merge", "po") == ["pool"]


@pytest.mark.parametrize("name", ["$(touch hacked)", "`id`", 'a"b', "a'b", "two words", "a;b", "a\nb"])
def test_what_a_shell_could_run_is_not_offered(name: str) -> None:
    profiles_directory().mkdir(parents=True)
    (profiles_directory() / f"0123456789abcdef-{name}.json").write_text("{}")
    for shell in ("bash", "zsh", "fish"):
        assert name not in asked(shell, "abcli run --profile ")


@given(st.lists(st.text(alphabet="-=abcdehmnoprstu:/.0", max_size=8), min_size=1, max_size=5))
def test_any_line_gets_words_that_begin_as_it_ends(words: list[str]) -> None:
    assert all(found.startswith(words[-1]) for found in values(*words))


@given(st.text(max_size=30), st.sampled_from(["bash", "zsh", "fish"]))
def test_no_line_is_too_odd(line: str, shell: str) -> None:
    environment = {"_ABCLI_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_ARGS": line, "COMP_WORDS": line}
    answer = completion(environment)
    assert answer is not None
    assert shell != "bash" or answer[1] == 0


def test_other_shells_and_instructions_are_left_to_typer() -> None:
    assert completion({}) is None
    assert completion({"_ABCLI_COMPLETE": "complete_powershell"}) is None
    assert completion({"_ABCLI_COMPLETE": "source_bash"}) is None


def test_the_description_is_made_once_and_again_for_another_version(
    monkeypatch: pytest.MonkeyPatch, own_home: Path
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("ABCLI_HOME", str(own_home))
    made = []
    monkeypatch.setattr("abcli.cli._command_tree.command_tree", lambda app: made.append(app) or TREE)
    for _ in range(2):
        assert asked("bash", "abcli ru") == "run"
    assert len(made) == 1
    monkeypatch.setattr(_completion, "__version__", "9.9.9")
    assert asked("bash", "abcli ru") == "run"
    completion_file().write_text("damaged")
    assert asked("bash", "abcli ru") == "run"
    assert len(made) == 3
    assert json.loads(completion_file().read_text())["made_by"][0] == "9.9.9"


def test_an_answer_from_the_description_imports_no_parser_and_nothing_native(own_home: Path) -> None:
    script = (
        "import os, sys\n"
        "from abcli.cli._completion import completion\n"
        "first = completion(os.environ)\n"
        "modules = set(sys.modules)\n"
        "print(first[0], sorted(modules & {'llama_cpp', 'numpy', 'typer', 'jinja2'}))\n"
    )
    environment = {
        **os.environ,
        "_ABCLI_COMPLETE": "complete_bash",
        "COMP_WORDS": "abcli\nchat\ngem",
        "COMP_CWORD": "2",
    }
    for expected in (None, "gemma-3-1b-it []"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=True,
        )
        assert done.stderr == ""
        assert expected is None or done.stdout.strip() == expected


class Shell:
    """An interactive shell in which abcli's completion is installed."""

    def __init__(self, name: str, options: list[str], home: Path, abcli_home: Path) -> None:
        binaries = home / "bin"
        binaries.mkdir()
        program = binaries / "abcli"
        # The program is abcli itself to those who complete; a line that is entered only shows what it has become.
        program.write_text(
            "#!/bin/sh\n"
            'case "$_ABCLI_COMPLETE$1" in\n'
            f'complete_*|--install-completion) exec {sys.executable} -m abcli "$@";;\n'
            "esac\n"
            'echo "entered: $*."\n'
        )
        program.chmod(0o755)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith(("XDG_", "ZDOTDIR"))},
            "HOME": str(home),
            "ABCLI_HOME": str(abcli_home),
            "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}",
            "TERM": "xterm",
        }
        # The script is installed as a person does it, and the description made, so that no Tab waits for it.
        subprocess.run(
            [name, "-c", "abcli --install-completion; true"], env=self.environment, check=True, capture_output=True
        )
        line = {"_ABCLI_COMPLETE": "complete_bash", "COMP_WORDS": "abcli\n", "COMP_CWORD": "1"}
        subprocess.run([program], env={**self.environment, **line}, check=True, capture_output=True)
        self.child = pexpect.spawn(
            name, options, env=self.environment, encoding="utf-8", timeout=PATIENCE, dimensions=(40, 120), cwd=home
        )
        if name == "zsh":
            # At its first Tab it loads typer's script, and does nothing else.
            self.entered("\t", "")

    def entered(self, keys: str, shown: str) -> None:
        """Type `keys` behind the program's name, then Enter; the words that it gets have to be `shown`."""
        self.child.send(f"abcli {keys}\r")
        self.child.expect_exact("entered: ")
        self.child.expect_exact(".\r\n")
        assert self.child.before == shown


@pytest.fixture
def shell(request: pytest.FixtureRequest, tmp_path: Path, common_home: Path) -> Iterator[Shell]:
    name, options = request.param
    if shutil.which(name) is None:
        pytest.skip(f"{name} is not installed")
    started = Shell(name, options, tmp_path, common_home)
    yield started
    started.child.close(force=True)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
@pytest.mark.parametrize(
    "shell", [("bash", ["-i"]), ("zsh", ["-i"]), ("fish", ["-i"])], indirect=True, ids=lambda s: s[0]
)
def test_a_real_shell_completes_commands_flags_and_models(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text("")
    shell.entered("cali\t", "calibrate")
    shell.entered("run --parse-s\t", "run --parse-special")
    shell.entered("chat gem\t", "chat gemma-3-1b-it")
    shell.entered("run --merge prod\t", "run --merge product")
    # What is no name is a file.
    shell.entered("batch quest\t", "batch questions.jsonl")
