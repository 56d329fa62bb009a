"""Arguments in notations of their own: Python's, which LFM2 writes, and Gemma 4's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from abcli.chat.calls.source import NotACallError, Source, Steps, is_json, whole

_DEEPEST = 64
ReadKey = Callable[[Source], Steps[str]]
Read = Callable[[Source, int], Steps[str]]
GEMMA_QUOTE = '<|"|>'
_SCALAR = re.compile(r"[-+.\w]*")
_HEX = re.compile(r"[0-9a-fA-F]*")
_PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", "'": "'", '"': '"', "b": "\b", "f": "\f", "\n": ""}
_ESCAPED_NUMBERS = {"x": 2, "u": 4}


def python_value(source: Source, depth: int = _DEEPEST) -> Steps[str]:
    """Read a value as Python or JSON writes it and return its JSON. Raises NotACallError if it is none."""
    yield from source.space()
    first = yield from source.peek()
    if first and first in "\"'":
        return json.dumps((yield from _python_text(source)), ensure_ascii=False)
    if first == "[":
        yield from source.took(first)
        return (yield from _items(source, python_value, depth))
    if first == "{":
        yield from source.took(first)
        return (yield from _members(source, _python_dict_key, python_value, depth))
    scalar = yield from source.run(_SCALAR)
    scalar = _PYTHON_WORDS.get(scalar, scalar)
    if not scalar or not is_json(scalar):
        raise NotACallError
    return scalar


def python_json(written: str) -> str:
    """The JSON of a value that is written as JSON or as Python's. Raises NotACallError if it is neither."""
    if is_json(written):
        return written
    source = Source()
    source.feed(written)
    source.close(cut=False)
    steps = python_value(source)
    try:
        while True:
            next(steps)
    except StopIteration as stop:
        if source.rest.strip():
            raise NotACallError from None
        return str(stop.value)


def _python_text(source: Source) -> Steps[str]:
    """The text in quotes; an escape that Python does not know stands for itself, and so does a line's end."""
    quote = yield from source.peek()
    yield from source.took(quote)
    heard: list[str] = []
    while True:
        found = yield from source.until([quote, "\\"], heard.append)
        if found == quote:
            return whole("".join(heard))
        escaped = yield from source.peek()
        if not escaped:
            raise NotACallError
        yield from source.took(escaped)
        if escaped in _ESCAPED_NUMBERS:
            digits = yield from source.run(_HEX)
            taken = digits[: _ESCAPED_NUMBERS[escaped]]
            source.back(len(digits) - len(taken))
            heard.append(chr(int(taken, 16)) if taken else f"\\{escaped}")
        else:
            heard.append(_ESCAPES.get(escaped, f"\\{escaped}"))


def _python_dict_key(source: Source) -> Steps[str]:
    yield from source.space()
    first = yield from source.peek()
    if not first or first not in "\"'":
        raise NotACallError
    key = yield from _python_text(source)
    yield from source.expect([":"])
    return json.dumps(key, ensure_ascii=False)


def gemma_value(source: Source, depth: int = _DEEPEST) -> Steps[str]:
    """Read a value as Gemma 4 writes it and return its JSON. Raises NotACallError if it is none."""
    yield from source.space()
    if (yield from source.took(GEMMA_QUOTE)):
        heard: list[str] = []
        if not (yield from source.until([GEMMA_QUOTE], heard.append)):
            raise NotACallError
        return json.dumps("".join(heard), ensure_ascii=False)
    if (yield from source.took("[")):
        return (yield from _items(source, gemma_value, depth))
    if (yield from source.took("{")):
        return (yield from _members(source, gemma_key, gemma_value, depth))
    if (yield from source.sees('"')):
        return json.dumps((yield from source.text()), ensure_ascii=False)
    scalar = yield from source.run(_SCALAR)
    if not scalar or not is_json(scalar):
        raise NotACallError
    return scalar


def _items(source: Source, read: Read, depth: int) -> Steps[str]:
    if not depth:
        raise NotACallError
    items: list[str] = []
    while not (yield from _closed(source, "]", first=not items)):
        items.append((yield from read(source, depth - 1)))
    return f"[{', '.join(items)}]"


def _members(source: Source, read_key: ReadKey, read_value: Read, depth: int) -> Steps[str]:
    if not depth:
        raise NotACallError
    members: list[str] = []
    while not (yield from _closed(source, "}", first=not members)):
        key = yield from read_key(source)
        members.append(f"{key}: {(yield from read_value(source, depth - 1))}")
    return f"{{{', '.join(members)}}}"


def _closed(source: Source, bracket: str, *, first: bool) -> Steps[bool]:
    """Whether a list or an object ends here; otherwise the comma before its next member is read."""
    yield from source.space()
    if (yield from source.took(bracket)):
        return True
    if not first:
        yield from source.expect([","])
    return False


def gemma_key(source: Source) -> Steps[str]:
    """Read a key and its colon, and return the key as JSON."""
    yield from source.space()
    if (yield from source.sees('"')):
        key = yield from source.text()
        yield from source.expect([":"])
    else:
        quoted = yield from source.took(GEMMA_QUOTE)
        heard: list[str] = []
        if not (yield from source.until([f"{GEMMA_QUOTE}:" if quoted else ":"], heard.append)):
            raise NotACallError
        key = "".join(heard)
    return json.dumps(key, ensure_ascii=False)


def python_key(source: Source) -> Steps[str]:
    """Read the name of an argument and its equals sign, and return the name as JSON."""
    yield from source.space()
    heard: list[str] = []
    if not (yield from source.until(["="], heard.append)) or not "".join(heard).strip().isidentifier():
        raise NotACallError
    return json.dumps("".join(heard).strip(), ensure_ascii=False)
