"""Every command with its arguments and flags as plain values, for completion and the man pages: slow to make."""

from __future__ import annotations

import re
from typing import Any, get_args

import typer
from rich.text import Text

from abcli.cli._commands import COMMANDS

_NAMES = re.compile(r"(?:-{1,2}[\w-]+(?:, | / )?)+ ?")
_CHOICES = re.compile(r"[<\[]([\w.-]+(?:\|[\w.-]+)+)[>\]]")


def command_tree(app: typer.Typer) -> dict[str, Any]:
    """The program `app` as `_node` describes a command, with all of `COMMANDS` below it."""
    tree = _node(typer.main.get_command(app), "abcli")
    tree["commands"] = {name: _node(place.load(name), name) for name, place in COMMANDS.items()}
    return tree


def _node(command: Any, name: str) -> dict[str, Any]:
    """One command, as JSON has it.

    `options` and `arguments` are as `_option` and `_argument` say, `commands` the commands below it by name, and
    `default` the one of them that needs no name, if there is one.
    """
    context = command.make_context(name, [], resilient_parsing=True)
    parameters = command.get_params(context)
    return {
        "help": _plain(command.help or ""),
        "usage": " ".join(command.collect_usage_pieces(context)),
        "options": [_option(one, context) for one in parameters if one.param_type_name == "option" and not one.hidden],
        "arguments": [_argument(one, context) for one in parameters if one.param_type_name == "argument"],
        "commands": {inner: _node(below, inner) for inner, below in getattr(command, "commands", {}).items()},
        "default": getattr(command, "default_command", None),
    }


def _option(option: Any, context: Any) -> dict[str, Any]:
    """A flag: its names, what stands for its value ("" if it takes none), the values there are, help and heading."""
    record = option.get_help_record(context)
    shown, text = record if record is not None else ("", option.help or "")
    metavar = "" if option.is_flag else _NAMES.sub("", shown, count=1).strip()
    choices = _CHOICES.fullmatch(metavar)
    return {
        "names": [*option.opts, *option.secondary_opts],
        "metavar": metavar,
        "values": choices[1].split("|") if choices else [],
        "help": _plain(text),
        "panel": getattr(option, "rich_help_panel", None) or "",
    }


def _argument(argument: Any, context: Any) -> dict[str, Any]:
    """A word without a flag: what stands for it, the values there are, and its help."""
    annotation = getattr(getattr(argument, "type_descriptor", None), "annotation", None)
    record = argument.get_help_record(context)
    return {
        "metavar": argument.metavar or argument.name.upper(),
        "values": [str(value) for value in get_args(annotation) if isinstance(value, str)],
        "help": _plain(record[1] if record is not None else ""),
    }


def _plain(text: str) -> str:
    """Help without the marks of its colours, on one line."""
    return " ".join(Text.from_markup(text).plain.split())
