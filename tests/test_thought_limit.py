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


# As gpt-oss writes: a thought is a message, and the header of the next one follows.
ANALYSIS, FINAL = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
NEXT = "<|end|><|start|>assistant"


def messages(rest: Sequence[str], tokens: int, first: str) -> str:
    """What becomes of an answer in messages: `first`, and after the n-th header for a next one the n-th of `rest`."""
    prompt = b"ask"

    def next_token(held: Sequence[int], _bucket: int) -> int:
        so_far = bytes(held[len(prompt) :]).decode()
        parts = so_far.split(NEXT)
        written = [first, *rest][len(parts) - 1]
        # What is forced after the header is not for the model to write.
        return ord(written[len(parts[-1])]) if len(parts[-1]) < len(written) else END

    engine = FakeEngine(next_token, bases=(1e4, 2e4), context_size=512)
    limit = ThoughtLimit(tokens, False, ANALYSIS, "<|end|>", tuple(NEXT.encode()), tuple(FINAL.encode()))
    config = GenerationConfig(SamplingConfig(), steering=Steering(thought=limit))
    with Generator(engine, ByteTokenizer(), GreedySampler) as generator:
        pieces = list(generator.stream(0, list(prompt), config))
    assert pieces[-1].answer.finish_reason == "stop"
    return pieces[-1].answer.text


@pytest.mark.parametrize(
    ("tokens", "first", "rest", "answer"),
    [
        # After the thought the model decides what it says or calls.
        (4, f"{ANALYSIS}abcdefgh", [f"{FINAL}Yes."], f"{ANALYSIS}abcd{NEXT}{FINAL}Yes."),
        (0, f"{ANALYSIS}abcdefgh", [f"{FINAL}Yes."], f"{ANALYSIS}{NEXT}{FINAL}Yes."),
        (4, f"{ANALYSIS}abcdefgh", [" to=functions.f"], f"{ANALYSIS}abcd{NEXT} to=functions.f"),
        # All thoughts have one budget, of which the first one's end takes its share (here seven tokens).
        (
            12,
            f"{ANALYSIS}abc{NEXT}",
            [f"{FINAL}Hm.{NEXT}", f"{ANALYSIS}defgh", f"{FINAL}Yes."],
            f"{ANALYSIS}abc{NEXT}{FINAL}Hm.{NEXT}{ANALYSIS}de{NEXT}{FINAL}Yes.",
        ),
        # Who begins another one without any left has to say something.
        (
            2,
            f"{ANALYSIS}abcdefgh",
            [f"{ANALYSIS}cdef", f"{FINAL}Yes."],
            f"{ANALYSIS}ab{NEXT}{ANALYSIS}{NEXT}{FINAL}Yes.",
        ),
        # What is short enough, and what is no thought, stays as it is.
        (9, f"{ANALYSIS}abc{NEXT}", [f"{FINAL}Yes."], f"{ANALYSIS}abc{NEXT}{FINAL}Yes."),
        (0, f"{FINAL}Yes.", [], f"{FINAL}Yes."),
    ],
)
def test_thoughts_that_are_messages_end(tokens: int, first: str, rest: list[str], answer: str) -> None:
    assert messages(rest, tokens, first) == answer
