"""Shards put together are what one run would have written, or are refused."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.batch.jobs import Result
from abcli.batch.merging import merge_outputs
from abcli.batch.reading import in_shard
from abcli.batch.sidecar import sidecar_path
from abcli.batch.writing import open_output
from abcli.errors import BatchError, UsageError


@pytest.fixture(autouse=True)
def no_syncing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk would be most of the time these tests take."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def results(count: int) -> list[Result]:
    return [Result(index, 2 * index + 1, f"id {index}", f"text {index}", "stop", seed=index) for index in range(count)]


def shard(
    path: Path, part: int, of: int, *, total: int = 7, values: Any = None, finish: bool = True, **options: Any
) -> Path:
    """The output of one shard, its results from the last to the first."""
    with open_output(path, values or {"model": "m"}, input_digest="d", seed=1, shard=(part, of), **options) as output:
        for result in reversed(results(total)):
            if in_shard(result.index, (part, of)):
                output.write(result)
        if finish:
            output.finish()
    return path


def lines(path: Path) -> list[int]:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line)["line"] for line in data.splitlines()]


@settings(deadline=None, max_examples=25)
@given(total=st.integers(0, 12), count=st.integers(1, 5), packed=st.booleans())
def test_all_shards_make_the_whole(
    tmp_path_factory: pytest.TempPathFactory, total: int, count: int, packed: bool
) -> None:
    place = tmp_path_factory.mktemp("merge")
    parts = [shard(place / f"part{part}{'.gz' * packed}", part, count, total=total) for part in range(count, 0, -1)]
    whole = place / "whole.gz"
    assert merge_outputs(parts, whole) == total
    assert lines(whole) == [result.line for result in results(total)]


def test_a_merged_output_is_that_of_a_complete_run(tmp_path: Path) -> None:
    parts = [shard(tmp_path / f"part{part}", part, 2) for part in (1, 2)]
    whole = tmp_path / "whole"
    merge_outputs(parts, whole)
    with open_output(whole, {"model": "m"}, input_digest="d", seed=1) as output:
        assert output.complete
        assert output.done == {result.line for result in results(7)}


def test_openai_lines_are_merged(tmp_path: Path) -> None:
    parts = [shard(tmp_path / f"part{part}", part, 2, format="openai") for part in (1, 2)]
    assert merge_outputs(parts, tmp_path / "whole") == 7
    ids = [json.loads(line)["custom_id"] for line in (tmp_path / "whole").read_text().splitlines()]
    assert ids == [result.identifier for result in results(7)]


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    first, second = (shard(tmp_path / f"part{part}", part, 2) for part in (1, 2))
    other = shard(tmp_path / "other", 2, 2, values={"model": "n"})
    third = shard(tmp_path / "third", 3, 3)
    unfinished = shard(tmp_path / "unfinished", 2, 2, finish=False)
    plain = tmp_path / "plain"
    plain.write_text("text\n")
    whole = tmp_path / "whole"
    with open_output(tmp_path / "alone", {"model": "m"}, input_digest="d", seed=1) as output:
        output.finish()
    texts = [shard(tmp_path / f"text{part}", part, 2, format="text") for part in (1, 2)]
    cases: list[tuple[list[Path], Path, type[Exception], str]] = [
        ([], whole, UsageError, "nothing to merge"),
        ([first], whole, BatchError, "2/2 is missing"),
        ([first, second, first], whole, UsageError, "are the same shard, 1/2"),
        ([first, other], whole, UsageError, 'model: "m" -> "n"'),
        ([first, third], whole, UsageError, "different divisions: 1/2, 3/3"),
        ([first, unfinished], whole, BatchError, "not complete"),
        ([first, plain], whole, UsageError, "no record of a batch"),
        ([first, tmp_path / "missing"], whole, BatchError, "cannot read"),
        ([tmp_path / "alone"], whole, UsageError, "no shard"),
        (texts, whole, UsageError, "'text' cannot be merged"),
        ([first, second], first, UsageError, "one of the shards"),
        ([first, second], plain, UsageError, "exists already"),
        ([first, second], tmp_path / "no" / "whole", BatchError, "no directory"),
    ]
    for paths, output_path, kind, words in cases:
        with pytest.raises(kind, match=words):
            merge_outputs(paths, output_path)
    assert not whole.exists()
    assert plain.read_text() == "text\n"
    merge_outputs([first, second], plain, restart=True)
    assert lines(plain) == [result.line for result in results(7)]


def test_damaged_shards_are_refused(tmp_path: Path) -> None:
    first, second = (shard(tmp_path / f"part{part}", part, 2) for part in (1, 2))
    whole = tmp_path / "whole"
    good = first.read_bytes()
    rows = good.splitlines(keepends=True)
    for damaged, words in (
        (b"".join(rows[:-1]), "has 3 of 4 results"),
        (good[:-1], "is torn"),
        (b"".join([*rows[:-1], b"{}\n"]), "line 4 of"),
        (good + rows[0], "second result for line"),
        (second.read_bytes() + rows[0], "second result for line"),
    ):
        first.write_bytes(damaged)
        with pytest.raises(BatchError, match=words):
            merge_outputs([first, second], whole)
    assert {path.name for path in tmp_path.iterdir() if "whole" in path.name and "lock" not in path.name} == set()
    first.write_bytes(good)
    sidecar_path(first).write_bytes(b"{")
    with pytest.raises(BatchError, match="damaged"):
        merge_outputs([first, second], whole)
