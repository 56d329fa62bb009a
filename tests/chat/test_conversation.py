"""Turns are added, undone and dropped as whole turns; the system prompt stays."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.chat.conversation import Conversation, fit
from abcli.chat.messages import Message
from abcli.errors import ContextFullError, UsageError

SYSTEM = Message("system", "ss")


class Letters:
    """A template of one token a character and one more a message; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def tokens(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        self.calls += 1
        return [ord(letter) for message in messages for letter in message.content + "|"]


def talk(turns: int, length: int = 3) -> list[Message]:
    """`turns` answered turns, each of 2 * (length + 1) tokens."""
    pairs = ((Message("user", f"{turn:0{length}}"), Message("assistant", "a" * length)) for turn in range(turns))
    return [message for pair in pairs for message in pair]


def test_a_conversation_takes_turns() -> None:
    conversation = Conversation("be brief")
    conversation.add_user("one")
    conversation.add_assistant("1")
    conversation.add_user("two")
    assert conversation.turns == 2
    assert [message.content for message in conversation.messages] == ["be brief", "one", "1", "two"]
    assert [message.role for message in conversation.messages] == ["system", "user", "assistant", "user"]


def test_roles_must_alternate() -> None:
    conversation = Conversation()
    with pytest.raises(UsageError, match="no message to answer"):
        conversation.add_assistant("1")
    conversation.add_user("one")
    with pytest.raises(UsageError, match="no answer yet"):
        conversation.add_user("two")
    conversation.add_assistant("1")
    with pytest.raises(UsageError):
        conversation.add_assistant("2")
    assert conversation.messages == [Message("user", "one"), Message("assistant", "1")]


def test_undo_drops_the_last_turn() -> None:
    conversation = Conversation("s", talk(2))
    assert conversation.undo() == talk(2)[2:]
    conversation.add_user("open")
    assert conversation.undo() == [Message("user", "open")]
    assert conversation.undo() == talk(1)
    assert conversation.undo() == []
    assert conversation.messages == [Message("system", "s")]


def test_regenerate_drops_only_the_answer() -> None:
    conversation = Conversation(messages=talk(2))
    assert conversation.regenerate() == talk(2)[3:]
    assert conversation.messages == talk(2)[:3]
    assert conversation.regenerate() == []
    conversation.clear()
    with pytest.raises(UsageError):
        conversation.regenerate()


def test_clear_keeps_the_system_prompt() -> None:
    conversation = Conversation("s", talk(2))
    conversation.clear()
    assert conversation.messages == [Message("system", "s")]
    assert conversation.turns == 0


def test_replace_takes_the_system_prompt_from_the_messages() -> None:
    conversation = Conversation("old", talk(1))
    conversation.replace([SYSTEM, *talk(2)])
    assert (conversation.system, conversation.messages) == ("ss", [SYSTEM, *talk(2)])
    conversation.replace(talk(1))
    assert (conversation.system, conversation.messages) == (None, talk(1))


def test_the_messages_given_out_are_a_copy() -> None:
    conversation = Conversation(messages=talk(1))
    conversation.messages.clear()
    assert conversation.turns == 1


def test_what_fits_is_unchanged() -> None:
    messages = [SYSTEM, *talk(2)]
    for overflow in ("error", "shift"):
        fitted = fit(messages, Letters(), available=20, reserve=1, overflow=overflow)
        assert fitted.messages == messages
        assert fitted.tokens == Letters().tokens(messages)
        assert fitted.dropped_turns == 0


def test_error_tells_used_and_available() -> None:
    with pytest.raises(ContextFullError) as raised:
        fit([SYSTEM, *talk(2)], Letters(), available=19, reserve=1, overflow="error")
    assert (raised.value.used, raised.value.available) == (20, 19)


def test_at_least_one_token_is_reserved() -> None:
    with pytest.raises(ContextFullError):
        fit(talk(1), Letters(), available=8, reserve=0, overflow="error")


def test_shift_drops_the_oldest_turns_until_half_is_free() -> None:
    messages = [SYSTEM, *talk(3), Message("user", "now")]
    fitted = fit(messages, Letters(), available=24, reserve=1, overflow="shift")
    assert fitted.dropped_turns == 3
    assert fitted.messages == [SYSTEM, Message("user", "now")]
    assert len(fitted.tokens) <= 12


def test_what_was_dropped_stays_out_while_the_rest_fits() -> None:
    messages = [SYSTEM, *talk(3), Message("user", "now")]
    fitted = fit(messages, Letters(), available=24, reserve=1, overflow="shift", dropped=2)
    assert fitted.dropped_turns == 2
    longer = [*messages, Message("assistant", "a"), *talk(1), Message("user", "now")]
    assert fit(longer, Letters(), available=24, reserve=1, overflow="shift", dropped=2).dropped_turns > 2
    assert fit(messages, Letters(), available=100, reserve=1, overflow="error", dropped=2).dropped_turns == 0


def test_shift_gives_up_when_the_newest_message_does_not_fit() -> None:
    messages = [SYSTEM, *talk(3), Message("user", "n" * 10)]
    with pytest.raises(ContextFullError) as raised:
        fit(messages, Letters(), available=14, reserve=1, overflow="shift")
    assert raised.value.used == 15
    assert fit(messages, Letters(), available=15, reserve=1, overflow="shift").dropped_turns == 3
    with pytest.raises(ContextFullError):
        fit([Message("user", "long")], Letters(), available=2, reserve=1, overflow="shift")


def test_a_greeting_without_a_question_is_a_turn_of_its_own() -> None:
    messages = [SYSTEM, Message("assistant", "hello"), Message("user", "hi")]
    fitted = fit(messages, Letters(), available=10, reserve=1, overflow="shift")
    assert fitted.messages == [SYSTEM, Message("user", "hi")]


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=30),
    available=st.integers(1, 120),
    reserve=st.integers(1, 20),
)
def test_shift_drops_as_few_turns_as_leave_half_free(lengths: list[int], available: int, reserve: int) -> None:
    turns = [[Message("user", "u" * length), Message("assistant", "a")] for length in lengths]
    turns[-1].pop()
    options = [[SYSTEM, *(message for turn in turns[first:] for message in turn)] for first in range(len(turns))]
    sizes = [len(Letters().tokens(kept)) for kept in options]
    if sizes[-1] + 1 > available and sizes[0] + reserve > available:
        with pytest.raises(ContextFullError):
            fit(options[0], Letters(), available, reserve, "shift")
        return
    target = available - reserve if sizes[0] <= available - reserve else min(available - reserve, available // 2)
    wanted = next((first for first, size in enumerate(sizes) if size <= target), len(sizes) - 1)
    fitted = fit(options[0], Letters(), available, reserve, "shift")
    assert (fitted.dropped_turns, fitted.messages) == (wanted, options[wanted])
    assert fitted.tokens == Letters().tokens(fitted.messages)


def test_thousands_of_turns_take_few_tokenizations() -> None:
    template = Letters()
    fit(talk(5000), template, available=1000, reserve=1, overflow="shift")
    assert template.calls < 20
