"""`abcli models`: what is on this machine, what abcli knows, and the user's own names for it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from abcli.config import profiles_directory
from abcli.errors import AbcliError, ModelFileError, ProfileError, UsageError
from abcli.gguf.check import check_file
from abcli.gguf.fingerprint import fingerprint
from abcli.gguf.lora import is_adapter
from abcli.hub import aliases as alias_file
from abcli.hub.catalogue import known_models
from abcli.hub.installed import ModelHere, Removal, models_here, plan_removal, remove
from abcli.hub.locate import LocalName, locate_model, resolve_name
from abcli.hub.names import HubName
from abcli.profiles.lookup import default_profile, may_have_profile
from abcli.ui.terminal import Terminal, one_line

_TITLES = ("NAME", "SIZE", "QUANT", "CONTEXT", "BASE", "FROM", "PROFILE", "ALIAS")
_KNOWN_TITLES = ("NAME", "SIZE", "CONTEXT", "LICENCE", "REPOSITORY")
_NUMBERS = ("SIZE", "CONTEXT", "BASE")
_SHOWN_COMMIT = 7

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]

app = typer.Typer(invoke_without_command=True, add_completion=False)


@app.callback()
def listing(context: typer.Context, *, as_json: AsJson = False) -> None:
    """A line per model on standard output, when no other command follows."""
    if context.invoked_subcommand is None:
        _list(as_json=as_json)
    elif as_json:
        raise UsageError("--json stands before the command", f"write it behind {context.invoked_subcommand}")


@app.command("list", help="Show the models on this machine.")
def show(*, as_json: AsJson = False) -> None:
    """The same as `abcli models` alone."""
    _list(as_json=as_json)


@app.command("known", help="Show the models that abcli knows by name.")
def known(*, as_json: AsJson = False) -> None:
    """A line per model of the catalogue."""
    terminal = Terminal()
    models = known_models().values()
    if as_json:
        reports = [
            {
                "name": model.name,
                "file": model.file,
                "size": model.size,
                "sha256": model.sha256,
                "licence": model.licence,
                "context": model.context,
                "repository": model.hub.repository if model.hub is not None else None,
            }
            for model in models
        ]
        terminal.write(json.dumps(reports, ensure_ascii=False) + "\n")
        return
    rows = [
        (
            model.name,
            decimal(model.size),
            f"{model.context:,}",
            model.licence,
            model.hub.repository if model.hub is not None else "-",
        )
        for model in models
    ]
    terminal.write(_table([_KNOWN_TITLES, *rows]))


@app.command("rm", help="Delete a model from the hub's cache; files of your own are never deleted.")
def rm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="As `abcli models` shows it; a repository: all of it.")],
    *,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Say what would go, ask, and delete it."""
    terminal = Terminal()
    found = resolve_name(name)
    if not isinstance(found, HubName):
        where = found.path if isinstance(found, LocalName) else found.file
        raise UsageError(f"{where} is not in the hub's cache", "abcli deletes no file of yours; delete it yourself")
    removal = plan_removal(found)
    for line in _removal_lines(removal):
        terminal.note(line)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError("there is nobody to ask", "--yes deletes without asking")
        typer.confirm(f"delete, and free {decimal(removal.freed)}?", abort=True, err=True)
    remove(removal)
    terminal.write(f"removed {found}, {decimal(removal.freed)}\n")


@app.command("alias", help="Give a model a name of your own, or take it away; alone: show them.")
def alias(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="The new name.")] = None,
    target: Annotated[str | None, typer.Argument(metavar="[TARGET]", help="What it stands for: any MODEL.")] = None,
    *,
    removed: Annotated[str | None, typer.Option("--remove", metavar="NAME", help="Forget this name.")] = None,
    as_json: AsJson = False,
) -> None:
    """Change the user's own names; a target that is a file is stored with its full path."""
    terminal = Terminal()
    if removed is not None:
        if name is not None:
            raise UsageError("--remove takes one name and nothing else", f"abcli models alias --remove {removed}")
        target = alias_file.remove_alias(removed)
        terminal.write(f"{removed} no longer stands for {target}\n")
    elif name is None:
        table = dict(sorted(alias_file.aliases().items()))
        if as_json:
            terminal.write(json.dumps(table, ensure_ascii=False) + "\n")
        else:
            terminal.write("".join(f"{one} -> {one_line(table[one])}\n" for one in table))
    elif target is None:
        raise UsageError(f"what should {name} stand for?", "abcli models alias NAME TARGET")
    else:
        meant = _target(target)
        before = alias_file.set_alias(name, meant)
        terminal.write(f"{name} stands for {meant}" + (f", not {before} any more" if before else "") + "\n")


def _target(text: str) -> str:
    """What to store for an alias. Raises UsageError and ModelFileError for what is neither a file nor a name."""
    found = resolve_name(text)
    if isinstance(found, HubName):
        return f"hf:{found}"
    if isinstance(found, LocalName):
        if not found.path.is_file():
            raise ModelFileError(f"there is no model {text!r:.200}", "name a GGUF file or user/repository[:quant]")
        return str(found.path.absolute())
    return text


def _list(*, as_json: bool) -> None:
    terminal = Terminal()
    table = _aliases(terminal)
    rows = [(model, _profile(model, terminal), _aliases_of(model, table)) for model in models_here(table)]
    if as_json:
        terminal.write(json.dumps([_report(*row) for row in rows], ensure_ascii=False) + "\n")
        return
    if rows:
        terminal.write(_table([_TITLES, *(_row(*row) for row in rows)]))
    else:
        terminal.note("there is no model here; `abcli models known` shows some, `abcli pull NAME` fetches one")
    for model, _profile_name, _names in rows:
        if model.problem:
            terminal.warn(one_line(model.problem))


def _aliases(terminal: Terminal) -> dict[str, str]:
    """The aliases; damage is a warning."""
    try:
        return alias_file.aliases()
    except ModelFileError as error:
        terminal.warn(error.message)
        return {}


def _aliases_of(model: ModelHere, table: dict[str, str]) -> list[str]:
    found = []
    for name, target in sorted(table.items()):
        try:
            path: Path | None = locate_model(target)
        except AbcliError:
            path = None
        if path is not None and path.absolute() == model.files[0].absolute():
            found.append(name)
    return found


def _profile(model: ModelHere, terminal: Terminal) -> str:
    """The name of the model's default profile, "" for none; damage is a warning."""
    if model.header is None:
        return ""
    directory = profiles_directory()
    try:
        if not may_have_profile(directory, model.header.file_size):
            return ""
        profile = default_profile(directory, fingerprint(check_file(model.files[0])), terminal.warn)
    except ProfileError as error:
        terminal.warn(error.message)
        return ""
    except AbcliError:
        return ""  # no model that runs, so none with a profile
    return profile.name if profile is not None else ""


def _is_adapter(model: ModelHere) -> bool:
    return model.header is not None and is_adapter(model.header)


def _row(model: ModelHere, profile: str, names: list[str]) -> tuple[str, ...]:
    header, cached = None if _is_adapter(model) else model.header, model.cached
    origin = "file"
    if cached is not None:
        origin = f"hub@{cached.commit[:_SHOWN_COMMIT]}" + (f" {one_line(','.join(cached.refs))}" if cached.refs else "")
    return (
        one_line(model.name),
        decimal(model.size),
        model.quant or "-",
        f"{header.trained_context:,}" if header is not None else "-",
        f"{header.native_base:g}" if header is not None else "-",
        f"{origin} (LoRA)" if _is_adapter(model) else origin,
        profile or "-",
        ", ".join(names) or "-",
    )


def _report(model: ModelHere, profile: str, names: list[str]) -> dict[str, Any]:
    """The object of one model that --json prints; an adapter has neither context nor base."""
    header, cached = None if _is_adapter(model) else model.header, model.cached
    source: dict[str, Any] = {"kind": "file"}
    if cached is not None:
        source = {"kind": "hub", "repository": cached.repository, "file": cached.name}
        source |= {"commit": cached.commit, "refs": list(cached.refs)}
    return {
        "name": model.name,
        "path": str(model.files[0]),
        "files": len(model.files),
        "size": model.size,
        "quant": model.quant or None,
        "adapter": _is_adapter(model),
        "architecture": model.header.architecture if model.header is not None else None,
        "context": header.trained_context if header is not None else None,
        "native_base": header.native_base if header is not None else None,
        "source": source,
        "profile": profile or None,
        "aliases": names,
        "problem": model.problem or None,
    }


def _removal_lines(removal: Removal) -> list[str]:
    return [
        f"{model.repository}/{model.name} of commit {model.commit[:_SHOWN_COMMIT]}"
        + (f" in {len(model.files)} parts" if len(model.files) > 1 else "")
        for model in removal.models
    ]


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    """`rows`, titles first, in columns two spaces apart, numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if title in _NUMBERS else text.ljust(width)
            for title, text, width in zip(rows[0], row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)
