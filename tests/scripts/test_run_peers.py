"""What `make peers` installs, and what it does where something cannot be had."""

from __future__ import annotations

import pytest

from scripts import run_peers


class StandInForUv:
    """Installs all but `missing`, and keeps what it was asked for."""

    def __init__(self, *missing: str) -> None:
        self.missing = set(missing)
        self.asked: list[list[str]] = []

    def __call__(self, wanted: list[str]) -> str | None:
        self.asked.append(wanted)
        found = sorted(self.missing & set(wanted))
        return f"error: no solution\n  cause: no {found[0]}" if found else None


@pytest.fixture(autouse=True)
def wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_peers, "own_wheels", lambda: ["abcli"])


def test_requirements_are_lines_without_comments() -> None:
    assert run_peers.requirements("# why\nopenai>=3,<4\n\nllm  # a plugin\n") == ["openai>=3,<4", "llm"]


def test_every_tool_has_an_upper_bound() -> None:
    for requirement in run_peers.requirements(run_peers.TOOLS.read_text(encoding="utf-8")):
        assert ",<" in requirement, requirement


def test_all_is_installed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    uv = StandInForUv()
    monkeypatch.setattr(run_peers, "install", uv)
    run_peers.install_what_there_is(["openai", "llm"])
    assert uv.asked == [["abcli", "openai", "llm"]]


def test_what_cannot_be_had_is_named_and_the_rest_is_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uv = StandInForUv("llm")
    monkeypatch.setattr(run_peers, "install", uv)
    run_peers.install_what_there_is(["openai", "llm", "anthropic"])
    assert uv.asked[1:] == [["abcli"], ["abcli", "openai"], ["abcli", "llm"], ["abcli", "anthropic"]]
    assert capsys.readouterr().err == "left out: llm: error: no solution cause: no llm\n"


def test_without_abcli_itself_nothing_can_be_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_peers, "install", StandInForUv("abcli"))
    with pytest.raises(SystemExit, match="abcli's wheel cannot be installed"):
        run_peers.install_what_there_is(["openai"])
