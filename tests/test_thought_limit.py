"""A thought that has used up its budget is ended with the model's marker, between characters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from abcli.generate import Generator
from abcli.sampling import GenerationConfig, SamplingConfig, Steering, ThoughtLimit
from tests.support.fakes import END, ByteTokenizer, FakeEngine, GreedySampler

BEGIN, CLOSE = "<think>", "</think>"


def answered(text: str, tokens: int, *, opened: bool, grammar: type[GreedySampler] = GreedySampler) -> str:
    """What becomes of an answer in which the model would write `text`, whatever stands there, and then "Yes."."""
    prompt = b"ask"
    written = text.encode()

    def next_token(held: Sequence[int], _bucket: int) -> int:
        so_far = bytes(held[len(prompt) :])
        if CLOSE.encode() in so_far:
            rest = so_far.partition(CLOSE.encode())[2].lstrip()
            return b"Yes."[len(rest)] if len(rest) < 4 else END
        return written[len(so_far)] if len(so_far) < len(written) else END

    engine = FakeEngine(next_token, bases=(1e4, 2e4), context_size=512)
    limit = ThoughtLimit(tokens, opened, BEGIN, CLOSE, tuple(f"\n{CLOSE}\n\n".encode()))
    config = GenerationConfig(SamplingConfig(), steering=Steering(thought=limit))
    with Generator(engine, ByteTokenizer(), grammar) as generator:
        pieces = list(generator.stream(0, list(prompt), config))
    assert pieces[-1].answer.finish_reason == "stop"
    return pieces[-1].answer.text


@pytest.mark.parametrize(
    ("text", "tokens", "opened", "answer"),
    [
        ("abcdef" * 9, 4, True, "abcd\n</think>\n\nYes."),
        ("<think>abcdef" * 9, 4, False, "<think>abcd\n</think>\n\nYes."),
        (" \n<think>abcdef", 2, False, " \n<think>ab\n</think>\n\nYes."),
        ("abcdef" * 9, 0, True, "\n</think>\n\nYes."),
        ("<think>abcdef", 0, False, "<think>\n</think>\n\nYes."),
        # Never in the middle of a character.
        ("\u20ac\u20ac\u20ac\u20ac", 4, True, "\u20ac\u20ac\n</think>\n\nYes."),
        # What is short enough, and what is no thought, stays as it is.
        ("ab</think>", 3, True, "ab</think>Yes."),
        ("ab</think>", 5, True, "ab</think>Yes."),
        ("a <think> b", 1, False, "a <think> b"),
        ("No.", 0, False, "No."),
        # What begins like the end may be it, or not.
        ("ab</thing of it", 4, True, "ab</thing\n</think>\n\nYes."),
    ],
)
def test_thoughts_end(text: str, tokens: int, opened: bool, answer: str) -> None:
    assert answered(text, tokens, opened=opened) == answer


def test_a_forced_token_is_chosen_whatever_the_model_wants() -> None:
    class Careful(GreedySampler):
        def sample(self, logits: np.ndarray) -> int:
            assert np.isfinite(logits).any()
            return super().sample(logits)

    assert answered("abcdef", 1, opened=True, grammar=Careful).startswith("a\n</think>")
