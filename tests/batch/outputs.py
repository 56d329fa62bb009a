"""Results for the tests, and runs that write them."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zstandard

from abcli.batch.jobs import BadLine, Result
from abcli.batch.sidecar import describe_generation
from abcli.batch.writing import Output, open_output
from abcli.sampling import GenerationConfig

SETTINGS = {"model": "fingerprint", "bases": [1.0, 2.0], **describe_generation(GenerationConfig())}
# Out of order, as a run with many slots writes them.
RESULTS = [
    Result(1, 2, "b", "second\nanswer", "stop", 5, 3, 2),
    Result(0, 1, "a", "fürst", "length", 4, 3, 2),
    BadLine(3, 5, None, "not JSON", "write JSON").result(),
    Result(2, 4, "c", "", "stop", 6, 3, 0),
]
# Ordered, format, suffix: the first two are written directly, the others by way of a journal.
KINDS = [
    (False, "jsonl", ""),
    (False, "openai", ""),
    (True, "jsonl", ""),
    (False, "text", ""),
    (False, "jsonl", ".gz"),
    (True, "openai", ".zst"),
]


def opened(path: Path | None, settings: dict[str, Any] = SETTINGS, **options: Any) -> Output:
    return open_output(path, settings, **{"input_digest": "d1", "seed": 7, **options})


def content(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    return zstandard.ZstdDecompressor().decompressobj().decompress(data) if path.suffix == ".zst" else data


def run(path: Path, results: Sequence[Result] = RESULTS, **options: Any) -> list[int]:
    """A whole run that writes what is not there yet; returns what it wrote."""
    written = []
    with opened(path, **options) as output:
        for result in results:
            if result.line not in output.done and not output.complete:
                output.write(result)
                written.append(result.line)
        output.finish()
    return written


def files(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir() if not path.name.endswith(".lock")}
