"""Words of several rooms, and the escapes of the command line."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.text import unescaped

HEXADECIMAL = "0123456789abcdefABCDEF"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\n", "\n"),
        (r"a\tb\rc", "a\tb\rc"),
        (r"\'\"\\n", "'\"\\n"),
        (r"\\\n", "\\\n"),
        (r"\x41\xE2\x82\xac", "A\u20ac"),
        (r"\x4 \xg0 \q \u20ac \0", r"\x4 \xg0 \q \u20ac \0"),
        ("end\\", "end\\"),
        ("\u20ac\\n\n", "\u20ac\n\n"),
    ],
)
def test_escapes(text: str, expected: str) -> None:
    assert unescaped(text) == expected


def test_bytes_that_are_no_text() -> None:
    with pytest.raises(UnicodeDecodeError):
        unescaped(r"\xff")


def llama_escapes(text: str) -> str:
    """llama.cpp's string_process_escapes (common/common.cpp), letter by letter."""
    data, output, index = text.encode(), bytearray(), 0
    letters = {ord("n"): 10, ord("r"): 13, ord("t"): 9, ord("'"): 39, ord('"'): 34, ord("\\"): 92}
    while index < len(data):
        if data[index] == 92 and index + 1 < len(data):
            index += 1
            digits = data[index + 1 : index + 3].decode("latin-1")
            if data[index] in letters:
                output.append(letters[data[index]])
            elif data[index] == ord("x") and len(digits) == 2 and all(digit in HEXADECIMAL for digit in digits):
                index += 2
                output.append(int(digits, 16))
            else:
                output += bytes([92, data[index]])
        else:
            output.append(data[index])
        index += 1
    return output.decode()


@given(st.text(alphabet="\\\\\\nrtx'\"4aq\u20ac"))
def test_escapes_are_llama_cpps(text: str) -> None:
    try:
        expected = llama_escapes(text)
    except UnicodeDecodeError:
        with pytest.raises(UnicodeDecodeError):
            unescaped(text)
    else:
        assert unescaped(text) == expected
