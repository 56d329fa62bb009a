"""`abcli verify`: every check of a model file, one line each, checksums and a trial load included."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from abcli.chat.sandbox import CompiledTemplate
from abcli.cli._flags import flag
from abcli.cli._lora import LoraFlag, parse_loras
from abcli.cli._model_name import ModelNameOptions
from abcli.config import LoraConfig
from abcli.errors import UsageError
from abcli.gguf.verification import Check, Verification
from abcli.hub.catalogue import known_models
from abcli.hub.locate import locate_model
from abcli.machine import ensure_loadable
from abcli.ui.inspection import check_line
from abcli.ui.terminal import Terminal

_DIGEST = re.compile(r"[0-9a-f]{64}")
# The folder of the hub's cache in which a file's name is its SHA-256.
_BLOBS = "blobs"


def verify(
    model_word: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="GGUF file or name; default: the default model.")
    ] = None,
    *,
    name_options: ModelNameOptions,
    lora: LoraFlag = None,
    sha256: Annotated[
        str | None,
        flag("What the file's SHA-256 should be; of a split model the first part's.", "--sha256", metavar="HEX"),
    ] = None,
    trial: Annotated[bool, flag("Let llama.cpp load the file in a process of its own.", "--trial/--no-trial")] = True,
    as_json: Annotated[bool, flag("Print a JSON object instead of lines.", "--json")] = False,
) -> None:
    """Check a file from end to end; the exit code is 1 if anything is wrong."""
    digest = sha256.strip().lower() if sha256 is not None else None
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise UsageError(f"--sha256 {sha256} is no SHA-256", "give 64 hexadecimal digits")
    path = locate_model(name_options.name(model_word))
    loras = parse_loras(lora)
    terminal = Terminal()
    verification = Verification(path)
    checks: list[Check] = []
    for check in _checks(verification, digest, loras, terminal, trial=trial):
        checks.append(check)
        if not as_json:
            terminal.write(check_line(check) + "\n")
    if as_json:
        report = {"path": str(path), "sound": verification.sound, "checks": [asdict(check) for check in checks]}
        terminal.write(json.dumps(report, ensure_ascii=False) + "\n")
    if not verification.sound:
        raise typer.Exit(1)


def _checks(
    verification: Verification, digest: str | None, loras: Sequence[LoraConfig], terminal: Terminal, *, trial: bool
) -> Iterator[Check]:
    yield from verification.structure()
    if verification.is_adapter and loras:
        raise UsageError(f"{verification.path} is an adapter itself", "name the model: abcli verify MODEL --lora FILE")
    with terminal.working("computing checksums"):
        known = {entry.sha256: f"the {entry.name} that abcli knows" for entry in known_models().values()}
        checksums = list(verification.checksums(_expected(verification, digest), known))
    yield from checksums
    with terminal.working("reading the weights"):
        weights = verification.weights()
    yield weights
    for lora in loras:
        yield from verification.adapter(lora)
    if verification.is_adapter:
        yield Check("trial", "skipped", "a LoRA needs a model: abcli verify MODEL --lora FILE")
        return
    yield verification.run("chat template", lambda: _template(verification), needs_header=True)
    if trial:
        with terminal.working("loading the model"):
            loaded = _trial(verification)
        yield loaded


def _expected(verification: Verification, digest: str | None) -> dict[str, str]:
    """The SHA-256 that each file must have, if any is known: the one asked for, the hub's, or the default model's.

    Elsewhere the name of a file says little: several people publish other files under the catalogue's names.
    """
    bundled = {entry.file: entry.sha256 for entry in known_models().values() if entry.hub is None}
    expected: dict[str, str] = {}
    for number, path in enumerate(verification.paths()):
        if number == 0 and digest is not None:
            expected[path.name] = digest
        elif (blob := _blob_digest(path)) is not None:
            expected[path.name] = blob
        elif path.name in bundled:
            expected[path.name] = bundled[path.name]
    return expected


def _blob_digest(path: Path) -> str | None:
    """The SHA-256 by which the hub's cache names the file, None for a file that lies elsewhere."""
    try:
        target = path.resolve()
    except (OSError, ValueError, RuntimeError):
        return None
    return target.name if target.parent.name == _BLOBS and _DIGEST.fullmatch(target.name) else None


def _template(verification: Verification) -> str:
    source = verification.header.chat_template if verification.header is not None else None
    if source is None:
        return "there is none"
    CompiledTemplate(source)
    return f"{len(source):,} characters, compiled in the sandbox"


def _trial(verification: Verification) -> Check:
    model = verification.checked()
    if model is None:
        return Check("trial", "skipped", "an earlier check has failed")

    def load() -> str:
        ensure_loadable(model)
        return "llama.cpp loads it and decodes" + (" with its adapters" if model.adapters else "")

    return verification.run("trial", load)
