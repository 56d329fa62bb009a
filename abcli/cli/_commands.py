"""The commands by name, each in a module that is imported when the command is called, not to be listed in the help."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from abcli.cli._flags import with_options


@dataclass(frozen=True)
class CommandPlace:
    """Where a command is defined: `name` in `module` is a function, or a Typer of several commands."""

    module: str
    name: str
    help: str

    def load(self, command_name: str) -> Any:
        """The parser's command of that name."""
        found = getattr(import_module(self.module), self.name)
        if not isinstance(found, typer.Typer):
            single = typer.Typer(add_completion=False)
            single.command(command_name, help=self.help)(with_options(found))
            return _with_plain_types(typer.main.get_command(single))
        command: Any = typer.main.get_command(found)
        command.name, command.help = command_name, self.help
        return _with_plain_types(command)


def _with_plain_types(command: Any) -> Any:
    """`command` with "<int>" in its help where a flag can be repeated, which some versions show as "<list[int]>"."""
    for inner in getattr(command, "commands", {}).values():
        _with_plain_types(inner)
    for parameter in command.params:
        if shown := getattr(parameter, "display_type", None):
            parameter.display_type = partial(_plain_type, shown)
    return command


def _plain_type(shown: Callable[[Any], str], context: Any) -> str:
    return re.sub(r"list\[(.*)\]", r"\1", shown(context))


COMMANDS = {
    "run": CommandPlace("abcli.cli.run", "run", "Answer one prompt and exit."),
    "trace": CommandPlace("abcli.cli.trace", "trace", "Answer one prompt and show what every bucket saw, as a page."),
    "diff": CommandPlace(
        "abcli.cli.diff", "diff", "Answer one prompt with one bucket, the default set and the profile, side by side."
    ),
    "chat": CommandPlace("abcli.cli.chat", "chat", "Talk with a model."),
    "batch": CommandPlace("abcli.cli.batch", "app", "Answer a file of prompts: abcli batch [MODEL] INPUT -o OUTPUT."),
    "serve": CommandPlace("abcli.cli.serve", "serve", "Serve a model to every client that speaks OpenAI's protocol."),
    "pull": CommandPlace("abcli.cli.pull", "pull", "Fetch a model from the hub."),
    "models": CommandPlace("abcli.cli.models", "app", "Show, remove and name the models on this machine."),
    "inspect": CommandPlace(
        "abcli.cli.inspect", "inspect", "Show what a model is and what its buckets would cost, without loading it."
    ),
    "verify": CommandPlace("abcli.cli.verify", "verify", "Check a model file from end to end."),
    "cache": CommandPlace("abcli.cli.cache", "app", "Show or clear stored prompts."),
    "profiles": CommandPlace("abcli.cli.profiles", "app", "Show, share and choose calibrated bucket sets."),
    "eval": CommandPlace(
        "abcli.cli.eval", "evaluation", "Measure on a task whether buckets help a model, and at which depths."
    ),
    "calibrate": CommandPlace(
        "abcli.cli.calibrate", "calibration", "Find the bases and the merge rule that are best for a model and a task."
    ),
    "tune": CommandPlace(
        "abcli.cli.tune", "tune", "Learn a gain for every attention head, and prove it on other questions."
    ),
    "lm-eval": CommandPlace(
        "abcli.cli.lm_eval",
        "app",
        "Run EleutherAI's lm-evaluation-harness with a model of abcli's: see `abcli lm-eval run --help`.",
    ),
    "bench": CommandPlace(
        "abcli.cli.bench",
        "bench",
        "Measure how fast a model is here with 1 to N buckets, and which engine is the faster.",
    ),
    "doctor": CommandPlace(
        "abcli.cli.doctor", "doctor", "Show what is installed, what this machine has, and what to try when it is slow."
    ),
    "waves": CommandPlace(
        "abcli.cli.waves",
        "waves",
        "Show the attention waveform of each bucket, or search bases that complement each other.",
    ),
}


class CommandGroup(TyperGroup):
    """A group that lists its commands without their modules and imports the one that is called."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that `args` begins with, what it is called, and the arguments left for it."""
        name, listed, rest = super().resolve_command(ctx, args)
        return name, listed if name is None else COMMANDS[name].load(name), rest


def add_commands(app: typer.Typer) -> None:
    """Enter every command with its line of help; `app` is made with `cls=CommandGroup`."""
    for name, place in COMMANDS.items():
        app.command(name, help=place.help)(_listed)


def _listed() -> None:
    """Stands for a command in the list of commands."""
    raise NotImplementedError("the command was not loaded")
