"""Keeps the tokens an answer was really made of when a later turn renders it again as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence


def continued(held: Sequence[int], wanted: Sequence[int], piece: Callable[[int], bytes]) -> list[int]:
    """`wanted`, spelled with the tokens of `held` as far as both stand for the same text.

    A model may write a word in other tokens than the tokenizer would; the cache holds the model's. `piece` gives a
    token's bytes, none for control tokens, which therefore must be the same token in both.
    """
    synced_held = synced_wanted = at_held = at_wanted = 0
    rest_held, rest_wanted = b"", b""
    while True:
        if not rest_held and not rest_wanted:
            synced_held, synced_wanted = at_held, at_wanted
            if at_held == len(held) or at_wanted == len(wanted):
                break
            if held[at_held] == wanted[at_wanted]:
                at_held, at_wanted = at_held + 1, at_wanted + 1
                continue
        if len(rest_held) <= len(rest_wanted):
            if at_held == len(held):
                break
            more = piece(held[at_held])
            at_held, rest_held = at_held + 1, rest_held + more
        else:
            if at_wanted == len(wanted):
                break
            more = piece(wanted[at_wanted])
            at_wanted, rest_wanted = at_wanted + 1, rest_wanted + more
        shared = min(len(rest_held), len(rest_wanted))
        if not more or rest_held[:shared] != rest_wanted[:shared]:
            break
        rest_held, rest_wanted = rest_held[shared:], rest_wanted[shared:]
    return [*held[:synced_held], *wanted[synced_wanted:]]
