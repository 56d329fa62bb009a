"""What a tuned model should still say as before: prose in the public domain, and what people ask every day.

The prose is the beginning of Alice's Adventures in Wonderland, Pride and Prejudice, Moby-Dick, A Tale of Two Cities,
A Scandal in Bohemia, Walden, Frankenstein, Dracula, Adventures of Huckleberry Finn, On the Origin of Species, The War
of the Worlds and Little Women.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from importlib.resources import files

# A sequence of so many tokens that comes so often is no way to talk.
_REPEATED_TOKENS = 12
_REPETITIONS = 3


@dataclass(frozen=True)
class Halves:
    """Texts to guard by while learning, and others to check with at the end."""

    guard: tuple[str, ...]
    check: tuple[str, ...]


def prose() -> Halves:
    """Passages of books, 150 to 250 words each."""
    passages = _read("prose.txt").split("\n\n")
    return Halves(tuple(passages[0::2]), tuple(passages[1::2]))


def prompts() -> Halves:
    """A hundred everyday questions and requests."""
    lines = _read("prompts.txt").splitlines()
    return Halves(tuple(lines[0::2]), tuple(lines[1::2]))


def repeats_itself(tokens: tuple[int, ...]) -> bool:
    """Whether an answer says the same twelve tokens three times or more."""
    windows = zip(*(tokens[start:] for start in range(_REPEATED_TOKENS)), strict=False)
    return any(count >= _REPETITIONS for count in Counter(windows).values())


def _read(name: str) -> str:
    return files("abcli.tune").joinpath(name).read_text("utf-8").strip()
