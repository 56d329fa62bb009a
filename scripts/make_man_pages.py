"""Write abcli's man pages from the help of its commands: one for the program, and one for each command.

`make dist` calls it; the wheel brings what it writes as share/man/man1. The form is man(7)'s, which every man reads.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from abcli.cli._command_tree import command_tree
from abcli.cli.main import app
from abcli.version import __version__

TARGET = Path(__file__).resolve().parent.parent / "build" / "man"
FILES = {
    "$ABCLI_HOME, else the platform's folder of user data": "sessions, and what is known of models on this machine",
    "the platform's folder of user caches, abcli/prompts": "prompts that --prompt-cache keeps",
    "the platform's folder of user settings, abcli/profiles": "calibrated profiles",
    "$HF_HOME/hub, else ~/.cache/huggingface/hub": "models of the hub",
}
ENVIRONMENT = {
    "ABCLI_HOME": "Where all of abcli's own files are.",
    "HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE": "As for every program of the hub.",
    "NO_COLOR": "No colours on a terminal.",
}
EXAMPLES = (
    'abcli run "Why is the sky blue?"',
    "abcli chat model.gguf --buckets 6",
    "abcli batch prompts.jsonl -o answers.jsonl",
)
EXITS = {"0": "Done.", "1": "Failed.", "2": "Wrong usage.", "130": "Interrupted."}


def escaped(text: str) -> str:
    """`text` as roff shows it: hyphens that can be copied, and no line that begins as a request."""
    return re.sub(r"(?m)^([.'])", r"\\&\1", text.replace("\\", r"\e").replace("-", r"\-"))


def described(pairs: dict[str, str]) -> list[str]:
    """Names in bold with what they mean."""
    return [line for name, text in pairs.items() for line in (".TP", rf"\fB{escaped(name)}\fR", escaped(text))]


def option_lines(option: dict[str, Any]) -> list[str]:
    """One flag."""
    names = ", ".join(rf"\fB{escaped(name)}\fR" for name in option["names"])
    value = rf" \fI{escaped(option['metavar'].strip('<>'))}\fR" if option["metavar"] else ""
    return [".TP", names + value, escaped(option["help"])]


def command_lines(name: str, node: dict[str, Any], heading: str) -> list[str]:
    """How a command is called and what its words and flags mean; flags stand under their headings."""
    lines = [
        f".{heading} {name}" if heading == "SS" else ".SH SYNOPSIS",
        rf"\fB{escaped(name)}\fR {escaped(node['usage'])}",
    ]
    lines += [".PP", escaped(node["help"])] if heading == "SS" else [".SH DESCRIPTION", escaped(node["help"])]
    for argument in node["arguments"]:
        lines += [".TP", rf"\fI{escaped(argument['metavar'])}\fR", escaped(argument["help"]) or r"\&"]
    for panel in dict.fromkeys(option["panel"] for option in node["options"]):
        if heading == "SH":
            lines.append(f".SH {(panel or 'options').upper()}")
        lines += [line for option in node["options"] if option["panel"] == panel for line in option_lines(option)]
    return lines


def page(name: str, node: dict[str, Any], rest: list[str]) -> str:
    """The page of the command `name`, as in "abcli run"; `rest` are the sections after its flags."""
    title = name.replace(" ", "-")
    lines = [f'.TH {escaped(title.upper())} 1 "" "abcli {__version__}" "abcli"', ".SH NAME"]
    lines += [rf"{escaped(title)} \- {escaped(node['help'].rstrip('.'))}"]
    return "\n".join([*lines, *command_lines(name, node, "SH"), *rest]) + "\n"


def pages(tree: dict[str, Any]) -> dict[str, str]:
    """Every page by the name of its file."""
    commands = {f"abcli-{name}(1)": node["help"] for name, node in tree["commands"].items()}
    rest = [".SH COMMANDS", *described(commands), ".SH ENVIRONMENT", *described(ENVIRONMENT)]
    rest += [".SH FILES", *described(FILES), ".SH EXIT STATUS", *described(EXITS)]
    rest += [".SH EXAMPLES", ".nf", *map(escaped, EXAMPLES), ".fi"]
    made = {"abcli.1": page("abcli", tree, rest)}
    for name, node in tree["commands"].items():
        below = [command_lines(f"abcli {name} {inner}", one, "SS") for inner, one in node["commands"].items()]
        rest = [".SH COMMANDS", *(line for lines in below for line in lines)] if below else []
        made[f"abcli-{name}.1"] = page(f"abcli {name}", node, [*rest, ".SH SEE ALSO", r"\fBabcli\fR(1)"])
    return made


def main(target: Path = TARGET) -> None:
    """Write all pages into the folder `target`, and nothing else is left there."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name, text in pages(command_tree(app)).items():
        (target / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
