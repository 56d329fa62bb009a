from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from abcli.chat.continuation import continued

# Tokens 0..255 are bytes, these are words; 300 is a control token.
WORDS = {256: b"ab", 257: b"abc", 258: b"bc", 259: b"ca"}
CONTROL = 300


def piece(token: int) -> bytes:
    return b"" if token >= CONTROL else WORDS.get(token) or bytes([token])


def text(tokens: list[int]) -> list[bytes]:
    """What the tokens say, cut at control tokens."""
    parts = [b""]
    for token in tokens:
        if token >= CONTROL:
            parts += [b"%d" % token, b""]
        else:
            parts[-1] += piece(token)
    return parts


def test_the_models_own_spelling_is_kept() -> None:
    held = [CONTROL, 97, 98, 99]
    assert continued(held, [CONTROL, 257, CONTROL, 120], piece) == [*held, CONTROL, 120]


def test_a_different_text_is_taken_from_where_it_differs() -> None:
    assert continued([97, 258, 120], [257, 121], piece) == [97, 258, 121]


def test_a_control_token_is_no_text() -> None:
    assert continued([97, CONTROL], [97, CONTROL + 1], piece) == [97, CONTROL + 1]
    assert continued([97, CONTROL, 98], [256], piece) == [256]


tokens = st.lists(st.sampled_from([97, 98, 99, 256, 257, 258, 259, CONTROL, CONTROL + 1]), max_size=12)


@given(tokens, tokens)
def test_the_text_is_always_the_wanted_one(held: list[int], wanted: list[int]) -> None:
    result = continued(held, wanted, piece)
    assert text(result) == text(wanted)


@given(tokens, tokens)
def test_what_is_held_is_kept_where_the_text_continues_it(held: list[int], more: list[int]) -> None:
    spelled = [byte for token in held for byte in (piece(token) or [token])]
    result = continued(held, [*spelled, CONTROL, *more], piece)
    assert result == [*held, CONTROL, *more]
