"""Prompts that wait to be computed, and which pieces of them a step computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Prompt:
    """What is to be appended to a slot, of which the first `done` tokens are there.

    The last token of a shared prompt is left to every bucket; the others have one column compute them.
    """

    tokens: tuple[int, ...]
    shared: bool
    done: int = 0

    @property
    def left(self) -> int:
        """How many tokens are yet to be computed."""
        return len(self.tokens) - self.done


@dataclass(frozen=True)
class PromptPiece:
    """Tokens of a slot's prompt that one step computes; `ends` if nothing but a shared prompt's last token follows."""

    slot: int
    tokens: Sequence[int]
    prompt: Prompt
    ends: bool


class Waiting:
    """At most one prompt for each slot, in the order in which they came."""

    def __init__(self, size: Callable[[bool], int]) -> None:
        """`size` tells how many tokens of a shared prompt (True), or of an exact one, a step computes at most."""
        self._size = size
        self._prompts: dict[int, Prompt] = {}
        self._oldest_first = False

    def __contains__(self, slot: object) -> bool:
        return slot in self._prompts

    def __len__(self) -> int:
        return len(self._prompts)

    def add(self, slot: int, tokens: Sequence[int], *, shared: bool) -> None:
        """Let a prompt wait, behind the others."""
        self._prompts[slot] = Prompt(tuple(tokens), shared)

    def left(self, slot: int) -> int:
        """How many tokens of a slot's prompt are yet to be computed; none if there is no prompt."""
        return self._prompts[slot].left if slot in self._prompts else 0

    def drop(self, slot: int) -> Prompt | None:
        """Forget a slot's prompt; what it was."""
        return self._prompts.pop(slot, None)

    def advance(self) -> Iterator[PromptPiece]:
        """What the next step computes: a piece of one prompt, and beside it whole ends of others if they fit.

        The oldest prompt and the one with the least left take turns, so that a short one does not wait for a long one
        to end, nor a long one for ever. Where a prompt is cut depends on nothing but itself.
        """
        if not self._prompts:
            return
        self._oldest_first = not self._oldest_first
        first = next(iter(self._prompts)) if self._oldest_first else min(self._prompts, key=self.left)
        room = 1.0
        for slot in dict.fromkeys((first, *self._prompts)):
            prompt, size = self._prompts[slot], self._size(self._prompts[slot].shared)
            most = len(prompt.tokens) - prompt.shared
            end = min(prompt.done + size, most)
            if slot == first or (end - prompt.done) / size <= room:
                room -= (end - prompt.done) / size
                self._prompts[slot] = replace(prompt, done=end)
                yield PromptPiece(slot, prompt.tokens[prompt.done : end], prompt, end == most)

    def snapshot(self) -> Mapping[int, Prompt]:
        """What `restore` takes."""
        return dict(self._prompts)

    def restore(self, before: Mapping[int, Prompt], lost: Callable[[int], Sequence[int]]) -> None:
        """Let wait what waited `before`, and in front of it what the slots had then and have `lost` since."""
        self._prompts = dict(before)
        for slot, prompt in before.items():
            if gone := lost(slot):
                self._prompts[slot] = Prompt((*gone, *prompt.tokens[prompt.done :]), prompt.shared)
