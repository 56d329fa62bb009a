"""`abcli verify`: a line per check, the exit code, checksums from every source."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abcli.config import DEFAULT_MODEL_FILE
from abcli.hub.catalogue import known_models
from tests.cli.conftest import Command
from tests.support.tiny_gguf import write_tiny_model


def report(abcli: Command, *arguments: object, code: int = 0) -> dict[str, dict[str, Any]]:
    """The checks of --json by name."""
    outcome = abcli("verify", "--json", *arguments)
    assert outcome.code == code
    found = json.loads(outcome.output)
    assert found["sound"] == (code == 0)
    return {check["name"]: check for check in found["checks"]}


def test_a_sound_model_passes_with_a_trial(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("verify", tiny_model)
    assert outcome.code == 0
    lines = outcome.text.splitlines()
    assert len(lines) == 14
    assert all(line.startswith("ok ") for line in lines)
    assert "llama.cpp loads it" in lines[-1]


def test_a_checksum_is_compared(tiny_model: Path, abcli: Command) -> None:
    digest = hashlib.sha256(tiny_model.read_bytes()).hexdigest()
    name = f"sha-256 of {tiny_model.name}"
    flags = (tiny_model, "--no-trial", "--sha256")
    assert report(abcli, *flags, digest.upper())[name]["detail"] == f"{digest}, as expected"
    checks = report(abcli, *flags, "0" * 64, code=1)
    wrong = checks[name]
    assert checks["weights"]["status"] == "ok"
    assert wrong["status"] == "failed"
    assert digest in wrong["detail"]
    assert abcli("verify", *flags, "123").code == 2


def test_the_hubs_cache_knows_the_checksum(tmp_path: Path, abcli: Command) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    source = write_tiny_model(tmp_path / "source.gguf")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    for name, expected in ((digest, 0), ("f" * 64, 1)):
        (blobs / name).write_bytes(source.read_bytes())
        link = tmp_path / f"{expected}.gguf"
        link.symlink_to(blobs / name)
        status = report(abcli, link, "--no-trial", code=expected)[f"sha-256 of {link.name}"]["status"]
        assert status == ("failed" if expected else "ok")


def test_a_file_of_the_catalogue_is_recognised_and_its_name_alone_proves_nothing(
    tmp_path: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_model(tmp_path / "gemma-3-1b-it-Q4_K_M.gguf")
    name = f"sha-256 of {path.name}"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    # Another publisher's file of that name is as good as any.
    assert report(abcli, path, "--no-trial")[name]["detail"] == f"{digest} (nothing to compare it with)"
    known = {
        entry: replace(model, sha256=digest) for entry, model in known_models().items() if entry == "gemma-3-1b-it"
    }
    monkeypatch.setattr("abcli.cli.verify.known_models", lambda: known)
    assert report(abcli, path, "--no-trial")[name]["detail"] == f"{digest} (the gemma-3-1b-it that abcli knows)"


def test_the_default_model_is_known_by_its_name(tmp_path: Path, abcli: Command) -> None:
    path = write_tiny_model(tmp_path / DEFAULT_MODEL_FILE)
    wrong = report(abcli, path, "--no-trial", code=1)[f"sha-256 of {path.name}"]
    assert wrong["status"] == "failed"


def test_damage_in_the_weights_is_found(tmp_path: Path, abcli: Command) -> None:
    bad = np.full((64, 64), np.nan, np.float32)
    path = write_tiny_model(tmp_path / "m.gguf", tensors={"blk.0.attn_q.weight": bad})
    outcome = abcli("verify", path)
    assert outcome.code == 1
    assert "there are NaN or infinite numbers in blk.0.attn_q.weight (4,096)" in outcome.text
    assert "skipped trial" in outcome.text
    assert "hint: " in outcome.text


def test_a_template_that_is_broken(tmp_path: Path, abcli: Command) -> None:
    path = write_tiny_model(tmp_path / "m.gguf", chat_template="{% if %}")
    assert report(abcli, path, "--no-trial", code=1)["chat template"]["status"] == "failed"


@pytest.mark.parametrize("content", [b"", b"GGUF", b"<html>", b"GGUF\x03\0\0\0" + b"\xff" * 16])
def test_a_file_that_is_no_model(tmp_path: Path, abcli: Command, content: bytes) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    checks = report(abcli, path, code=1)
    assert checks["header"]["status"] == "failed"
    assert checks["trial"]["status"] == checks["weights"]["status"] == "skipped"


def test_a_file_that_is_missing(tmp_path: Path, abcli: Command) -> None:
    checks = report(abcli, tmp_path / "m.gguf", code=1)
    assert "there is no file" in checks["file"]["detail"]
