"""Writes the results of a batch so that none is lost or doubled, whenever the run ends.

JSON lines that are neither ordered nor compressed go straight into the output, one appended line each. All other
output is made in one piece when the run is complete; until then its results are in a journal beside it.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import secrets
import stat
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from filelock import FileLock, Timeout

from abcli.batch.appending import AppendedFile, scan
from abcli.batch.compression import check_available, compressing, compression_of
from abcli.batch.jobs import BadLine, Job, Result
from abcli.batch.shapes import OutputFormat, Shape, decode_entry, encode_entry, line_of
from abcli.batch.sidecar import (
    Header,
    check_same,
    describe_versions,
    plain,
    read_header,
    sidecar_path,
    write_header,
)
from abcli.errors import BatchError, UsageError
from abcli.sampling import NATIVE_RANDOM_SEED

_RESTART = "use `restart` to compute everything anew, or choose another output"


class Output:
    """Where results go; `open_output` makes one. Close it, or use it as a context manager."""

    seed: int
    """The run's seed: the one asked for, that of the interrupted run, or a drawn one."""
    done: frozenset[int]
    """The lines of the input whose results were there when it was opened; failed ones are results too."""
    complete: bool = False
    """Whether a former run has written every result, so that nothing is left to do."""
    resumed: bool = False
    """Whether it continues a former run."""

    def is_done(self, item: Job | BadLine) -> bool:
        """Whether a former run has written the result for `item`."""
        return self.complete or item.line in self.done

    def write(self, result: Result) -> None:
        """Keep a result: on return the end of this process cannot lose it. Raises BatchError."""
        raise NotImplementedError

    def finish(self) -> None:
        """All results are written: make the output what was asked for. Raises BatchError."""
        raise NotImplementedError

    def close(self) -> None:
        """Let go of the output; without `finish` it can be continued. Raises BatchError."""
        raise NotImplementedError

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(BatchError, BrokenPipeError):
                self.close()


def open_output(
    path: Path | None,
    settings: Mapping[str, Any],
    *,
    input_digest: str | None,
    format: OutputFormat = "jsonl",
    ordered: bool = False,
    separator: str | None = None,
    shard: tuple[int, int] | None = None,
    seed: int = -1,
    model: str = "",
    restart: bool = False,
    source: Path | None = None,
) -> Output:
    """Open `path` for results, or standard output for None or "-"; pipes and devices are written to as that is.

    `settings` are the names and JSON values that the results depend on besides the other arguments, which are
    added; `input_digest` is None for an input that cannot be read again. Text is always ordered. A `seed` below 0
    asks for a drawn one, `model` is the name for OpenAI's shape, `source` is the input file, which must be another.

    Raises UsageError for results there that do not belong to this run, BatchError for an output that is in use, is
    damaged or cannot be written.
    """
    ordered = ordered or format == "text"
    drawn = seed if seed >= 0 else secrets.randbelow(NATIVE_RANDOM_SEED)
    shape = Shape(format, model, int(time.time()), separator)
    if path is None or str(path) == "-":
        return OutputStream(sys.stdout.buffer, "standard output", shape, drawn, ordered=ordered, shard=shard)
    check_available(path)
    with reporting("open", path):
        path = path.resolve()
        mode = path.stat().st_mode if path.exists() else None
        if mode is not None and stat.S_ISDIR(mode):
            raise UsageError(f"the output {path} is a directory", "name a file")
        if mode is not None and source is not None and source.exists() and path.samefile(source):
            raise UsageError(f"the output {path} is the input", "choose another name")
        if mode is not None and not stat.S_ISREG(mode):
            return OutputStream(path.open("wb", 0), str(path), shape, drawn, ordered=ordered, shard=shard)
    if not path.parent.is_dir():
        raise BatchError(f"cannot open {path}: there is no directory {path.parent}", "make it first")
    bound = {
        **describe_versions(),
        **settings,
        "seed": seed if seed >= 0 else None,
        "input": input_digest,
        "shard": f"{shard[0]}/{shard[1]}" if shard else None,
        "output_format": format,
        "ordered": ordered,
        "output_separator": separator,
    }
    header = Header(plain(bound), drawn, shape.created)
    return OutputFile(path, header, shape, ordered=ordered, restart=restart)


class OutputStream(Output):
    """Results on standard output, a pipe or a device; ordered ones wait in memory for their turn."""

    def __init__(
        self, file: IO[bytes], name: str, shape: Shape, seed: int, *, ordered: bool, shard: tuple[int, int] | None
    ) -> None:
        """`shard` says which results there will be: in order, each has its turn."""
        self.seed = seed
        self.done = frozenset()
        self._file = file
        self._name = name
        self._shape = shape
        self._ordered = ordered
        self._next, self._step = (shard[0] - 1, shard[1]) if shard else (0, 1)
        self._waiting: list[tuple[int, bytes]] = []

    def write(self, result: Result) -> None:
        data = self._shape.encode(result)
        if not self._ordered:
            self._put(data)
            return
        heapq.heappush(self._waiting, (result.index, data))
        while self._waiting and self._waiting[0][0] <= self._next:
            self._put(heapq.heappop(self._waiting)[1])
            self._next += self._step

    def finish(self) -> None:
        waiting, self._waiting = sorted(self._waiting), []
        if waiting:
            self._put(b"".join(data for _, data in waiting))

    def close(self) -> None:
        """What still waits for its turn is written: nothing finished is lost."""
        self.finish()
        if self._file is not sys.stdout.buffer:
            with reporting("write", self._name):
                self._file.close()

    def _put(self, data: bytes) -> None:
        with reporting("write", self._name, "the results before it are written"):
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
            self._file.flush()


class OutputFile(Output):
    """Results in a file, with a header beside it that binds them to the run, and a lock."""

    def __init__(self, path: Path, header: Header, shape: Shape, *, ordered: bool, restart: bool) -> None:
        """Begin the output, or continue that of a former run with the same settings; see `open_output`."""
        self._path = path
        self._shape = shape
        self._ordered = ordered
        self._direct = shape.format != "text" and not ordered and compression_of(path) is None
        self._kept = path if self._direct else journal_path(path)
        self._file: AppendedFile | None = None
        self._stack = ExitStack()
        with ExitStack() as opening:
            opening.callback(self._stack.close)
            lock_output(path, self._stack)
            with reporting("open", path):
                self._header = self._begin(header, restart=restart)
                self._shape = replace(shape, created=self._header.created)
                self._open()
            opening.pop_all()
        self.seed = self._header.seed
        self.done = frozenset(self._places)

    def _line_of(self, data: bytes) -> int:
        return line_of(self._shape.format, data) if self._direct else decode_entry(data).line

    def _begin(self, header: Header, *, restart: bool) -> Header:
        """The header to go on with: the stored one if there is something to continue."""
        output, journal, sidecar = self._path, journal_path(self._path), sidecar_path(self._path)
        if restart:
            # The header goes last: until then it protects what is left.
            for old in (output, journal, sidecar):
                old.unlink(missing_ok=True)
        if not any(_holds_something(file) for file in (output, journal)):
            write_header(output, header)
            return header
        old_header = read_header(output)
        if old_header is None:
            raise UsageError(f"{output} exists, but no {sidecar.name} says what it belongs to", _RESTART)
        check_same(output, old_header.settings, header.settings)
        if header.settings["input"] is None:
            raise UsageError(
                f"{output} has results of an input that cannot be read again",
                f"standard input and pipes cannot be continued: {_RESTART}",
            )
        self.resumed = True
        return old_header

    def _open(self) -> None:
        self._places: dict[int, tuple[int, int]] = {}
        if not self._direct and self._header.results is not None and self._path.exists():
            if self._path.stat().st_size == self._header.size:
                # A run may have ended between its completion and this.
                self._kept.unlink(missing_ok=True)
                self.complete = True
                return
            raise BatchError(f"{self._path} was complete, but has been changed since", _RESTART)
        if not self._direct and _holds_something(self._path) and not self._kept.exists():
            raise BatchError(f"{self._path} cannot be continued: {self._kept} is missing", _RESTART)
        self._file = AppendedFile(self._kept)
        self._stack.callback(self._file.close)
        self._places, size = scan(self._kept, self._line_of)
        if size != self._file.size:
            self._file.cut(size)
        self.complete = self._header.results is not None and self._header.results == len(self._places)

    def write(self, result: Result) -> None:
        """A second result for the same line is ignored. Raises BatchError."""
        if result.line in self._places or self._file is None:
            return
        data = self._shape.encode(result) if self._direct else encode_entry(result)
        offset = self._file.size
        with reporting("write", self._kept, self._safe()):
            self._file.append(data)
        self._places[result.line] = (offset, len(data))

    def finish(self) -> None:
        if self._file is None:
            return
        with reporting("write", self._path, self._safe()):
            self._file.sync()
            if not self._direct:
                publish(self._path, self._shaped())
            size = self._path.stat().st_size
            write_header(self._path, replace(self._header, results=len(self._places), size=size))
            if not self._direct:
                self._file.close()
                self._kept.unlink(missing_ok=True)
        self.complete = True

    def close(self) -> None:
        with reporting("write", self._kept, self._safe()):
            self._stack.close()

    def _shaped(self) -> Iterator[bytes]:
        """The results in the journal as the output has them."""
        items = self._places.items()
        with self._kept.open("rb") as journal:
            for _, (offset, size) in sorted(items) if self._ordered else items:
                journal.seek(offset)
                yield self._shape.encode(decode_entry(journal.read(size)))

    def _safe(self) -> str:
        if not self._kept.exists():
            return "run the same command again to compute everything anew"
        return f"{len(self._places):,} results are safe in {self._kept}: run the same command again to continue"


def journal_path(output: Path) -> Path:
    """Where results are kept until `output` is made of them."""
    return output.with_name(f"{output.name}.abcli.journal")


def publish(path: Path, pieces: Iterable[bytes]) -> None:
    """Make `path` of `pieces`, compressed by its suffix; it is there whole or not at all. Raises OSError."""
    part = path.with_name(f".{path.name}.abcli.part")
    try:
        with part.open("wb") as file:
            with compressing(file, path) as packed:
                for piece in pieces:
                    packed.write(piece)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def lock_output(path: Path, stack: ExitStack) -> None:
    """Keep other processes from writing `path` until `stack` is closed. Raises BatchError if one does already."""
    lock = FileLock(path.with_name(f".{path.name}.abcli.lock"))
    try:
        with reporting("lock", path):
            lock.acquire(timeout=0)
    except Timeout:
        raise BatchError(
            f"another process is writing {path}", "wait for it, or choose another output; see `shard` for parts"
        ) from None
    stack.callback(lock.release)


@contextmanager
def reporting(
    what: str, path: Path | str, hint: str = "check its permissions and the space on its disk"
) -> Iterator[None]:
    """Turn an OSError into a BatchError, but for a broken pipe."""
    try:
        yield
    except (BrokenPipeError, Timeout):
        # The one who reads has enough, which is no error; a lock's holder is reported elsewhere.
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise BatchError(f"cannot {what} {path}: {reason}", hint) from error


def _holds_something(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0
