"""Streamed text is broken at words, however it arrives."""

from __future__ import annotations

import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from abcli.ui.wrapping import WordWrap

LETTERS = st.text(alphabet="ab-. \t\n\u00e9\u65e5\u672c\u3002\U0001f600", max_size=60)


def wrapped(pieces: list[str], width: int) -> str:
    wrap = WordWrap(lambda: width)
    return "".join(map(wrap.add, pieces)) + wrap.flush()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three", "one two\nthree"),
        ("one two thr", "one two\nthr"),
        ("exactly8 now", "exactly8\nnow"),
        ("a  b      c", "a  b\nc"),
        ("    indented", "    indented"),
        ("a\n\n  b", "a\n\n  b"),
        ("abcdefghijklmnopq r", "abcdefgh\nijklmnop\nq r"),
        ("on abcdefghij", "on\nabcdefgh\nij"),
        ("a\tb c", "a\nb c"),
        ("\u65e5\u672c\u8a9e\u65e5\u672c", "\u65e5\u672c\u8a9e\u65e5\n\u672c"),
        ("\u65e5\u672c\u8a9e\u65e5\u3002\u672c", "\u65e5\u672c\u8a9e\n\u65e5\u3002\u672c"),
        ("trailing  ", "trailing  "),
    ],
)
def test_lines_end_at_words(text: str, expected: str) -> None:
    assert wrapped([text], 8) == expected
    assert wrapped(list(text), 8) == expected


@given(pieces=st.lists(LETTERS, max_size=6), width=st.integers(1, 20))
def test_it_does_not_matter_how_text_arrives(pieces: list[str], width: int) -> None:
    text = "".join(pieces)
    shown = wrapped(pieces, width)
    assert shown == wrapped([text], width) == wrapped(list(text), width)
    # Nothing but white space at the places of breaks is changed.
    assert "".join(shown.split()) == "".join(text.split())
    for line in [] if "\t" in shown else shown.split("\n"):
        # A wide letter needs two columns, and a word behind an indentation stays behind it.
        assert cell_len(line.strip() if len(line.split()) == 1 else line.rstrip()) <= max(width, 2)


@given(words=st.lists(st.text(alphabet="abc", min_size=1, max_size=9), max_size=12), width=st.integers(9, 30))
def test_plain_words_are_broken_as_by_textwrap(words: list[str], width: int) -> None:
    assert wrapped([" ".join(words)], width) == "\n".join(textwrap.wrap(" ".join(words), width))


@given(text=LETTERS)
def test_without_a_width_nothing_is_changed(text: str) -> None:
    assert wrapped([text], 0) == text


def test_a_word_is_held_back_until_it_is_whole() -> None:
    wrap = WordWrap(lambda: 10)
    assert [wrap.add(piece) for piece in ("one", " tw", "o", " ", "t")] == ["", "one", "", " two", ""]
    assert wrap.flush() == " t"


def test_a_new_width_counts_for_what_follows() -> None:
    width = 20
    wrap = WordWrap(lambda: width)
    assert wrap.add("one two three ") == "one two three"
    width = 5
    assert wrap.add("four five ") + wrap.flush() == "\nfour\nfive "
