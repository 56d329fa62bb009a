"""`abcli profiles`: the calibrated bucket sets there are, and which of them a model uses."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from abcli.cli._lora import LoraFlag, parse_loras
from abcli.config import HeadNumbers, ModelConfig, profiles_directory
from abcli.errors import ProfileError, UsageError
from abcli.evals.tools import FORMER_PROMPT, FORMER_TASK
from abcli.gguf.checked import check_model
from abcli.hub.locate import locate_model
from abcli.profiles import catalogue, store
from abcli.profiles.profile import MAX_BYTES, Difference, Profile, Score, check_name, decode, moment
from abcli.ui.everyday import everyday_lines
from abcli.ui.terminal import Terminal, one_line

_TITLES = ("NAME", "MODEL", "BUCKETS", "TASK", "GAIN", "CREATED", "NOTE")
_NUMBERS = ("BUCKETS", "GAIN")
_SCORE_TITLES = ("CONFIGURATION", "MEAN NLL", "ACCURACY", "WORST DEPTH", "GAIN", "95 % INTERVAL")
_QUALIFIED = re.compile(r"(?P<start>[0-9a-f]{4,64})/(?P<name>.*)", re.DOTALL)
_SHOWN_DIGITS = 8

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a profile; FINGERPRINT/NAME if several have it.")]
ModelFlag = Annotated[str | None, typer.Option("--model", "-m", metavar="FILE", help="The model whose profile it is.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what has that name.")]

app = typer.Typer(invoke_without_command=True, add_completion=False)


@dataclass(frozen=True)
class Entry:
    """A profile to be had; `shipped`: it comes with abcli; `default`: its model uses it."""

    profile: Profile
    shipped: bool
    default: bool = False


@app.callback()
def listing(context: typer.Context, *, as_json: AsJson = False) -> None:
    """A line per profile on standard output, when no other command follows."""
    if context.invoked_subcommand is not None:
        if as_json:
            raise UsageError("--json stands before the command", f"write it behind {context.invoked_subcommand}")
        return
    terminal = Terminal()
    found = available(terminal)
    if as_json:
        terminal.write(json.dumps([_report(entry) for entry in found], ensure_ascii=False) + "\n")
        return
    if found:
        rows = [_TITLES, *(_row(entry) for entry in found)]
        terminal.write(_table(rows, _NUMBERS))
        terminal.note("gain: nats per token by which the right answers' mean NLL is below the native base's (held-out)")
    else:
        terminal.note(f"no profiles in {profiles_directory()}; `abcli calibrate` makes one")


@app.command("show", help="Show one profile and what speaks for it.")
def show(name: Name, *, model: ModelFlag = None, lora: LoraFlag = None, as_json: AsJson = False) -> None:
    """All of a profile on standard output."""
    terminal = Terminal()
    entry = _select(available(terminal), name, model, lora)
    if as_json:
        terminal.write(json.dumps(_report(entry), ensure_ascii=False) + "\n")
        return
    terminal.write(_description(entry))


@app.command("export", help="Write a profile to a file, for others to import.")
def export(
    name: Name,
    file: Annotated[str, typer.Argument(metavar="[FILE|-]", help="Where to; -: standard output.")] = "-",
    *,
    model: ModelFlag = None,
    lora: LoraFlag = None,
    force: Force = False,
) -> None:
    """One JSON object in a file or on standard output."""
    terminal = Terminal()
    profile = _select(available(terminal), name, model, lora).profile
    if file == "-":
        terminal.write(store.portable(profile).decode("utf-8"))
        return
    store.export(profile, Path(file), overwrite=force)
    terminal.note(f"wrote {file}")


@app.command("import", help="Take over a profile that was exported.")
def import_(
    file: Annotated[str, typer.Argument(metavar="FILE", help="An exported profile; -: standard input.")],
    *,
    force: Force = False,
) -> None:
    """Store a profile under its own name for its own model, whether that model is here or not."""
    if file == "-":
        source: Path | Profile = decode(sys.stdin.buffer.read(MAX_BYTES + 1), "standard input")
    else:
        source = Path(file)
    profile = store.import_(source, profiles_directory(), overwrite=force)
    Terminal().write(f"imported {profile.name} for {one_line(profile.model)}\n")


@app.command("remove", help="Delete a profile.")
def remove(name: Name, *, model: ModelFlag = None, lora: LoraFlag = None) -> None:
    """Delete a profile of the user's; those that come with abcli stay."""
    terminal = Terminal()
    entry = _select(available(terminal), name, model, lora)
    if entry.shipped:
        raise ProfileError(f"{entry.profile.name} comes with abcli", "use another, or run with --profile none")
    store.remove(profiles_directory(), entry.profile.fingerprint, entry.profile.name)
    terminal.write(f"removed {entry.profile.name} for {one_line(entry.profile.model)}\n")


@app.command("use", help="Make a profile its model's default.")
def use(name: Name, *, model: ModelFlag = None, lora: LoraFlag = None) -> None:
    """Let the model use this profile, whatever is calibrated later."""
    terminal = Terminal()
    # One that comes with abcli becomes the user's own copy: what is written stays apart from what is installed.
    profile = store.choose(_select(available(terminal), name, model, lora).profile, profiles_directory())
    terminal.write(f"{one_line(profile.model)} uses {profile.name}\n")


def available(terminal: Terminal) -> list[Entry]:
    """Every profile, the user's own first and the newest first; an own one hides abcli's of the same name.

    Damage is a warning. Raises ProfileError if the directory cannot be read.
    """
    own = store.profiles(profiles_directory(), terminal.warn)
    try:
        shipped = catalogue.shipped()
    except ProfileError as error:
        terminal.warn(error.message)
        shipped = []
    taken = {(profile.fingerprint, profile.name) for profile in own}
    shipped = [profile for profile in shipped if (profile.fingerprint, profile.name) not in taken]
    defaults = _defaults(own, shipped)
    return [
        Entry(profile, shipped=is_shipped, default=profile in defaults)
        for group, is_shipped in ((own, False), (shipped, True))
        for profile in group
    ]


def _defaults(own: list[Profile], shipped: list[Profile]) -> list[Profile]:
    """The default profile of each model: the user's own wins."""
    defaults: dict[str, Profile] = {}
    for group in (own, shipped):
        for identity in {profile.fingerprint for profile in group} - defaults.keys():
            chosen = store.pick([profile for profile in group if profile.fingerprint == identity], None)
            if chosen is not None:
                defaults[identity] = chosen
    return list(defaults.values())


def _select(entries: list[Entry], word: str, model: str | None, lora: list[str] | None) -> Entry:
    """The profile that NAME or FINGERPRINT/NAME means. Raises UsageError and ProfileError."""
    if lora and model is None:
        raise UsageError(f"--lora {lora[0]} needs the model that it changes", "add --model FILE")
    start = "" if model is None else check_model(ModelConfig(locate_model(model), lora=parse_loras(lora))).fingerprint
    name = word
    if (qualified := _QUALIFIED.fullmatch(word)) is not None:
        if model is not None:
            raise UsageError(f"{word} names its model already", "drop --model or the fingerprint")
        start, name = qualified["start"], qualified["name"]
    check_name(name)
    found = [entry for entry in entries if entry.profile.name == name and entry.profile.fingerprint.startswith(start)]
    if not found:
        names = ", ".join(sorted({entry.profile.name for entry in entries}))
        raise ProfileError(
            f"there is no profile {word!r:.200}" + (f" for {model}" if model is not None else ""),
            f"there are: {names}" if names else "there is none; `abcli calibrate` makes one",
        )
    if len(found) > 1:
        words = ", ".join(f"{entry.profile.fingerprint[:_SHOWN_DIGITS]}/{name}" for entry in found)
        raise UsageError(f"{len(found)} models have a profile {word!r:.200}", f"give --model FILE, or one of {words}")
    return found[0]


def _row(entry: Entry) -> tuple[str, ...]:
    profile = entry.profile
    return (
        profile.name,
        one_line(profile.model),
        str(len(profile.bases)),
        one_line(profile.task),
        _gain(profile.evidence.own.difference),
        _local_time(profile.created),
        _note(entry),
    )


def _note(entry: Entry) -> str:
    return ", ".join(word for word, holds in (("default", entry.default), ("with abcli", entry.shipped)) if holds)


def _gate(gate: float) -> str:
    return (
        "off: each that was tried makes answers worse"
        if gate == 1
        else f"{gate:g} costs nothing measurable (--gate auto)"
    )


def _task(profile: Profile) -> str:
    """What a profile was calibrated on, in full."""
    return FORMER_PROMPT if profile.task == FORMER_TASK else one_line(profile.task)


def _description(entry: Entry) -> str:
    """All of a profile as text: a line per property, then the table of scores."""
    profile = entry.profile
    prefill_base = "the native one" if profile.prefill_base is None else f"{profile.prefill_base:g}"
    lines = [
        ("name", profile.name),
        ("model", f"{one_line(profile.model)} ({one_line(profile.architecture)})"),
        ("fingerprint", profile.fingerprint),
        ("native base", f"{profile.native_base:g}"),
        ("bases", " ".join(f"{base:g}" for base in profile.bases)),
        ("multiples", " ".join(f"{base / profile.native_base:.4g}" for base in profile.bases)),
        ("merge", profile.merge),
        ("prefill", f"{profile.prefill}, base {prefill_base}"),
        *([("gains", _range(profile.gains))] if profile.gains else []),
        *([("head bases", f"{_range(profile.head_multipliers)} times")] if profile.head_multipliers else []),
        *([] if profile.gate is None else [("gate", _gate(profile.gate))]),
        ("tuned on" if profile.tuning else "calibrated on", f"{_task(profile)}, contexts of {profile.length:,} tokens"),
        ("created", f"{_local_time(profile.created)} by abcli {one_line(profile.abcli_version)}"),
        ("note", _note(entry) or "-"),
        ("held-out", f"{profile.evidence.questions:,} questions; NLL in nats per token"),
    ]
    if profile.everyday is not None:
        lines += everyday_lines(profile.everyday)
    rows = [_SCORE_TITLES, *(_score_row(score, score == profile.evidence.own) for score in profile.evidence.scores)]
    width = max(len(label) for label, _ in lines)
    head = "".join(f"{label.ljust(width)}  {text}\n" for label, text in lines)
    return f"{head}\n{_table(rows, _SCORE_TITLES[1:])}"


def _score_row(score: Score, own: bool) -> tuple[str, ...]:
    difference = score.difference
    return (
        one_line(score.configuration) + (" (this profile)" if own else ""),
        f"{score.mean_nll:.4f}",
        f"{score.accuracy:.1%}",
        f"{score.worst_depth_nll:.4f}",
        _gain(difference),
        "-" if difference is None else f"{_signed(-difference.high)} to {_signed(-difference.low)}",
    )


def _gain(difference: Difference | None) -> str:
    """By how much the NLL falls: what is better is positive."""
    return "-" if difference is None else _signed(-difference.mean)


def _signed(number: float) -> str:
    # Adding 0.0 turns -0.0, which would be shown with its sign, into 0.0.
    return f"{round(number, 4) + 0.0:+.4f}"


def _range(numbers: HeadNumbers) -> str:
    found = [number for layer in numbers for number in layer]
    return f"of {len(found):,} heads, {min(found):.4g} to {max(found):.4g}"


def _local_time(text: str) -> str:
    return moment(text).astimezone().strftime("%Y-%m-%d %H:%M")


def _table(rows: list[tuple[str, ...]], numbers: Iterable[str]) -> str:
    """`rows`, titles first, in columns two spaces apart; those called in `numbers` are set to the right."""
    right = set(numbers)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            text.rjust(width) if title in right else text.ljust(width)
            for title, text, width in zip(rows[0], row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip() + "\n")
    return "".join(lines)


def _report(entry: Entry) -> dict[str, Any]:
    """The object of one profile that --json prints."""
    return {**dataclasses.asdict(entry.profile), "default": entry.default, "shipped": entry.shipped}
