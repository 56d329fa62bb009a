"""Reads the prompts of a batch, whatever they are written in, one at a time."""

from __future__ import annotations

import hashlib
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

from abcli.batch import formats
from abcli.batch.compression import DamagedError, compression_of, plain_suffix, read_chunks
from abcli.batch.documents import read_document
from abcli.batch.jobs import BadLine, Job
from abcli.batch.records import (
    Line,
    Record,
    TableReader,
    block_records,
    object_records,
    parse_object,
    split_lines,
    text_records,
)
from abcli.batch.templates import Template, check_fields
from abcli.chat.files import refuse_foreign
from abcli.chat.options import ChatOptions
from abcli.errors import AbcliError, PromptError, UsageError
from abcli.grammar.check import check
from abcli.sampling import NATIVE_RANDOM_SEED, GenerationConfig

InputFormat = Literal["text", "jsonl", "openai", "csv"]

_ANY_VOCABULARY = 1 << 31
_TABLES = (".csv", ".tsv")
_OBJECTS = (".jsonl", ".ndjson", ".json")
_JSON: tuple[InputFormat, ...] = ("jsonl", "openai")
_DIGEST_BYTES = 1 << 20


@dataclass(frozen=True)
class InputParts:
    """What the prompts are made of, with the files that were named read.

    `separator` is the line between blocks of text (an empty one: blank lines). With a template the input is a table or
    JSON objects, whose fields it names. `context` comes before the first message of the user of every prompt, `system`
    is the system message of those without one. `shard` is (I, N), as in `in_shard`.
    """

    format: Literal["auto"] | InputFormat = "auto"
    separator: str | None = None
    template: Template | None = None
    context: str = ""
    system: str | None = None
    shard: tuple[int, int] | None = None


def seed_for(run_seed: int, identifier: str) -> int:
    """The seed of a line, 0 to 2^32 - 2: from the run's seed and the line's id, wherever the line stands."""
    digest = hashlib.blake2b(f"{run_seed}\n{identifier}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % NATIVE_RANDOM_SEED


def in_shard(index: int, shard: tuple[int, int] | None) -> bool:
    """Whether the job at `index` (from 0) belongs to shard (I, N), I from 1 to N; None is all."""
    return shard is None or index % shard[1] == shard[0] - 1


def parse_shard(text: str) -> tuple[int, int]:
    """ "I/N" as (I, N). Raises UsageError unless 1 <= I <= N."""
    part, _, whole = text.partition("/")
    if not (part.isdecimal() and whole.isdecimal() and len(whole) < 10 and 1 <= int(part) <= int(whole)):
        raise UsageError(f"`shard` {text!r} is not I/N", "use 1/4, 2/4, 3/4 and 4/4 for four shards")
    return int(part), int(whole)


def input_file(path: Path | None) -> Path | None:
    """The input's path, None if it is standard input (None or "-")."""
    return None if path is None or str(path) == "-" else path


def can_be_read_again(path: Path | None) -> bool:
    """Whether the input is a plain file, not standard input or another pipe. Raises PromptError if it is missing."""
    file = input_file(path)
    if file is None:
        return False
    try:
        return stat.S_ISREG(file.stat().st_mode)
    except (OSError, ValueError) as error:
        raise _unreadable(file, error) from None


def input_digest(path: Path | None) -> str | None:
    """SHA-256 (hex) of the file's bytes as they are on the disk; None for what cannot be read again.

    Raises PromptError if it cannot be read.
    """
    file = input_file(path)
    if file is None or not can_be_read_again(file):
        return None
    digest = hashlib.sha256()
    try:
        with file.open("rb") as opened:
            while chunk := opened.read(_DIGEST_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise _unreadable(file, error) from None
    return digest.hexdigest()


class JobReader(Iterator[Job | BadLine]):
    """The jobs and bad lines of an input, in its order; holds one line in memory, and 100 bytes for each id so far.

    Close it, or use it as a context manager, if it is not read to its end.
    """

    def __init__(
        self,
        path: Path | None,
        parts: InputParts,
        defaults: GenerationConfig,
        *,
        vocabulary_size: int = _ANY_VOCABULARY,
        options: ChatOptions | None = None,
        on_remark: Callable[[str], None] | None = None,
    ) -> None:
        """Open `path` (None or "-": standard input); gzip and zstd are recognised.

        `defaults` are the run's settings; with a run's seed from 0, each line without a seed of its own gets `seed_for`
        it. `vocabulary_size` bounds the tokens of a logit_bias; `options` are those of lines without their own.
        `on_remark` gets, once each, what is not enforced of the schemas.

        Raises PromptError for an input that cannot be read at all, UsageError for settings that do not go together; a
        line that cannot be used becomes a BadLine. BatchError is raised if reading fails later.
        """
        # Lines that do not choose a seed are told by -1.
        self._defaults = replace(defaults, sampling=replace(defaults.sampling, seed=-1))
        self._seed = defaults.sampling.seed
        self._parts = parts
        self._vocabulary_size = vocabulary_size
        self._options = options or ChatOptions()
        self._on_remark = on_remark
        self._remarks: set[str] = set()
        self._index = 0
        self._lines_of: dict[bytes, int] = {}
        self._stack = ExitStack()
        with ExitStack() as opening:
            opening.callback(self.close)
            records, self.format = _open(path, parts, self._stack)
            self._records = iter(records)
            opening.pop_all()

    format: InputFormat
    """What was recognised or named."""

    def close(self) -> None:
        """Close the file."""
        self._stack.close()

    def __enter__(self) -> JobReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __next__(self) -> Job | BadLine:
        record = next(self._records, None)
        if record is None:
            self.close()
            raise StopIteration
        index = self._index
        self._index += 1
        identifier: str | None = None
        extra: Mapping[str, Any] = {}
        try:
            if record.problem is not None:
                raise record.problem
            value = record.value if record.value is not None else ""
            identifier = self._identifier(value, record.line)
            extra = _kept_id(value)
            self._claim(identifier, record.line)
            request = self._request(value)
            messages = formats.with_shared_text(request.messages, self._parts.context, self._parts.system)
            generation = self._seeded(request.generation, identifier)
            self._remark(check(generation.sampling))
            extra = {**extra, **request.extra}
            return Job(index, record.line, identifier, messages, generation, request.options, extra)
        except AbcliError as error:
            return BadLine(index, record.line, identifier, error.message, error.hint, extra)

    def _remark(self, remarks: Sequence[str]) -> None:
        """Hand on what has not been said yet."""
        for remark in remarks:
            if remark not in self._remarks and self._on_remark is not None:
                self._on_remark(remark)
            self._remarks.add(remark)

    def _identifier(self, value: str | Mapping[str, Any], line: int) -> str:
        """The id of a record. Raises PromptError for one that is not possible."""
        name = "custom_id" if self.format == "openai" else "id"
        fields = {} if isinstance(value, str) or (self.format == "csv" and not value.get(name)) else value
        identifier = formats.find_identifier(fields, name)
        return str(line) if identifier is None else identifier

    def _claim(self, identifier: str, line: int) -> None:
        """Raise PromptError for an id that is not the first of its kind."""
        digest = hashlib.blake2b(identifier.encode(), digest_size=16).digest()
        first = self._lines_of.setdefault(digest, line)
        if first != line:
            shown = identifier if len(identifier) <= 80 else f"{identifier[:80]}..."
            raise PromptError(
                f"the id {shown!r} is that of line {first} already", "give every line an id of its own, or none at all"
            )

    def _request(self, value: str | Mapping[str, Any]) -> formats.Request:
        if isinstance(value, str):
            if self._parts.template is not None or self.format == "openai":
                raise PromptError("the item is a text, not an object", "make every item an object")
            return formats.text_request(value, self._defaults, self._options)
        if self._parts.template is not None:
            return formats.text_request(self._parts.template.fill(value), self._defaults, self._options)
        build = formats.openai_request if self.format == "openai" else formats.own_request
        return build(value, self._defaults, self._options, self._vocabulary_size)

    def _seeded(self, generation: GenerationConfig, identifier: str) -> GenerationConfig:
        if self._seed < 0 or generation.sampling.seed >= 0:
            return generation
        return replace(generation, sampling=replace(generation.sampling, seed=seed_for(self._seed, identifier)))


def _kept_id(value: str | Mapping[str, Any]) -> Mapping[str, Any]:
    """An id that is a number stays one in the result."""
    return {"id": value["id"]} if not isinstance(value, str) and isinstance(value.get("id"), int) else {}


def count_jobs(path: Path | None, parts: InputParts) -> int | None:
    """How many jobs and bad lines a `JobReader` finds, without looking into them; None for standard input and pipes.

    Raises what it raises.
    """
    if not can_be_read_again(path):
        return None
    with ExitStack() as stack:
        records, _ = _open(path, parts, stack, objects=False)
        return sum(1 for _ in records)


def _open(
    path: Path | None, parts: InputParts, stack: ExitStack, *, objects: bool = True
) -> tuple[Iterator[Record], InputFormat]:
    """The records of the input and its format; JSON stays text without `objects`. The file is left to `stack`."""
    format, separator, template = parts.format, parts.separator, parts.template
    named = input_file(path)
    name = str(named) if named is not None else "standard input"
    suffix = plain_suffix(named) if named is not None else ""
    file = stack.enter_context(_opened(named)) if named is not None else sys.stdin.buffer
    chunks = read_chunks(file, name, compression_of(named) if named is not None else None)
    if format in ("auto", *_JSON) and separator is None and suffix not in _TABLES:
        document, chunks = read_document(chunks, name, is_json=format != "auto" or suffix in _OBJECTS)
        if document is not None:
            value = document[0].value if document else None
            record = value if isinstance(value, Mapping) else None
            chosen = format if format != "auto" else _recognise(record, _OBJECTS[0], separator, template)
            _check_combination(chosen, separator, template)
            return iter(document), chosen
    first, lines = _peek(split_lines(chunks))
    if first is not None:
        _check_beginning(first, name)
    chosen = format if format != "auto" else _recognise(_object_of(first), suffix, separator, template)
    _check_combination(chosen, separator, template)
    if chosen == "csv" and template is not None:
        table = TableReader(lines, tabs=suffix == ".tsv")
        check_fields(template, table.names)
        return iter(table), chosen
    if chosen == "text":
        return block_records(lines, separator) if separator is not None else text_records(lines), chosen
    return object_records(lines) if objects else text_records(lines), chosen


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError | ValueError) -> PromptError:
    if isinstance(error, FileNotFoundError):
        return PromptError(f"there is no file {path}", "check the name")
    if isinstance(error, IsADirectoryError):
        return PromptError(f"{path} is a directory", "name one file")
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return PromptError(f"cannot read {path}: {reason}", "check the file and its permissions")


def _peek(lines: Iterator[Line]) -> tuple[Line | None, Iterator[Line]]:
    """The first line that is not blank, and all lines from it on."""
    for line in lines:
        if line.problem is not None or line.data.strip():
            return line, chain([line], lines)
    return None, iter(())


def _check_beginning(first: Line, name: str) -> None:
    """Raise PromptError for an input of which nothing can be read."""
    if isinstance(first.problem, DamagedError):
        raise first.problem
    refuse_foreign(first.data, name)


def _object_of(line: Line | None) -> Mapping[str, Any] | None:
    """The JSON object in a line, None if it is none."""
    if line is None or not line.data.lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
        return None
    try:
        return parse_object(line.data.decode("utf-8-sig"))
    except (PromptError, UnicodeDecodeError):
        return None


def _recognise(
    record: Mapping[str, Any] | None, suffix: str, separator: str | None, template: Template | None
) -> InputFormat:
    """The format of an input that begins with the object `record`, if any; text where nothing speaks for another."""
    if separator is not None:
        return "text"
    if template is not None:
        return "jsonl" if suffix not in _TABLES and (record is not None or suffix in _OBJECTS) else "csv"
    if record is not None and "custom_id" in record and "body" in record:
        return "openai"
    if suffix in _OBJECTS or (record is not None and ("prompt" in record or "messages" in record)):
        return "jsonl"
    return "csv" if suffix in _TABLES else "text"


def _check_combination(format: InputFormat, separator: str | None, template: Template | None) -> None:
    if separator is not None and format != "text":
        raise UsageError(f"`separator` is for text, but the input is {format}", "leave it out, or use `format=text`")
    if template is None and format == "csv":
        raise UsageError("a table makes prompts only by a template", "write one with {{column}} and give `template`")
    if template is not None and format not in ("csv", "jsonl"):
        raise UsageError(
            f"`template` fills in fields, but the input is {format}", "use `format` csv or jsonl, or leave it out"
        )
