"""A thought is told from its answer, whoever opened it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.chat.thoughts import split_thought


@pytest.mark.parametrize(
    ("text", "opened", "expected"),
    [
        ("Hello", False, ("", "Hello")),
        ("<think>\nhm\n</think>\n\nHello\n", False, ("hm", "Hello\n")),
        ("hm\n</think>\n\nHello", True, ("hm", "Hello")),
        ("<think>hm</think>Hello", True, ("hm", "Hello")),
        ("<think>cut off", False, ("cut off", "")),
        ("cut off", True, ("cut off", "")),
        ("The tag <think> opens a thought, </think> ends it.", False, None),
        ("<think></think>", False, ("", "")),
    ],
)
def test_a_thought_is_split_off(text: str, opened: bool, expected: tuple[str, str] | None) -> None:
    assert split_thought(text, opened=opened) == (expected or ("", text))


@given(thought=st.text(), answer=st.text())
def test_what_was_put_together_is_taken_apart(thought: str, answer: str) -> None:
    if "</think>" not in thought and "<think>" not in thought:
        expected = (thought.strip(), answer.lstrip())
        assert split_thought(f"<think>\n{thought}\n</think>\n\n{answer}") == expected
        assert split_thought(f"{thought}\n</think>\n\n{answer}", opened=True) == expected
