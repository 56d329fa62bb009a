"""Text from files and pipes is UTF-8 or a clear error."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from abcli.chat.files import decode_prompt, read_text_file
from abcli.errors import PromptError


@pytest.mark.parametrize("text", ["", "h\u00e9llo\r\n", "\U0001f600", "no newline", "a\ufeffb"])
def test_text_is_read_as_it_is(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(text.encode())
    assert read_text_file(path) == text


def test_a_byte_order_mark_is_dropped() -> None:
    assert decode_prompt(b"\xef\xbb\xbfabc", "stdin") == "abc"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("hi".encode("utf-16"), "UTF-16"),
        (b"\xfe\xff\x00h", "UTF-16"),
        ("hi".encode("utf-32"), "UTF-32"),
        (b"\x00\x00\xfe\xff\x00\x00\x00h", "UTF-32"),
        (b"abc\xe9def", "byte 0xe9 at offset 3"),
        (b"abc\xc3", "byte 0xc3 at offset 3"),
        (b"\xed\xa0\x80", "offset 0"),
        (b"ab\0c", "NUL byte at offset 2"),
    ],
)
def test_anything_else_is_named(data: bytes, expected: str) -> None:
    with pytest.raises(PromptError) as raised:
        decode_prompt(data, "notes.txt")
    assert raised.value.message.startswith("notes.txt is ")
    assert expected in raised.value.message
    assert raised.value.hint


def test_the_limit_is_inclusive(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    path.write_bytes(b"x" * 100)
    assert len(read_text_file(path, limit=100)) == 100
    with pytest.raises(PromptError, match="larger than 99 bytes"):
        read_text_file(path, limit=99)


def test_missing_files_and_directories_are_errors(tmp_path: Path) -> None:
    with pytest.raises(PromptError, match="no file"):
        read_text_file(tmp_path / "missing")
    with pytest.raises(PromptError, match="is a directory"):
        read_text_file(tmp_path)
    with pytest.raises(PromptError):
        read_text_file(Path("a\0b"))
    (tmp_path / "file").touch()
    with pytest.raises(PromptError, match="cannot read"):
        read_text_file(tmp_path / "file" / "below")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_read(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(b"piped",))
    writer.start()
    assert read_text_file(path) == "piped"
    writer.join()
