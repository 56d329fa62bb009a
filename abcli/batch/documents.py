"""An input that is one JSON document and not a line per prompt: an array, or objects written over several lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain

from abcli.batch.records import Record, parse_object
from abcli.chat.files import MAX_TEXT_BYTES, decode_prompt
from abcli.errors import PromptError

_HEAD_BYTES = 1 << 16
_BLANKS = re.compile(r"[ \t\r\n]*")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_DECODER = json.JSONDecoder()
_HINT = "repair it, or write one JSON object per line"


def read_document(chunks: Iterator[bytes], name: str, *, is_json: bool) -> tuple[list[Record] | None, Iterator[bytes]]:
    """The records of an input that is one JSON array, or objects over several lines; else None, and all its bytes.

    The lines of the records are their numbers, from 1. With `is_json` the input is meant to be JSON; without, it is
    taken for a document only if it is one throughout, of texts and objects. Raises PromptError for a document that is
    meant to be one, but is damaged or too large.
    """
    head = b""
    while b"\n" not in _stripped(head) and len(head) < _HEAD_BYTES and (chunk := next(chunks, b"")):
        head += chunk
    if not _begins_document(head):
        return None, chain([head], chunks)
    data = bytearray(head)
    while len(data) <= MAX_TEXT_BYTES and (chunk := next(chunks, b"")):
        data += chunk
    whole = bytes(data)
    records: list[Record] | None = None
    try:
        records = [_record(number, item) for number, item in enumerate(_items(whole, name), 1)]
    except PromptError:
        if is_json and not _is_first_of_lines(whole):
            raise
    if records is not None and not is_json and not (records and all(record.problem is None for record in records)):
        records = None
    return records, chain([whole], chunks)


def _stripped(data: bytes) -> bytes:
    return data.removeprefix(_BYTE_ORDER_MARK).lstrip(b" \t\r\n")


def _begins_document(head: bytes) -> bool:
    """Whether this is the beginning of an array, or of an object that does not end on its line."""
    text = _stripped(head)
    if text.startswith(b"["):
        return text[1:].lstrip(b" \t\r\n")[:1] in (b'"', b"{", b"]", b"")
    line, newline, _rest = text.partition(b"\n")
    if not line.startswith(b"{") or not newline:
        return False
    try:
        shown = line.decode().rstrip()
        json.loads(shown)
    except json.JSONDecodeError as error:
        return error.pos >= len(shown)
    except (ValueError, RecursionError):
        pass
    return False


def _is_first_of_lines(data: bytes) -> bool:
    """Whether the first line looks like one of many that are each a whole, rather than a document's beginning."""
    first, _newline, rest = _stripped(data).partition(b"\n")
    if first.startswith(b"{"):
        return _stripped(rest).startswith(b"{") and not rest.startswith((b" ", b"\t"))
    return first.rstrip().endswith(b"]") and bool(rest.strip())


def _items(data: bytes, name: str) -> list[str]:
    """The JSON of each item of an array, or of the objects one after the other. Raises PromptError."""
    if len(data) > MAX_TEXT_BYTES:
        raise PromptError(f"{name} is one JSON document of more than {MAX_TEXT_BYTES >> 20} MiB", _HINT)
    text = decode_prompt(data, name)
    try:
        begin = _skipped(text, 0)
        return list(_array_items(text, begin) if text[begin] == "[" else _values(text, begin))
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno:,}, column {error.colno:,}"
    except (ValueError, RecursionError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else str(error)
    raise PromptError(f"{name} begins like one JSON document, but is none: {reason}"[:300], _HINT)


def _values(text: str, position: int) -> Iterator[str]:
    """The JSON of each value, where they follow each other. Raises ValueError and RecursionError."""
    while position < len(text):
        _value, end = _DECODER.raw_decode(text, position)
        yield text[position:end]
        position = _skipped(text, end)


def _array_items(text: str, begin: int) -> Iterator[str]:
    """The JSON of each item of the array that begins at `begin` and is all there is. Raises as `_values`."""
    position, mark = _skipped(text, begin + 1), ","
    if text.startswith("]", position):
        position, mark = _skipped(text, position + 1), "]"
    while mark == ",":
        _value, end = _DECODER.raw_decode(text, position)
        yield text[position:end]
        position = _skipped(text, end)
        mark = text[position : position + 1]
        if mark not in (",", "]"):
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        position = _skipped(text, position + 1)
    if position < len(text):
        raise json.JSONDecodeError("Extra data", text, position)


def _skipped(text: str, position: int) -> int:
    """The position of the next character that is not blank."""
    blanks = _BLANKS.match(text, position)
    return blanks.end() if blanks is not None else position


def _record(number: int, item: str) -> Record:
    if item.startswith('"'):
        return Record(number, json.loads(item))
    try:
        return Record(number, parse_object(item))
    except PromptError as error:
        return Record(number, None, error)
