"""Telling a model's thought from its answer."""

from __future__ import annotations

OPEN = "<think>"
CLOSE = "</think>"


def split_thought(text: str, *, opened: bool = False) -> tuple[str, str]:
    """(thought, answer) of what a model wrote; without a thought all of it is the answer.

    `opened`: the template has begun the thought already. One without an end, because the answer was cut off, is all
    thought. White space around both is the template's matter, so it is left out.
    """
    body = text.lstrip()
    if body.startswith(OPEN):
        body = body[len(OPEN) :]
    elif not opened:
        return "", text
    thought, _, answer = body.partition(CLOSE)
    return thought.strip(), answer.lstrip()
