"""`abcli serve`: what is refused before anything is loaded."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.cli.conftest import Command


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--host", "0.0.0.0"), "lets other machines ask"),
        (("--host", "::"), "lets other machines ask"),
        (("--host", "no.such.host.invalid"), "lets other machines ask"),
        (("--host", "no.such.host.invalid", "--allow-anyone"), "cannot listen at"),
        (("--api-key", "short"), "an API key is not possible"),
        (("--api-key", ""), "an API key is not possible"),
        (("--parallel", "many"), "--parallel"),
        (("--parallel", "0"), "slots 0 is impossible"),
        (("--gate", "2"), "--gate"),
    ],
)
def test_settings_that_make_no_sense(
    abcli: Command, tiny_model: Path, arguments: tuple[str, ...], problem: str
) -> None:
    outcome = abcli("serve", tiny_model, "--port", 0, *arguments)
    assert outcome.code in (1, 2)
    assert problem in outcome.problem()[0].replace("--slots", "slots")


def test_a_chat_template_that_is_not_there(abcli: Command, tiny_model: Path) -> None:
    outcome = abcli("serve", tiny_model, "--port", 0, "--chat-template", "no-such-template")
    assert outcome.code == 1
    assert "there is no chat template 'no-such-template'" in outcome.errors.decode()


def test_a_chat_template_that_is_broken(abcli: Command, tiny_model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for message in messages %}")
    outcome = abcli("serve", tiny_model, "--port", 0, "--chat-template", broken)
    assert outcome.code == 1
    assert "error: the chat template is broken" in outcome.errors.decode()
    assert "hint: choose another template with --chat-template" in outcome.errors.decode()


def test_a_port_that_is_taken(abcli: Command, tiny_model: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        outcome = abcli("serve", tiny_model, "--port", port)
    assert outcome.code == 2
    assert f"cannot listen at 127.0.0.1 port {port}" in outcome.problem()[0]


def test_a_file_of_keys(abcli: Command, tiny_model: Path, tmp_path: Path) -> None:
    empty = tmp_path / "keys"
    empty.write_text("\n \n")
    outcome = abcli("serve", tiny_model, "--api-key-file", empty)
    assert "has no key" in outcome.problem()[0]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--alias", "a", "--alias", "b"), "--alias is given 2 times for 1 model"),
        (("--alias", ""), "--alias"),
        (("--model", "{model}"), "two models are called tiny"),
        (("--models-max", "0"), "--models-max"),
    ],
)
def test_names_of_models(abcli: Command, tiny_model: Path, arguments: tuple[str, ...], problem: str) -> None:
    given = [word.format(model=tiny_model) for word in arguments]
    outcome = abcli("serve", tiny_model, "--port", 0, *given)
    assert outcome.code == 2
    assert problem in outcome.problem()[0]


def test_a_name_for_no_model(abcli: Command) -> None:
    outcome = abcli("serve", "--port", 0, "--models-max", 1, "--alias", "mine")
    assert outcome.code == 2
    assert outcome.problem() == ("--alias is given, but no model", "name the models, or leave it out")
