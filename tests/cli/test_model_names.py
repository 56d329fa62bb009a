"""Every command that takes a MODEL takes all names of it, in every place where a name may stand."""

from __future__ import annotations

from pathlib import Path

import pytest

from abcli.hub.aliases import set_alias
from tests.cli.conftest import Command
from tests.support.hub import HubStandIn

QWEN = "Qwen/Qwen2.5-0.5B-Instruct-GGUF"
PLACE = "MODEL"
# What each command needs besides.
COMMANDS = {
    "run": ["run", PLACE, "-p", "hello"],
    "chat": ["chat", PLACE],
    "batch": ["batch", PLACE, "prompts.txt", "-o", "answers.jsonl"],
    "eval": ["eval", "needle", PLACE],
    "calibrate": ["calibrate", PLACE],
    "inspect": ["inspect", PLACE],
    "verify": ["verify", PLACE, "--no-trial"],
    "waves": ["waves", PLACE],
    "profiles": ["profiles", "show", "some", "--model", PLACE],
}
# A name -> what the model is called that is not in the cache, or the path where there is no file.
NAMES = {
    "user/repo-GGUF": "user/repo-GGUF",
    "user/repo-GGUF:q8_0": "user/repo-GGUF:Q8_0",
    "user/repo-GGUF/folder/file.gguf": "user/repo-GGUF/folder/file.gguf",
    "hf:user/repo-GGUF:iq4_xs": "user/repo-GGUF:IQ4_XS",
    "https://huggingface.co/user/repo-GGUF/blob/v1/file.gguf": "user/repo-GGUF@v1/file.gguf",
    "mine": "user/other-GGUF:Q6_K",
    "qwen2.5-0.5b-instruct": f"{QWEN}/qwen2.5-0.5b-instruct-q4_k_m.gguf",
    "QWEN2.5-0.5B-instruct:fp16": f"{QWEN}:F16",
    "./missing.gguf": "missing.gguf",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A working directory with a file of prompts, and an alias."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("hello\n", encoding="utf-8")
    set_alias("mine", "hf:user/other-GGUF:Q6_K")


def said(abcli: Command, command: str, *model: str) -> str:
    """What a command says of a model that is not here."""
    words: list[str] = []
    for word in COMMANDS[command]:
        words += model if word == PLACE else [word]
    outcome = abcli(*words)
    assert outcome.code == 1
    return outcome.text + outcome.errors.decode()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_command_takes_every_name(
    abcli: Command, hub: HubStandIn, cache: Path, monkeypatch: pytest.MonkeyPatch, command: str, name: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    meant = NAMES[name]
    expected = f"there is no file {meant}" if meant == "missing.gguf" else f"{meant} is not in {cache}"
    assert expected in said(abcli, command, name)
    if command != "profiles":
        assert expected in said(abcli, command, "-m", name)
    assert hub.requests == []


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "profiles"])
def test_every_command_takes_llama_cpps_flag(
    abcli: Command, hub: HubStandIn, cache: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for flag in ("-hf", "--hf-repo"):
        # A folder of that name changes nothing.
        Path("user/repo").mkdir(parents=True, exist_ok=True)
        assert f"user/repo:Q8_0 is not in {cache}" in said(abcli, command, flag, "user/repo:q8_0")
    task = ["needle"] if command == "eval" else []
    outcome = abcli(command, *task, "-hf", "a/b", "-m", "c")
    assert outcome.code == 2
    assert "two models: c and a/b" in outcome.problem()[0]
    assert hub.requests == []
