"""What `abcli lm-eval` hands on; the rest needs lm_eval itself, and is tested with it (tests/peers)."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest

from abcli.cli.lm_eval import with_model
from abcli.cli.main import call
from tests.cli.conftest import Command

OURS = ["--model", "abcli"]


@pytest.mark.parametrize(
    "line", ["--tasks mine", "-t mine -L 2", "run --tasks mine", "--tasks=mine --model_args model=default"]
)
def test_abclis_model_evaluates(line: str) -> None:
    assert with_model(line.split()) == [*line.split(), *OURS]


@pytest.mark.parametrize(
    "line", ["", "run", "ls tasks", "validate --tasks mine", "-t x -M hf", "-t x --model=hf", "run -C settings.yaml"]
)
def test_unless_another_is_named_or_nothing_is_evaluated(line: str) -> None:
    assert with_model(line.split()) == line.split()


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm_eval is here")
def test_without_lm_eval_it_says_what_to_install(abcli: Command) -> None:
    done = abcli("lm-eval", "--tasks", "x")
    assert done.code == 2
    assert "abcli[lm-eval]" in done.errors.decode()


def test_its_own_help_needs_no_lm_eval(abcli: Command) -> None:
    assert "abcli lm-eval run --help" in " ".join(abcli("lm-eval", "--help").text.split())


def test_what_lm_eval_refuses_is_said_in_two_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> None:
        raise ValueError(f"Tasks not found: {sys.argv[2]}")

    program = ModuleType("lm_eval.__main__")
    vars(program)["cli_evaluate"] = refuse
    for name in ("lm_eval", "abcli.lm_eval_model"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", program)
    monkeypatch.setattr(sys, "argv", [])
    assert call(["lm-eval", "--tasks", "none"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: lm_eval: Tasks not found: none",
        "hint: see abcli lm-eval run --help, or set ABCLI_DEBUG=1",
    ]
