"""The man pages are complete, and what man reads."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from abcli.cli._commands import COMMANDS
from scripts.make_man_pages import escaped, main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("man")
    (target / "abcli-gone.1").write_text("of a command that is no more")
    main(target)
    return target


def test_every_command_has_a_page_and_nothing_else(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"abcli.1", *(f"abcli-{name}.1" for name in COMMANDS)}


def test_a_page_tells_flags_values_and_defaults(folder: Path) -> None:
    text = (folder / "abcli-run.1").read_text()
    assert r"\fB\-\-merge\fR \fIconfidence|mean|product|max|entropy|pool\fR" in text
    assert r"[default: confidence]" in text
    assert text.count(".SH OPTIONS") == 1
    assert r"abcli models alias" in (folder / "abcli-models.1").read_text()


def test_text_is_never_a_request() -> None:
    assert escaped(".so /etc/passwd\n'x \\fB --json") == "\\&.so /etc/passwd\n\\&'x \\efB \\-\\-json"


@pytest.mark.skipif(shutil.which("mandoc") is None, reason="mandoc is not installed")
def test_a_linter_finds_nothing(folder: Path) -> None:
    command = ["mandoc", "-T", "lint", "-W", "warning", *map(str, sorted(folder.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert [line for line in done.stdout.splitlines() if "missing date" not in line] == []


@pytest.mark.skipif(shutil.which("man") is None, reason="man is not installed")
def test_man_shows_it(folder: Path) -> None:
    done = subprocess.run(["man", "-l", folder / "abcli.1"], capture_output=True, text=True, check=True)
    for heading in ("NAME", "SYNOPSIS", "OPTIONS", "COMMANDS", "ENVIRONMENT", "FILES", "EXIT STATUS", "EXAMPLES"):
        assert f"\n{heading}\n" in done.stdout
