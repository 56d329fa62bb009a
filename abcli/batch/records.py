"""The input of a batch as records: lines, blocks of lines, JSON objects or rows of a table, one at a time."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from abcli.batch.compression import DamagedError
from abcli.chat.files import decode_prompt
from abcli.errors import AbcliError, PromptError, UsageError
from abcli.text import counted

MAX_LINE_BYTES = 1 << 24
_SPLIT_HINT = "split it, or put what all prompts share into `context`"


@dataclass(frozen=True)
class Line:
    """A line of the input, counted from 1, without its end; `problem` says why it cannot be read."""

    number: int
    data: bytes
    problem: AbcliError | None = None


@dataclass(frozen=True)
class Record:
    """What one prompt is made of, beginning at `line`: a text or named fields; None if there is a `problem`."""

    line: int
    value: str | Mapping[str, Any] | None
    problem: AbcliError | None = None


def split_lines(chunks: Iterable[bytes]) -> Iterator[Line]:
    """The lines of a stream of bytes, each held in memory alone; a damaged end becomes a last line with a problem."""
    number, size, parts = 1, 0, list[bytes]()
    try:
        for chunk in chunks:
            *whole, rest = chunk.split(b"\n")
            for part in whole:
                yield _line(number, size + len(part), [*parts, part])
                number, size, parts = number + 1, 0, []
            size += len(rest)
            if size > MAX_LINE_BYTES:
                parts = []
            elif rest:
                parts.append(rest)
    except DamagedError as error:
        # What came before the damage may be half a prompt.
        yield Line(number, b"", error)
        return
    if size:
        yield _line(number, size, parts)


def _line(number: int, size: int, parts: list[bytes]) -> Line:
    if size > MAX_LINE_BYTES:
        return Line(number, b"", PromptError(f"the line is longer than {MAX_LINE_BYTES >> 20} MiB", _SPLIT_HINT))
    return Line(number, b"".join(parts).removesuffix(b"\r"))


def text_records(lines: Iterable[Line]) -> Iterator[Record]:
    """Every line that is not blank, as text."""
    for line in lines:
        if line.problem is not None:
            yield Record(line.number, None, line.problem)
        elif line.data.strip():
            yield _decoded(line.number, line.data)


def block_records(lines: Iterable[Line], separator: str) -> Iterator[Record]:
    """Blocks of lines between lines that are `separator` (an empty one: blank lines), blank blocks left out.

    White space at the end of a separating line does not count, nor do blank lines around a block.
    """
    wanted = separator.rstrip().encode()
    block: list[Line] = []
    size = 0
    for line in lines:
        if line.problem is None and line.data.rstrip() == wanted:
            yield from _block(block, size)
            block, size = [], 0
        elif block or line.problem is not None or line.data.strip():
            size += len(line.data) + 1
            # Beyond the limit only what says so is kept: the first line, for its number.
            if size <= MAX_LINE_BYTES or not block:
                block.append(line)
            elif len(block) > 1 or line.problem is not None:
                block = [Line(block[0].number, b"", line.problem or block[0].problem)]
    yield from _block(block, size)


def _block(block: list[Line], size: int) -> Iterator[Record]:
    if not block:
        return
    number = block[0].number
    problem = next((line.problem for line in block if line.problem is not None), None)
    if problem is None and size > MAX_LINE_BYTES:
        problem = PromptError(f"the block is longer than {MAX_LINE_BYTES >> 20} MiB", _SPLIT_HINT)
    if problem is not None:
        yield Record(number, None, problem)
    else:
        yield _decoded(number, b"\n".join(line.data for line in block).rstrip())


def _decoded(number: int, data: bytes) -> Record:
    try:
        return Record(number, decode_prompt(data, "the line"))
    except PromptError as error:
        return Record(number, None, error)


def object_records(lines: Iterable[Line]) -> Iterator[Record]:
    """Every line that is not blank, as a JSON object."""
    for record in text_records(lines):
        if not isinstance(record.value, str):
            yield record
            continue
        try:
            yield Record(record.line, parse_object(record.value))
        except PromptError as error:
            yield Record(record.line, None, error)


def parse_object(text: str) -> dict[str, Any]:
    """A JSON object. Raises PromptError for anything else, a name given twice included."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise PromptError(
            f"the line is not JSON: {error.msg} at column {error.colno:,}", "write one JSON object per line"
        ) from None
    except (RecursionError, ValueError) as error:
        reason = "it nests too deep" if isinstance(error, RecursionError) else str(error)
        raise PromptError(f"the line is not usable JSON: {reason}"[:300], "write one JSON object per line") from None
    if not isinstance(value, dict):
        raise PromptError("the line is JSON, but not an object", 'write one like {"id": "1", "prompt": "..."}')
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return value


class TableReader:
    """The rows of comma-separated values (RFC 4180) below a header, each as a mapping from its names to texts."""

    def __init__(self, lines: Iterable[Line], *, tabs: bool = False) -> None:
        """Reads the header; tabs or semicolons separate where it has those, but no commas.

        Raises PromptError if it cannot be read or is not there, UsageError for names that are empty or repeated.
        """
        # Python's own limit for a field is 128 KiB.
        csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_BYTES))
        self._source = _TableLines(lines)
        header = self._source.peek()
        delimiter = "\t" if tabs else next((mark for mark in ",\t;" if mark in header), ",")
        self._rows = csv.reader(self._source, delimiter=delimiter, strict=True)
        first = self._next()
        if first is None:
            raise PromptError("the table is empty", "give it a line with the names of its columns")
        line, row, problem = first
        if problem is not None:
            raise PromptError(f"line {line}, the table's header: {problem.message}", problem.hint)
        self.names = tuple(name.strip() for name in row)
        if not all(self.names) or len(set(self.names)) < len(self.names):
            raise UsageError(
                f"the table's columns are called {', '.join(map(repr, self.names))}"[:300],
                "give each column a name of its own in the first line",
            )

    def __iter__(self) -> Iterator[Record]:
        while (found := self._next()) is not None:
            line, row, problem = found
            if problem is None and len(row) != len(self.names):
                problem = PromptError(
                    f"the row has {counted(len(row), 'field')}, but the header {len(self.names)}",
                    "put quotes around commas",
                )
            yield Record(line, None, problem) if problem else Record(line, dict(zip(self.names, row, strict=True)))

    def _next(self) -> tuple[int, list[str], AbcliError | None] | None:
        """The next row that is not blank: its first line, its fields and what is wrong with it."""
        while True:
            self._source.begin()
            row: list[str] = []
            problem: AbcliError | None = None
            try:
                row = next(self._rows)
            except StopIteration:
                return None
            except csv.Error as error:
                problem = PromptError(f"the line is not CSV: {error}", 'write " as "" within quotes, and close them')
            problem = self._source.problem or problem
            if problem is not None or any(cell.strip() for cell in row):
                return self._source.first, row, problem


class _TableLines:
    """Feeds csv.reader with text, and keeps what was wrong with a line: raising would end the reader."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self._lines = iter(lines)
        self._ahead: list[Line] = []
        self.begin()

    def begin(self) -> None:
        """A new row begins."""
        self.first = 0
        self.problem: AbcliError | None = None

    def peek(self) -> str:
        """The first line that is not blank, as text."""
        for line in self._lines:
            if line.problem is not None or line.data.strip():
                self._ahead.append(line)
                return line.data.decode("utf-8", "replace")
        return ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._ahead.pop() if self._ahead else next(self._lines)
        self.first = self.first or line.number
        try:
            if line.problem is not None:
                raise line.problem
            return decode_prompt(line.data, "the line") + "\n"
        except AbcliError as error:
            self.problem = self.problem or error
            return "\n"
