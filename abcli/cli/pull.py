"""`abcli pull`: fetches a model of the hub into its standard cache."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Annotated

import typer

from abcli.errors import ModelFileError, UsageError
from abcli.hub.locate import BundledName, LocalName, locate_model, resolve_name
from abcli.hub.names import HubName
from abcli.ui.download import fetch_shown
from abcli.ui.terminal import Terminal


def pull(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="user/repository[:quant], user/repository/file.gguf, an alias or a name."),
    ],
    *,
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REVISION", help="Commit, branch or tag instead of main.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but the path.")] = False,
) -> None:
    """Fetch what is not in the cache yet, or not up to date; its path goes to standard output."""
    terminal = Terminal()
    found = resolve_name(name)
    if isinstance(found, BundledName):
        terminal.write(f"{locate_model(name, partial(fetch_shown, terminal, quiet=quiet))}\n")
        return
    if isinstance(found, LocalName):
        if found.path.is_file():
            raise UsageError(f"{found.path} is a file of yours", "there is nothing to fetch")
        raise ModelFileError(
            f"{name!r:.200} is no model on the hub", "write user/repository[:quant]; see docs/models.md"
        )
    terminal.write(f"{fetch_shown(terminal, _pinned(found, revision), quiet=quiet)}\n")


def _pinned(name: HubName, revision: str | None) -> HubName:
    """`name` at a revision. Raises UsageError if it has another already."""
    if revision is None:
        return name
    if not revision or name.revision not in ("", revision):
        raise UsageError(f"--revision {revision} contradicts {name}", "name one revision")
    return replace(name, revision=revision)
