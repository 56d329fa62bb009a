"""Which slot holds the beginning of which prompt, so that what prompts share is computed once."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from abcli.generate import common_prefix

# Fewer tokens than this are not worth looking for; their computation costs as much as one new token or two.
BLOCK = 32

PrefixKeys: TypeAlias = tuple[int, ...]
"""A key for each whole block of a prompt; it stands for all tokens from the first to the block's last."""


def prefix_keys(tokens: Sequence[int], block: int = BLOCK) -> PrefixKeys:
    """The keys of `tokens`: two prompts share n keys at the beginning if and only if they share n * block tokens."""
    keys = []
    key = 0
    for end in range(block, len(tokens) + 1, block):
        key = hash((key, *tokens[end - block : end]))
        keys.append(key)
    return tuple(keys)


@dataclass(frozen=True)
class _Held:
    prompt: Sequence[int]
    keys: PrefixKeys


class HeldPrompts:
    """The prompts that the slots hold; a prompt stays held while its answer grows and after it is done."""

    def __init__(self) -> None:
        self._held: dict[int, _Held] = {}
        self._owners: dict[int, set[int]] = {}

    def hold(self, slot: int, prompt: Sequence[int], keys: PrefixKeys) -> None:
        """Remember that `slot` holds `prompt`, instead of what it held."""
        self.forget(slot)
        self._held[slot] = _Held(prompt, keys)
        for key in keys:
            self._owners.setdefault(key, set()).add(slot)

    def forget(self, slot: int) -> None:
        """Remember nothing of `slot`."""
        held = self._held.pop(slot, None)
        for key in held.keys if held is not None else ():
            self._owners[key].discard(slot)
            if not self._owners[key]:
                del self._owners[key]

    def prompt(self, slot: int) -> Sequence[int]:
        """The prompt that `slot` holds, empty if none."""
        held = self._held.get(slot)
        return held.prompt if held is not None else ()

    def blocks(self, keys: PrefixKeys, without: int | None = None) -> int:
        """How many blocks from the beginning of a prompt with `keys` some slot holds, other than `without`."""
        ignored = set() if without is None else {without}
        low, high = 0, len(keys)
        # Whoever holds a block holds those before it.
        while low < high:
            middle = (low + high + 1) // 2
            if self._owners.get(keys[middle - 1], ignored) - ignored:
                low = middle
            else:
                high = middle - 1
        return low

    def owner(self, keys: PrefixKeys, rather_not: Container[int] = ()) -> int | None:
        """A slot that holds the most of the beginning of a prompt with `keys`; None if no slot holds a block of it.

        One of `rather_not` only if no other holds as much.
        """
        blocks = self.blocks(keys)
        return min(self._owners[keys[blocks - 1]], key=lambda slot: (slot in rather_not, slot)) if blocks else None

    def loss(self, slot: int, keys: PrefixKeys, waiting: Iterable[PrefixKeys]) -> int:
        """The blocks of the `waiting` prompts that no slot would hold any more if `slot` took a prompt with `keys`."""
        lost = 0
        for other in waiting:
            now = self.blocks(other)
            if now:
                lost += max(0, now - max(self.blocks(other, slot), common_prefix(other, keys)))
        return lost
