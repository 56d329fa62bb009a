"""Which pieces of the prompts that wait a step computes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.engine.waiting import Waiting

SIZES = {False: 4, True: 12}
PROMPTS = st.lists(st.tuples(st.integers(2, 40), st.booleans()), min_size=1, max_size=5)


def computed(prompts: list[tuple[int, bool]]) -> list[dict[int, int]]:
    """The number of tokens by slot in each step, until nothing waits."""
    waiting = Waiting(SIZES.__getitem__)
    for slot, (length, shared) in enumerate(prompts):
        waiting.add(slot, range(length), shared=shared)
    steps = []
    while waiting:
        pieces = list(waiting.advance())
        steps.append({piece.slot: len(piece.tokens) for piece in pieces})
        for piece in pieces:
            assert list(piece.tokens) == list(range(piece.prompt.done, piece.prompt.done + len(piece.tokens)))
            if piece.ends:
                assert waiting.left(piece.slot) == piece.prompt.shared
                waiting.drop(piece.slot)
    return steps


@settings(max_examples=60)
@given(PROMPTS)
def test_each_step_is_filled_and_prompts_are_cut_as_if_alone(prompts: list[tuple[int, bool]]) -> None:
    steps = computed(prompts)
    for slot, prompt in enumerate(prompts):
        cuts = [step[slot] for step in steps if slot in step]
        assert cuts == [step[0] for step in computed([prompt])]
    for step in steps:
        assert sum(length / SIZES[prompts[slot][1]] for slot, length in step.items()) <= 1 + 1e-9


def test_neither_a_short_prompt_nor_a_long_one_waits_for_ever() -> None:
    steps = computed([(40, False), (8, False), (8, False)])
    assert [list(step) for step in steps] == [[0], [1], [0], [1], [0], [2], [0], [2], *[[0]] * 6]


def test_after_a_failure_what_was_lost_waits_again() -> None:
    waiting = Waiting(SIZES.__getitem__)
    waiting.add(0, range(10), shared=False)
    list(waiting.advance())
    before = waiting.snapshot()
    list(waiting.advance())
    assert waiting.left(0) == 2
    waiting.restore(before, lambda _slot: ())
    assert waiting.left(0) == 6
    waiting.restore(before, lambda _slot: [7, 8])
    assert waiting.left(0) == 8
    (piece,) = waiting.advance()
    assert list(piece.tokens) == [7, 8, 4, 5]
