"""The catalogue is sound, found wherever abcli is installed, and gives way to the user's own profiles."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import abcli.hub.catalogue as hub_catalogue
from abcli.config import DEFAULT_MODEL_FILE
from abcli.errors import ProfileError
from abcli.profiles import catalogue
from abcli.profiles.catalogue import catalogue_path, shipped
from abcli.profiles.lookup import default_profile, may_have_profile, named_profile
from abcli.profiles.profile import encode
from abcli.profiles.store import save
from tests.profiles.samples import FINGERPRINT, OTHER_FINGERPRINT, SAMPLE, profile
from tests.support.models import checked_model


def write(path: Path, *profiles: Any, size: int = 10) -> Path:
    entries = [
        {"name": "a", "size": size, "profiles": [json.loads(encode(one)) for one in profiles]},
        {"name": "b", "size": 20},
    ]
    path.write_text(json.dumps({"default": "a", "models": entries}), encoding="utf-8")
    return path


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """abcli's catalogue is one with the sample in it."""
    path = write(tmp_path / "catalogue.json", SAMPLE, profile("other", fingerprint=OTHER_FINGERPRINT))
    monkeypatch.setattr(catalogue, "catalogue_path", lambda: path)
    return path


def test_the_catalogue_is_sound(real_model: Path) -> None:
    content = json.loads(catalogue_path().read_text(encoding="utf-8"))
    names = [entry["name"] for entry in content["models"]]
    assert content["default"] in names
    assert max(Counter(names).values()) == 1
    for entry in content["models"]:
        assert entry["sha256"] is None or re.fullmatch(r"[0-9a-f]{64}", entry["sha256"])
        found = shipped(size=entry["size"])
        assert all(one.chosen == "" and one.model == entry["file"] for one in found)
        assert len({one.name for one in found}) == len(found)
    (default,) = [entry for entry in content["models"] if entry["name"] == content["default"]]
    assert default["file"] == DEFAULT_MODEL_FILE
    assert default["size"] == real_model.stat().st_size
    identity = checked_model(real_model).fingerprint
    assert all(one.fingerprint == identity for one in shipped(size=default["size"]))


def test_the_catalogue_of_an_installed_package_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_catalogue, "__file__", str(tmp_path / "abcli" / "hub" / "catalogue.py"))
    assert shipped() == []
    checkout, packaged = tmp_path / "models", tmp_path / "abcli" / "hub"
    for folder in (checkout, packaged):
        folder.mkdir(parents=True)
        write(folder / "catalogue.json", profile(model=folder.parent.name))
        assert [one.model for one in shipped()] == [folder.parent.name]


def test_size_limits_the_profiles(known: Path) -> None:
    assert len(shipped()) == len(shipped(size=10)) == 2
    assert shipped(size=20) == shipped(size=11) == []


def test_own_profiles_win(known: Path, tmp_path: Path) -> None:
    directory = tmp_path / "own"
    assert may_have_profile(directory, 10)
    assert not may_have_profile(directory, 11)
    assert default_profile(directory, FINGERPRINT, pytest.fail) == SAMPLE
    assert default_profile(directory, "0" * 64, pytest.fail) is None
    assert named_profile(directory, FINGERPRINT, SAMPLE.name, "m") == SAMPLE

    mine, same = profile("mine", created="2020-01-01T00:00:00+00:00"), profile(length=7)
    save(mine, directory)
    assert may_have_profile(directory, 11)
    assert default_profile(directory, FINGERPRINT, pytest.fail) == mine
    assert named_profile(directory, FINGERPRINT, SAMPLE.name, "m") == SAMPLE
    save(same, directory)
    assert named_profile(directory, FINGERPRINT, SAMPLE.name, "m") == same


def test_a_missing_name_lists_those_there_are(known: Path, tmp_path: Path) -> None:
    save(profile("mine"), tmp_path)
    save(profile("foreign", fingerprint=OTHER_FINGERPRINT), tmp_path)
    with pytest.raises(ProfileError) as caught:
        named_profile(tmp_path, FINGERPRINT, "x", "model.gguf")
    assert caught.value.message == "model.gguf has no profile 'x'"
    assert caught.value.hint == "there are: mine, needle-1024"
    with pytest.raises(ProfileError) as caught:
        named_profile(tmp_path, "0" * 64, "mine", "model.gguf")
    assert "abcli calibrate" in caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"models": 3}',
        '{"models": [3]}',
        '{"models": [{"name": "a", "profiles": []}]}',
        '{"models": [{"name": "a", "size": 1, "profiles": {}}]}',
        '{"models": [{"name": "a", "size": 1, "profiles": [{}]}]}',
        "[" * 100_000,
    ],
)
def test_a_damaged_catalogue(known: Path, tmp_path: Path, content: str) -> None:
    known.write_text(content, encoding="utf-8")
    with pytest.raises(ProfileError) as caught:
        shipped()
    assert str(known) in caught.value.message
    # What the user has calibrated does not depend on it.
    directory = tmp_path / "own"
    save(SAMPLE, directory)
    assert may_have_profile(directory, 1)
    assert default_profile(directory, FINGERPRINT, pytest.fail) == SAMPLE
    assert named_profile(directory, FINGERPRINT, SAMPLE.name, "m") == SAMPLE
