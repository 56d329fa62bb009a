"""What a shell is told at Tab: commands, flags, their values, and the names of models and profiles.

The shells' scripts are typer's (`abcli --install-completion`), and so is their way to ask, through the environment. The
answers are not: typer would import the command that is completed, with llama.cpp, at every Tab. Here a description of
all commands is kept in a file, and nothing else than it is read.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abcli.config import completion_file, profiles_directory
from abcli.errors import AbcliError
from abcli.version import __version__

ASKED = "_ABCLI_COMPLETE"
_PACKAGE = Path(__file__).resolve().parents[1]
# Names with other letters would have to be quoted, which each shell does differently.
_SAFE = re.compile(r"[\w./:@+=-]+")
_MODEL_OPTIONS = {"--model", "--hf-repo"}


@dataclass(frozen=True)
class Candidate:
    """One possible word, and what is said beside it."""

    value: str
    help: str = ""


def completion(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """What to print for a shell, and the exit code; None if no shell asks, or one that is left to typer.

    Where no name fits nothing is printed, and the shell completes the names of files.
    """
    instruction, _, shell = environment.get(ASKED, "").partition("_")
    ask = {"bash": _for_bash, "zsh": _for_zsh, "fish": _for_fish}.get(shell)
    if instruction != "complete" or ask is None:
        return None
    try:
        return ask(_tree(), environment)
    except Exception:
        # A traceback in the middle of a command line helps nobody.
        return "", 1


def candidates(tree: dict[str, Any], words: Sequence[str], incomplete: str) -> list[Candidate]:
    """What `incomplete` can become after `words`, which follow the program's name; `tree` is `command_tree`'s."""
    node, position, pending, flags_end = tree, 0, None, False
    path: tuple[str, ...] = ("abcli",)
    for word in words:
        if pending is not None:
            pending = None
        elif word == "--" and not flags_end:
            flags_end = True
        elif word.startswith("-") and word != "-" and not flags_end:
            name, has_value, _ = word.partition("=")
            if _option(node, name) is None and node["default"]:
                node = node["commands"][node["default"]]
            option = _option(node, name)
            pending = option if option is not None and option["metavar"] and not has_value else None
        elif word in node["commands"]:
            node, path, position = node["commands"][word], (*path, word), 0
        else:
            node, position = node["commands"][node["default"]] if node["default"] else node, position + 1
    if pending is not None:
        found = _values(pending)
    elif incomplete.startswith("-") and not flags_end:
        found = _flags(node, incomplete)
    else:
        found = _words(node, path, position)
    return [one for one in found if one.value.startswith(incomplete) and _SAFE.fullmatch(one.value)]


def _option(node: dict[str, Any], name: str) -> dict[str, Any] | None:
    return next((option for option in node["options"] if name in option["names"]), None)


def _flags(node: dict[str, Any], incomplete: str) -> Iterator[Candidate]:
    name, has_value, _ = incomplete.partition("=")
    if has_value:
        if (option := _option(node, name)) is not None:
            yield from (Candidate(f"{name}={one.value}") for one in _values(option))
        return
    options = node["options"] + (node["commands"][node["default"]]["options"] if node["default"] else [])
    # What is long says what it does; the short ones are there for those who know them.
    wanted = "--" if incomplete == "-" else incomplete
    for option in options:
        yield from (Candidate(name, option["help"]) for name in option["names"] if name.startswith(wanted))


def _values(option: dict[str, Any]) -> Iterator[Candidate]:
    if _MODEL_OPTIONS & set(option["names"]):
        yield from _models()
    elif "--profile" in option["names"]:
        yield from [*_profiles(), Candidate("none", "no profile")]
    else:
        yield from map(Candidate, option["values"])


def _words(node: dict[str, Any], path: tuple[str, ...], position: int) -> Iterator[Candidate]:
    """What can stand at a place without a flag: a command, or what the place's name asks for."""
    if position == 0:
        yield from (Candidate(name, below["help"]) for name, below in node["commands"].items())
        if node["default"]:
            node = node["commands"][node["default"]]
    places = [
        (word.strip("[]").removesuffix("..."), argument["values"])
        for argument in node["arguments"]
        for word in argument["metavar"].split()
    ]
    if not places:
        return
    place, values = places[min(position, len(places) - 1)]
    repeated = node["arguments"][-1]["metavar"].endswith("...")
    if position >= len(places) and not repeated:
        return
    yield from map(Candidate, values)
    if place in ("MODEL", "TARGET") or path[1:] == ("models", "rm"):
        yield from _models()
    elif path[1:] == ("pull",):
        yield from _known_models()
    elif path[1:2] == ("profiles",) and place == "NAME":
        yield from _profiles()


def _models() -> Iterator[Candidate]:
    """Models by name: on this machine, then those that abcli knows."""
    from abcli.hub.aliases import aliases
    from abcli.hub.cache import cached_models
    from abcli.hub.names import HubName, quant_of

    yield Candidate("default", "the default model")
    with suppress(AbcliError):
        yield from (Candidate(name, target) for name, target in sorted(aliases().items()))
    with suppress(AbcliError, OSError):
        names = {str(HubName(model.repository, quant_of(model.name))) for model in cached_models()}
        yield from (Candidate(name, "on this machine") for name in sorted(names))
    yield from _known_models()


def _known_models() -> Iterator[Candidate]:
    from abcli.hub.catalogue import known_models

    with suppress(AbcliError):
        yield from (Candidate(model.name, f"{model.size >> 20:,} MiB") for model in known_models().values())


def _profiles() -> Iterator[Candidate]:
    """The names of all profiles; which model each is for would take reading the models."""
    from abcli.hub.catalogue import catalogue_path

    names = set()
    with suppress(OSError):
        # As abcli.profiles.store names files: the model's fingerprint, and the profile's name.
        names |= {path.stem.partition("-")[2] for path in profiles_directory().glob("[!.]*-*.json")}
    with suppress(OSError, ValueError, KeyError, TypeError):
        models = json.loads(catalogue_path().read_text(encoding="utf-8"))["models"]
        names |= {profile["name"] for model in models for profile in model.get("profiles", ())}
    yield from map(Candidate, sorted(names))


def _tree() -> dict[str, Any]:
    """The description of all commands, from its file if that was made by this very version."""
    files = [*_PACKAGE.glob("*.py"), *_PACKAGE.glob("cli/*.py")]
    made_by = [__version__, str(_PACKAGE), max(path.stat().st_mtime_ns for path in files)]
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(completion_file().read_text(encoding="utf-8"))
        if stored["made_by"] == made_by:
            return dict(stored["tree"])
    from abcli.atomic import write_atomically
    from abcli.cli._command_tree import command_tree
    from abcli.cli.main import app

    tree = command_tree(app)
    with suppress(OSError):
        completion_file().parent.mkdir(parents=True, exist_ok=True)
        write_atomically(completion_file(), json.dumps({"made_by": made_by, "tree": tree}).encode())
    return tree


def _for_bash(tree: dict[str, Any], environment: Mapping[str, str]) -> tuple[str, int]:
    """Bash takes words apart at ":" and "=" and replaces the last part alone."""
    parts = environment.get("COMP_WORDS", "").split("\n")
    current = int(environment.get("COMP_CWORD", "0"))
    parts = [*parts, ""][: current + 1]
    words: list[str] = []
    for number, part in enumerate(parts):
        if number > 0 and {part, parts[number - 1]} & {":", "="}:
            words[-1] += part
        else:
            words.append(part)
    incomplete = words[-1]
    last = parts[-1] if parts[-1] not in (":", "=") else ""
    kept = len(incomplete) - len(last)
    found = candidates(tree, words[1:-1], incomplete)
    return "\n".join(one.value[kept:] for one in found), 0


def _for_zsh(tree: dict[str, Any], environment: Mapping[str, str]) -> tuple[str, int]:
    """Code that zsh evaluates: names with what they mean, or the names of files."""
    found = candidates(tree, *_split(environment.get("_TYPER_COMPLETE_ARGS", "")))
    if not found:
        return "_files", 0
    shown = []
    for one in found:
        value = one.value.replace(":", r"\:")
        shown.append(f'"{value}":"{_spoken(one.help)}"' if one.help else f'"{value}"')
    return "_arguments '*: :((" + "\n".join(shown) + "))'", 0


def _for_fish(tree: dict[str, Any], environment: Mapping[str, str]) -> tuple[str, int]:
    """Lines of a name and what it means; asked first whether there are any, or files are meant."""
    found = candidates(tree, *_split(environment.get("_TYPER_COMPLETE_ARGS", "")))
    if environment.get("_TYPER_COMPLETE_FISH_ACTION") == "is-args":
        return "", 0 if found else 1
    return "\n".join(f"{one.value}\t{one.help}" if one.help else one.value for one in found), 0


def _split(line: str) -> tuple[list[str], str]:
    """The words of a command line after the program's name, and the one that is being typed."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters = True, ""
    words: list[str] = []
    try:
        words += lexer
    except ValueError:
        # A quotation without its end.
        words.append(lexer.token)
    if not line[-1:].isspace() and len(words) > 1:
        return words[1:-1], words[-1]
    return words[1:], ""


def _spoken(text: str) -> str:
    """`text` without what zsh would read as its own."""
    return re.sub(r"[^\w .,;/+=<>-]+", " ", text).strip()
