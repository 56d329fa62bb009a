"""Outputs that cannot be continued or written: clear errors, and what was finished stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from abcli.batch import writing
from abcli.batch.sidecar import read_header, sidecar_path
from abcli.batch.writing import journal_path
from abcli.errors import BatchError, UsageError
from tests.batch.outputs import RESULTS, SETTINGS, files, opened, run


@pytest.fixture(autouse=True)
def no_syncing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk would be most of the time these tests take."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_other_settings_are_refused_with_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with opened(path) as output:
        output.write(RESULTS[0])
    before = path.read_bytes()
    changed: list[tuple[dict[str, Any], dict[str, Any], str]] = [
        ({**SETTINGS, "temperature": 0.5}, {}, "temperature: 0.8 -> 0.5"),
        ({**SETTINGS, "bases": [1.0]}, {}, "bases: [1.0, 2.0] -> [1.0]"),
        ({**SETTINGS, "grammar": "x" * 500}, {}, "grammar: none -> "),
        (SETTINGS, {"input_digest": "d2"}, 'input: "d1" -> "d2"'),
        (SETTINGS, {"seed": -1}, "seed: 7 -> none"),
        (SETTINGS, {"ordered": True}, "ordered: false -> true"),
        (SETTINGS, {"format": "openai"}, 'output_format: "jsonl" -> "openai"'),
        (SETTINGS, {"shard": (1, 2)}, 'shard: none -> "1/2"'),
        ({**SETTINGS, "new": 1}, {}, "new: none -> 1"),
    ]
    for settings, options, words in changed:
        with pytest.raises(UsageError) as caught:
            opened(path, settings, **options)
        assert f"\n  {words}" in caught.value.message
        assert "`restart`" in caught.value.hint
        assert len(caught.value.message) < 600
    assert path.read_bytes() == before
    with opened(path, {**SETTINGS, "temperature": 0.5}, restart=True) as output:
        assert output.done == frozenset()
        assert not output.resumed
    assert path.read_bytes() == b""
    # Where there are no results, none are protected.
    opened(path).close()


def test_settings_are_compared_as_json_has_them(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with opened(path, {"bases": (1.0, 2.0), "bias": ((5, -float("inf")),)}) as output:
        output.write(RESULTS[0])
    with opened(path, {"bases": [1.0, 2.0], "bias": [[5, -float("inf")]]}) as output:
        assert output.resumed


def test_a_drawn_seed_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with opened(path, seed=-1) as output:
        first = output.seed
        output.write(RESULTS[0])
    with opened(path, seed=-1) as output:
        assert output.seed == first >= 0
    with opened(path, seed=-1, restart=True) as output:
        assert output.seed != first


def test_what_is_not_ours_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "letters.txt"
    path.write_text("Dear friend,\n")
    with pytest.raises(UsageError, match="says what it belongs to"):
        opened(path)
    with pytest.raises(UsageError, match="is the input"):
        opened(path, source=path)
    with pytest.raises(UsageError, match="directory"):
        opened(tmp_path)
    assert path.read_text() == "Dear friend,\n"
    link = tmp_path / "link"
    link.symlink_to(path)
    run(link, restart=True)
    assert link.is_symlink()
    assert files(tmp_path) == {"letters.txt", "link", "letters.txt.abcli.json"}


def test_an_input_that_is_gone_cannot_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with opened(path, input_digest=None) as output:
        output.write(RESULTS[0])
    with pytest.raises(UsageError, match="cannot be read again"):
        opened(path, input_digest=None)
    assert len(run(path, input_digest=None, restart=True)) == 4


def test_edited_outputs(tmp_path: Path) -> None:
    path = tmp_path / "out"
    run(path)
    lines = path.read_bytes().splitlines(keepends=True)
    # A user may delete results to have them computed again.
    path.write_bytes(b"".join(lines[:2] + lines[3:]))
    with opened(path) as output:
        assert not output.complete
    assert run(path) == [5]
    path.write_bytes(b"".join([lines[0], b"nonsense\n", lines[2]]))
    with pytest.raises(BatchError, match="line 2 of"):
        opened(path)
    ordered = tmp_path / "ordered"
    run(ordered, ordered=True)
    ordered.write_bytes(b"".join(lines[:2]))
    with pytest.raises(BatchError, match="has been changed since"):
        opened(ordered, ordered=True)
    assert len(run(ordered, ordered=True, restart=True)) == 4


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b'{"abcli_batch": 2}', b"\xff", b'{"abcli_batch": 1, "a": 2}'])
def test_a_damaged_header_is_refused(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "out"
    run(path)
    sidecar_path(path).write_bytes(damage)
    with pytest.raises(BatchError, match="damaged"):
        opened(path)
    assert len(run(path, restart=True)) == 4


def test_a_missing_journal_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "out"
    run(path, ordered=True)
    header = read_header(path)
    assert header is not None
    writing.write_header(path, replace(header, results=None))
    with pytest.raises(BatchError, match="journal is missing"):
        opened(path, ordered=True)


def test_one_process_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out"
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from abcli.batch.writing import open_output\n"
        "from abcli.errors import BatchError\n"
        "try:\n"
        "    open_output(Path(sys.argv[1]), {}, input_digest='d', restart=True)\n"
        "except BatchError as error:\n"
        "    print(error.message)\n"
    )
    with opened(path) as output:
        output.write(RESULTS[0])
        done = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
        assert "another process is writing" in done.stdout
        assert path.read_bytes()
    with opened(path) as output:
        assert output.done == {2}


@pytest.fixture
def small_disk() -> Iterator[Any]:
    """Sets how large a file may become; beyond that a write fails as on a full disk."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("ordered", [False, True])
def test_a_full_disk_costs_only_what_did_not_fit(tmp_path: Path, small_disk: Any, ordered: bool) -> None:
    path = tmp_path / "out"
    output = opened(path, ordered=ordered)
    output.write(RESULTS[0])
    kept = journal_path(path) if ordered else path
    before = kept.read_bytes()
    small_disk(len(before) + 30)
    with pytest.raises(BatchError) as caught:
        output.write(RESULTS[1])
    assert str(kept) in caught.value.message
    assert f"1 results are safe in {kept}" in caught.value.hint
    assert kept.read_bytes() == before
    small_disk(1 << 30)
    output.close()
    assert run(path, ordered=ordered) == [1, 5, 4]


def test_a_disk_that_is_full_at_the_end_keeps_the_journal(tmp_path: Path, small_disk: Any) -> None:
    path = tmp_path / "out"
    with opened(path, format="text") as output:
        for result in RESULTS:
            output.write(result)
        small_disk(10)
        with pytest.raises(BatchError, match="cannot write"):
            output.finish()
        small_disk(1 << 30)
    assert not path.exists()
    assert files(tmp_path) == {"out.abcli.journal", "out.abcli.json"}
    assert run(path, format="text") == []
    assert path.read_text().startswith("fürst\n")


def test_a_vanished_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(BatchError, match="no directory"):
        opened(folder / "missing" / "out")
    for ordered in (False, True):
        folder.mkdir(exist_ok=True)
        output = opened(folder / "out", ordered=ordered)
        output.write(RESULTS[0])
        shutil.rmtree(folder)
        with pytest.raises(BatchError, match="deleted") as caught:
            output.write(RESULTS[1])
        assert "anew" in caught.value.hint
        with pytest.raises(BatchError):
            output.finish()
        output.close()
