"""Answers of several sets of buckets side by side, with the token at which each parts from the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from abcli.text import counted
from abcli.trace.difference import likelihood, parting
from abcli.trace.trace import Step
from abcli.ui.terminal import printable


@dataclass(frozen=True)
class Compared:
    """One set of buckets and its answer; the texts of the `steps` together are the answer's."""

    name: str
    buckets: int
    steps: tuple[Step, ...]


def show_answers(console: Console, answers: Sequence[Compared], *, unicode: bool) -> None:
    """Print the answers as columns, the first of them what the others are compared with, then where they part."""
    first, *others = answers
    partings = [parting(first.steps, other.steps) for other in others]
    places = [min((one.place for one in partings if one is not None), default=-1)]
    places += [-1 if one is None else one.place for one in partings]
    table = Table(expand=True, pad_edge=False, box=None, header_style="bold", padding=(0, 2, 0, 0))
    for answer in answers:
        table.add_column(f"{answer.name} ({counted(answer.buckets, 'bucket')})", overflow="fold", ratio=1)
    table.add_row(*(_marked(answer.steps, place, unicode) for answer, place in zip(answers, places, strict=True)))
    console.print(table)
    console.print()
    for other, found in zip(others, partings, strict=True):
        if found is None:
            console.print(Text(f"{other.name}: the same answer"), soft_wrap=True)
            continue
        console.print(Text(f"{other.name} parts from {first.name} at token {found.place + 1}:"), soft_wrap=True)
        for step in (found.first, found.second):
            if step is not None:
                told = ", ".join(
                    f"{name} {_likely(here, step.token)}"
                    for name, here in ((first.name, found.first), (other.name, found.second))
                    if here is not None
                )
                console.print(Text(f"  {printable(step.text)!r:<16} {told}"), soft_wrap=True)


def _marked(steps: Sequence[Step], place: int, unicode: bool) -> Text:
    """An answer with the token at `place` marked; it can be told without colours."""
    opening, closing = ("»", "«") if unicode else (">>", "<<")
    text = Text()
    for index, step in enumerate(steps):
        if index == place:
            text.append(opening + (printable(step.text).strip("\n") or "·") + closing, style="bold reverse")
        else:
            text.append(printable(step.text))
    return text


def _likely(step: Step, token: int) -> str:
    share, known = likelihood(step, token)
    return f"{share:.1%}" if known else f"under {share:.1%}"
