"""Outputs that survive: whenever a run ends, going on gives what an uninterrupted run gives."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from abcli.batch import writing
from abcli.batch.jobs import BadLine, Result
from abcli.batch.reading import InputParts, JobReader
from abcli.batch.sidecar import sidecar_path
from abcli.batch.writing import OutputFile, journal_path, open_output
from abcli.errors import BatchError
from abcli.sampling import GenerationConfig, SamplingConfig
from tests.batch.outputs import KINDS, RESULTS, content, files, opened, run

kinds = pytest.mark.parametrize(("ordered", "format", "suffix"), KINDS)


@pytest.fixture(autouse=True)
def synced(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of a file whenever one was synced; real syncing takes minutes here, and is of no use to the killed."""
    monkeypatch.setattr(writing.time, "time", lambda: 1_700_000_000.0)
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: sizes.append(os.fstat(descriptor).st_size))
    return sizes


@kinds
def test_a_whole_run(tmp_path: Path, ordered: bool, format: Any, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    options: dict[str, Any] = {"ordered": ordered, "format": format}
    assert run(path, **options) == [2, 1, 5, 4]
    assert files(tmp_path) == {path.name, f"{path.name}.abcli.json"}
    lines = content(path).splitlines()
    if format == "text":
        assert lines == ["fürst".encode(), rb"second\nanswer", b"", b""]
    elif format == "jsonl":
        numbers = [json.loads(line)["line"] for line in lines]
        assert numbers == ([1, 2, 4, 5] if ordered else [2, 1, 5, 4])
    before = path.read_bytes()
    with opened(path, **options) as again:
        assert again.complete
        assert again.is_done(BadLine(3, 5, None, "not JSON"))
    assert run(path, **options) == []
    assert path.read_bytes() == before


def test_text_blocks(tmp_path: Path) -> None:
    path = tmp_path / "out"
    run(path, format="text", separator="---")
    assert path.read_text() == "fürst\n---\nsecond\nanswer\n---\n\n---\n\n---\n"


@pytest.mark.parametrize(
    ("ordered", "format", "suffix", "step"),
    # The journals of all kinds are alike.
    [(*kind, step) for kind, step in zip(KINDS, (1, 7, 1, 13, 13, 13), strict=True)],
)
def test_a_run_that_was_cut_at_any_byte_is_continued(
    tmp_path: Path, ordered: bool, format: Any, suffix: str, step: int
) -> None:
    options: dict[str, Any] = {"ordered": ordered, "format": format}
    reference = tmp_path / f"reference{suffix}"
    some = RESULTS[1:3]
    run(reference, some, **options)
    path = tmp_path / f"out{suffix}"
    with opened(path, **options) as output:
        for result in some:
            output.write(result)
    kept = journal_path(path) if journal_path(path).exists() else path
    whole, header = kept.read_bytes(), sidecar_path(path).read_bytes()
    for cut in [*range(0, len(whole), step), len(whole)]:
        path.unlink(missing_ok=True)
        kept.write_bytes(whole[:cut])
        sidecar_path(path).write_bytes(header)
        finished = whole[:cut].count(b"\n")
        with opened(path, **options) as output:
            assert output.done == {result.line for result in some[:finished]}
            assert output.resumed == (cut > 0)
            for result in some:
                output.write(result)  # those that are there are ignored
            output.finish()
        assert path.read_bytes() == reference.read_bytes()
        assert kept == path or not kept.exists()


@kinds
def test_a_kill_between_the_last_steps_is_repaired(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ordered: bool, format: Any, suffix: str
) -> None:
    options: dict[str, Any] = {"ordered": ordered, "format": format}
    reference = tmp_path / f"reference{suffix}"
    run(reference, **options)
    for step in ("publish", "write_header", "unlink"):
        path = tmp_path / f"{step}{suffix}"
        with opened(path, **options) as output:
            for result in RESULTS:
                output.write(result)
            with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):

                def killed(*_: Any, **__: Any) -> None:
                    raise KeyboardInterrupt

                patch.setattr(Path if step == "unlink" else writing, step, killed)
                output.finish()
        assert run(path, **options) == []
        assert path.read_bytes() == reference.read_bytes()
        assert not journal_path(path).exists()


def test_results_reach_the_disk_each_second_and_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, synced: list[int]
) -> None:
    now = 100.0
    monkeypatch.setattr(writing.time, "monotonic", lambda: now)
    output = opened(tmp_path / "out")
    synced.clear()
    sizes = []
    for step in (0.0, 0.5, 0.6, 0.1):
        now += step
        output.write(RESULTS[len(sizes)])
        sizes.append((tmp_path / "out").stat().st_size)
    assert synced == [sizes[0], sizes[2]]
    output.close()
    assert synced == [sizes[0], sizes[2], sizes[3]]


def test_nothing_is_lost_if_the_process_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "out"
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from abcli.batch.jobs import Result\n"
        "from abcli.batch.writing import open_output\n"
        "output = open_output(Path(sys.argv[1]), {}, input_digest='d', seed=1)\n"
        "for line in range(1, 21):\n"
        "    output.write(Result(line - 1, line, str(line), 'text', 'stop'))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    with open_output(path, {}, input_digest="d", seed=1) as output:
        assert output.done == set(range(1, 21))


def test_an_interrupt_between_a_write_and_its_account_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out"
    with opened(path) as output:
        output.write(RESULTS[0])
        real = os.write

        def interrupted(descriptor: int, data: Any) -> int:
            real(descriptor, bytes(data)[:11])
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", interrupted)
            with pytest.raises(KeyboardInterrupt):
                output.write(RESULTS[1])
        for result in RESULTS:
            output.write(result)
        output.finish()
    assert [json.loads(line)["line"] for line in path.read_bytes().splitlines()] == [2, 1, 5, 4]


def test_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    for ordered, expected in ((False, [2, 1, 5, 4]), (True, [1, 2, 4, 5])):
        stdout = io.TextIOWrapper(io.BytesIO())
        monkeypatch.setattr(sys, "stdout", stdout)
        with opened(Path("-"), ordered=ordered, seed=-1) as output:
            for number, result in enumerate(RESULTS):
                output.write(result)
                seen = stdout.buffer.getvalue().count(b"\n")  # type: ignore[attr-defined]
                assert seen == ([0, 2, 2, 4][number] if ordered else number + 1)
            output.finish()
        assert output.seed >= 0
        lines = stdout.buffer.getvalue().splitlines()  # type: ignore[attr-defined]
        assert [json.loads(line)["line"] for line in lines] == expected


def test_an_interrupted_ordered_stream_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", stdout)
    with opened(None, ordered=True, shard=(2, 2)) as output:
        output.write(RESULTS[2])
        assert stdout.buffer.getvalue() == b""  # type: ignore[attr-defined]
    assert json.loads(stdout.buffer.getvalue())["line"] == 5  # type: ignore[attr-defined]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_device() -> None:
    with pytest.raises(BatchError, match="No space left"), opened(Path("/dev/full")) as output:
        output.write(RESULTS[0])


def test_a_reader_that_leaves_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end, start = os.pipe()
    os.close(end)
    with os.fdopen(start, "wb", 0) as writer:
        monkeypatch.setattr(sys, "stdout", type("Stdout", (), {"buffer": writer}))
        output = opened(None)
        with pytest.raises(BrokenPipeError):
            output.write(RESULTS[0])


def test_answers_in_text_can_be_prompts_again(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with opened(path, format="text", separator="---") as output:
        for line in range(1, 4):
            output.write(Result(line - 1, line, str(line), f"line {line}\n\nmore", "stop"))
        output.finish()
    found = list(JobReader(path, InputParts(separator="---"), GenerationConfig(SamplingConfig())))
    assert [job.messages[0].content for job in found] == [  # type: ignore[union-attr]
        f"line {line}\n\nmore" for line in range(1, 4)
    ]


def test_the_file_is_made_for_everyone_the_user_allows(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        run(tmp_path / "direct")
        run(tmp_path / "ordered", ordered=True)
    finally:
        os.umask(before)
    assert {(tmp_path / name).stat().st_mode & 0o777 for name in ("direct", "ordered")} == {0o644}


def test_the_type_is_what_the_output_is(tmp_path: Path) -> None:
    with opened(tmp_path / "out") as output:
        assert isinstance(output, OutputFile)
