"""Text that comes from outside: files a user names, and standard input."""

from __future__ import annotations

import codecs
from pathlib import Path

from abcli.errors import PromptError

MAX_TEXT_BYTES = 64 * 1024 * 1024

_SAVE_AS_UTF8 = "save it as UTF-8"
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_FOREIGN_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def read_text_file(path: Path, limit: int = MAX_TEXT_BYTES) -> str:
    """The text of a file or pipe, unchanged but for a UTF-8 byte order mark; it may be empty.

    Raises PromptError if it cannot be read, is longer than `limit` bytes or is not UTF-8 text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise PromptError(f"there is no file {path}", "check the name") from None
    except IsADirectoryError:
        raise PromptError(f"{path} is a directory", "name one file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise PromptError(f"cannot read {path}: {reason}", "check the file and its permissions") from error
    if len(data) > limit:
        raise PromptError(f"{path} is larger than {limit:,} bytes", "name a smaller file, or a part of it")
    return decode_prompt(data, str(path))


def refuse_foreign(data: bytes, source: str) -> None:
    """Raise PromptError if the byte order mark at the beginning of `data` is that of another encoding than UTF-8."""
    for mark, encoding in _FOREIGN_MARKS:
        if data.startswith(mark):
            raise PromptError(f"{source} is {encoding}, not UTF-8", _SAVE_AS_UTF8)


def decode_prompt(data: bytes, source: str) -> str:
    """`data` as UTF-8 without byte order mark; `source` names it in errors.

    Raises PromptError for another encoding, or for NUL bytes, which no text has.
    """
    refuse_foreign(data, source)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(
            f"{source} is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start:,}", _SAVE_AS_UTF8
        ) from None
    position = data.find(b"\0")
    if position >= 0:
        raise PromptError(
            f"{source} is not text: it has a NUL byte at offset {position:,}", f"{_SAVE_AS_UTF8}, if it is text"
        )
    return text.removeprefix("\ufeff")
