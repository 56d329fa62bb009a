"""A long conversation is rendered piece by piece, with the same text as in one go, or in one go."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.chat.messages import Message
from abcli.chat.options import ChatOptions
from abcli.chat.windows import MIN_TURNS, WindowedRendering
from abcli.errors import TemplateError

ANCHOR = "\ufdd2"
PLAIN = ChatOptions()


class Counting:
    """Writes messages with a function of (messages, index); counts the messages it has seen."""

    def __init__(self, line: object) -> None:
        self.line = line
        self.seen = 0

    def __call__(self, messages: tuple[Message, ...], _options: ChatOptions, opened: bool) -> str:
        self.seen += len(messages)
        return "".join(self.line(messages, at) for at in range(len(messages))) + "assistant:" * opened  # type: ignore[operator]


def plain(messages: Sequence[Message], at: int) -> str:
    return f"{messages[at].role}: {messages[at].content}\n"


def last_thought_only(messages: Sequence[Message], at: int) -> str:
    users = [index for index, message in enumerate(messages) if message.role == "user"]
    return plain(messages, at) + (f"({messages[at].reasoning_content})" if at > users[-1] else "")


def numbered(messages: Sequence[Message], at: int) -> str:
    return f"{at} {plain(messages, at)}"


def from_the_end(messages: Sequence[Message], at: int) -> str:
    return f"{len(messages) - at} {plain(messages, at)}"


def dropping(messages: Sequence[Message], at: int) -> str:
    return plain(messages, at) if at % 40 else ""


def refusing(messages: Sequence[Message], _at: int) -> str:
    raise TemplateError(f"no {len(messages)}", "")


def talk(turns: int) -> tuple[Message, ...]:
    messages = [Message("system", "s")]
    for turn in range(turns):
        messages += [Message("user", f" {turn}"), Message("assistant", f"a{turn}", f"t{turn}")]
    return tuple(messages)


@pytest.mark.parametrize("line", [plain, last_thought_only])
@pytest.mark.parametrize("turns", [MIN_TURNS, MIN_TURNS + 1, 63, 64, 65, 81, 200])
@pytest.mark.parametrize("opened", [True, False])
def test_windows_say_what_the_whole_says(line: object, turns: int, opened: bool) -> None:
    render = Counting(line)
    for messages in (talk(turns), talk(turns)[1:], talk(turns)[:-1]):
        assert WindowedRendering(render).text(messages, PLAIN, opened, ANCHOR) == render(messages, PLAIN, opened)


@settings(max_examples=40)
@given(st.lists(st.lists(st.sampled_from(["assistant", "system"]), max_size=3), min_size=MIN_TURNS, max_size=90))
def test_turns_of_any_length_are_joined(turns: list[list[str]]) -> None:
    messages = []
    for number, roles in enumerate(turns):
        messages += [Message("user", f"u{number}"), *(Message(role, f"{number}") for role in roles)]  # type: ignore[arg-type]
    assert WindowedRendering(Counting(plain)).text(messages, PLAIN, True, ANCHOR) == Counting(plain)(
        tuple(messages), PLAIN, True
    )


@pytest.mark.parametrize("line", [numbered, from_the_end, dropping, refusing])
def test_a_template_that_looks_further_is_rendered_as_a_whole(line: object) -> None:
    assert WindowedRendering(Counting(line)).text(talk(100), PLAIN, True, ANCHOR) is None


def test_what_has_no_turns_or_few_is_rendered_as_a_whole() -> None:
    windows = WindowedRendering(Counting(plain))
    assert windows.text(talk(MIN_TURNS - 1), PLAIN, True, ANCHOR) is None
    assert windows.text([Message("assistant", "a"), *talk(100)[1:]], PLAIN, True, ANCHOR) is None
    assert windows.text([*talk(100), Message("user", " ")], PLAIN, True, ANCHOR) is None


def test_a_further_turn_costs_the_time_of_that_turn() -> None:
    render = Counting(plain)
    windows = WindowedRendering(render)
    windows.text(talk(1000), PLAIN, True, ANCHOR)
    assert render.seen < 4000
    render.seen = 0
    windows.text(talk(1001), PLAIN, True, ANCHOR)
    assert render.seen < 100
