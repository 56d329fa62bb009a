"""Puts the outputs of all shards of a batch together."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from abcli.batch.compression import check_available, compression_of, read_chunks
from abcli.batch.shapes import OUTPUT_FORMATS, OutputFormat, line_of
from abcli.batch.sidecar import Header, find_differences, read_header, write_header
from abcli.batch.writing import lock_output, publish, reporting
from abcli.errors import BatchError, UsageError


def merge_outputs(paths: Sequence[Path], output: Path, *, restart: bool = False) -> int:
    """Write the results of all shards of one batch to `output`, in the order of the input; returns their number.

    The shards' files stay. `output` is then that of a complete run without shards. Raises UsageError for outputs that
    do not belong together, are text (which does not say what it answers), or if `output` is there already and
    `restart` is off; BatchError for shards that are missing, incomplete or damaged, or if writing fails.
    """
    if not paths:
        raise UsageError("there is nothing to merge", "name the output of every shard")
    check_available(output)
    headers = [_header(path) for path in paths]
    format = _check_together(paths, headers)
    if not output.parent.is_dir():
        raise BatchError(f"cannot write {output}: there is no directory {output.parent}", "make it first")
    if output.exists() and any(output.samefile(path) for path in paths):
        raise UsageError(f"the output {output} is one of the shards", "choose another name")
    if output.exists() and not restart:
        raise UsageError(f"{output} exists already", "choose another name, or use `restart` to replace it")
    with ExitStack() as stack:
        lock_output(output, stack)
        stack.enter_context(reporting("write", output))
        spool: IO[bytes] = stack.enter_context(tempfile.TemporaryFile(dir=output.parent))
        places = _collect(paths, headers, format, spool)
        publish(output, _in_order(spool, places))
        settings = {**headers[0].settings, "shard": None}
        size = output.stat().st_size
        write_header(output, replace(headers[0], settings=settings, results=len(places), size=size))
    return len(places)


def _header(path: Path) -> Header:
    with reporting("read", path, "check the name and the permissions"):
        path.stat()
        header = read_header(path)
    if header is None:
        raise UsageError(f"{path} has no record of a batch beside it", "name files that abcli batch has written")
    if header.results is None:
        raise BatchError(f"{path} is not complete", "run its shard again to continue it")
    return header


def _check_together(paths: Sequence[Path], headers: Sequence[Header]) -> OutputFormat:
    """The shards' common format. Raises UsageError or BatchError unless they are all shards of one batch."""
    first = _unsharded(headers[0])
    owners: dict[str, Path] = {}
    for path, header in zip(paths, headers, strict=True):
        differences = find_differences(first, _unsharded(header))
        if differences:
            raise UsageError(
                f"{path} and {paths[0]} were made with other settings: {differences[0]}", "run one of them again"
            )
        shard = str(header.settings.get("shard"))
        if "/" not in shard:
            raise UsageError(f"{path} is no shard but a whole output", "merge only outputs of `shard` I/N")
        if shard in owners:
            raise UsageError(f"{path} and {owners[shard]} are the same shard, {shard}", "name each shard once")
        owners[shard] = path
    counts = {shard.partition("/")[2] for shard in owners}
    if len(counts) > 1:
        raise UsageError(f"the shards are of different divisions: {', '.join(sorted(owners))}", "use one N for all")
    (count,) = counts
    missing = [f"{part}/{count}" for part in range(1, int(count) + 1) if f"{part}/{count}" not in owners]
    if missing:
        shown = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        raise BatchError(
            f"not all shards are named: {shown} {'is' if len(missing) == 1 else 'are'} missing", "add them"
        )
    format = first.get("output_format")
    for known in OUTPUT_FORMATS:
        if format == known != "text":
            return known
    raise UsageError(f"outputs of the format {format!r} cannot be merged", "use `output_format=jsonl` for shards")


def _unsharded(header: Header) -> Mapping[str, Any]:
    return {name: value for name, value in header.settings.items() if name != "shard"}


def _collect(
    paths: Sequence[Path], headers: Sequence[Header], format: OutputFormat, spool: IO[bytes]
) -> dict[int, tuple[int, int]]:
    """Copy all results into `spool`: {line of the input: (offset, bytes)}. Raises BatchError for damage."""
    places: dict[int, tuple[int, int]] = {}
    owners: dict[int, int] = {}
    offset = 0
    for at, (path, header) in enumerate(zip(paths, headers, strict=True)):
        count = 0
        for data in _lines(path):
            count += 1
            try:
                line = line_of(format, data)
            except (ValueError, RecursionError):
                raise BatchError(f"line {count} of {path} is not a result", "run its shard again") from None
            if line in places:
                raise BatchError(
                    f"{path} has a second result for line {line}; the first is in {paths[owners[line]]}",
                    "run the shards again with `restart`",
                )
            places[line], owners[line] = (offset, len(data)), at
            spool.write(data)
            offset += len(data)
        if count != header.results:
            raise BatchError(
                f"{path} has {count:,} of {header.results:,} results", "run its shard again to continue it"
            )
    return places


def _lines(path: Path) -> Iterator[bytes]:
    rest = b""
    with path.open("rb") as file:
        for chunk in read_chunks(file, str(path), compression_of(path)):
            *whole, rest = (rest + chunk).split(b"\n")
            yield from (data + b"\n" for data in whole)
    if rest:
        raise BatchError(f"the last line of {path} is torn", "run its shard again to continue it")


def _in_order(spool: IO[bytes], places: Mapping[int, tuple[int, int]]) -> Iterator[bytes]:
    for _, (offset, size) in sorted(places.items()):
        spool.seek(offset)
        yield spool.read(size)
