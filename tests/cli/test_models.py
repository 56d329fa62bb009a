"""`abcli models`: what is here is listed, removed and named; files of the user's are never touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abcli.config import DEFAULT_MODEL_FILE, profiles_directory
from abcli.gguf.check import check_file
from abcli.gguf.fingerprint import fingerprint
from abcli.hub.aliases import aliases
from abcli.hub.locate import locate_model
from abcli.profiles.store import save
from tests.cli.conftest import Command
from tests.cli.pseudo_terminal import PseudoTerminal
from tests.profiles.samples import profile
from tests.support.hub import HubStandIn, pointed_at
from tests.support.lora import random_lora, write_lora

NAME = "user/tiny-GGUF"
FILE = "tiny-Q4_K_M.gguf"
PARTS = ("big/big-Q8_0-00001-of-00002.gguf", "big/big-Q8_0-00002-of-00002.gguf")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder in which abcli looks for models of the user's."""
    path = tmp_path / "own"
    path.mkdir()
    monkeypatch.setattr("abcli.hub.locate.model_folders", lambda: (path,))
    monkeypatch.setattr("abcli.hub.listing.model_folders", lambda: (path,))
    return path


@pytest.fixture
def commits(abcli: Command, hub: HubStandIn, cache: Path, tiny_model: Path, folder: Path) -> tuple[str, str]:
    """Two commits of one repository in the cache, the older and the newer."""
    data = tiny_model.read_bytes()
    older = hub.add(NAME, {FILE: data, PARTS[0]: data, PARTS[1]: data[:50]})
    assert abcli("pull", NAME).code == 0
    newer = hub.add(NAME, {FILE: data, PARTS[0]: data, PARTS[1]: data[:50], "README.md": b""})
    for name in (NAME, f"{NAME}:Q8_0"):
        assert abcli("pull", name).code == 0
    return older, newer


def listed(abcli: Command) -> dict[str, Any]:
    outcome = abcli("models", "--json")
    assert outcome.code == 0
    return {model["name"]: model for model in json.loads(outcome.text)}


def test_an_empty_machine(abcli: Command, cache: Path, folder: Path) -> None:
    outcome = abcli("models")
    assert (outcome.code, outcome.output) == (0, b"")
    assert b"abcli pull" in outcome.errors
    assert abcli("models", "list", "--json").text == "[]"


def test_list_as_json(abcli: Command, commits: tuple[str, str], cache: Path, tiny_model: Path) -> None:
    older, newer = commits
    models = listed(abcli)
    assert models.keys() == {f"{NAME}:Q4_K_M", f"{NAME}:Q8_0", f"{NAME}@{older[:12]}:Q4_K_M"}
    assert models[f"{NAME}:Q4_K_M"] == {
        "name": f"{NAME}:Q4_K_M",
        "path": str(cache / "models--user--tiny-GGUF" / "snapshots" / newer / FILE),
        "files": 1,
        "size": tiny_model.stat().st_size,
        "quant": "Q4_K_M",
        "adapter": False,
        "architecture": "llama",
        "context": check_file(tiny_model)[0].trained_context,
        "native_base": check_file(tiny_model)[0].native_base,
        "source": {"kind": "hub", "repository": NAME, "file": FILE, "commit": newer, "refs": ["main"]},
        "profile": None,
        "aliases": [],
        "problem": None,
    }
    big = models[f"{NAME}:Q8_0"]
    assert (big["files"], big["size"]) == (2, tiny_model.stat().st_size + 50)
    assert models[f"{NAME}@{older[:12]}:Q4_K_M"]["source"]["refs"] == []
    # Every name that is shown leads to the file that it is shown for.
    assert all(str(locate_model(name)) == model["path"] for name, model in models.items())


def test_list_shows_files_profiles_aliases_and_damage(
    abcli: Command, cache: Path, folder: Path, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_model, folder / DEFAULT_MODEL_FILE)
    (folder / "damaged-Q5_0.gguf").write_bytes(b"GGUF")
    (folder / "mmproj-model.gguf").write_bytes(b"GGUF")
    (folder / "notes.txt").write_bytes(b"mine")
    lora = write_lora(folder / "style.gguf", random_lora(tiny_model))
    elsewhere = tmp_path / "elsewhere.gguf"
    shutil.copy(tiny_model, elsewhere)
    save(profile("calm", fingerprint=fingerprint(check_file(tiny_model))), profiles_directory())
    assert abcli("models", "alias", "far", str(elsewhere)).code == 0
    outcome = abcli("models")
    title, *rows = outcome.text.split("\n")
    assert title.split() == ["NAME", "SIZE", "QUANT", "CONTEXT", "BASE", "FROM", "PROFILE", "ALIAS"]
    words = {row.split()[0]: row.split()[1:] for row in rows}
    assert words.keys() == {"default", str(folder / "damaged-Q5_0.gguf"), str(lora), str(elsewhere)}
    assert words[str(lora)][2:] == ["F32", "-", "-", "file", "(LoRA)", "-", "-"]
    assert [model["adapter"] for model in json.loads(abcli("models", "--json").output)].count(True) == 1
    # The name of the default model says its quant; elsewhere the weights do.
    assert words["default"][2] == "Q4_1"
    assert words[str(elsewhere)][2] == "F32"
    assert words["default"][-3:] == ["file", "calm", "-"]
    assert words[str(elsewhere)][-3:] == ["file", "calm", "far"]
    assert words[str(folder / "damaged-Q5_0.gguf")] == ["4", "bytes", "Q5_0", "-", "-", "file", "-", "-"]
    assert outcome.errors.startswith(b"warning: ")
    assert b"damaged-Q5_0.gguf" in outcome.errors


def test_known_models_can_be_listed(abcli: Command) -> None:
    outcome = abcli("models", "known")
    assert outcome.code == 0
    names = [line.split()[0] for line in outcome.text.splitlines()[1:]]
    reports = json.loads(abcli("models", "known", "--json").text)
    assert [report["name"] for report in reports] == names
    assert all(report["licence"] for report in reports)


def test_rm_deletes_one_quant_and_keeps_the_rest(
    abcli: Command, hub: HubStandIn, commits: tuple[str, str], cache: Path
) -> None:
    _older, newer = commits
    repository = cache / "models--user--tiny-GGUF"
    blobs = len(list((repository / "blobs").iterdir()))
    outcome = abcli("models", "rm", f"{NAME}:q4_k_m", "--yes")
    assert outcome.code == 0
    # Its bytes are those of the first part of the other model, which still needs them.
    assert outcome.text == f"removed {NAME}:Q4_K_M, 0 bytes"
    assert outcome.errors.count(FILE.encode()) == 2
    assert listed(abcli).keys() == {f"{NAME}:Q8_0"}
    assert [path.name for path in (repository / "snapshots").iterdir()] == [newer]
    assert len(list((repository / "blobs").iterdir())) == blobs
    assert abcli("models", "rm", f"{NAME}:Q4_K_M", "--yes").code == 1

    size = sum(path.stat().st_size for path in (repository / "blobs").iterdir())
    outcome = abcli("models", "rm", NAME, "--yes")
    assert outcome.code == 0
    assert f"{size / 1000:.1f} kB" in outcome.text
    assert not repository.exists()
    # It can be fetched again.
    assert abcli("pull", NAME).code == 0
    assert listed(abcli).keys() == {f"{NAME}:Q4_K_M"}


def test_rm_is_not_stopped_by_the_broken_link_of_another_quant(
    abcli: Command, commits: tuple[str, str], cache: Path
) -> None:
    _older, newer = commits
    snapshot = cache / "models--user--tiny-GGUF" / "snapshots" / newer
    broken = next(path for path in snapshot.rglob("*.gguf") if path.name.endswith("00002-of-00002.gguf"))
    broken.resolve().unlink()
    outcome = abcli("models", "rm", f"{NAME}:Q4_K_M", "--yes")
    assert outcome.code == 0, outcome.errors
    assert outcome.text.startswith(f"removed {NAME}:Q4_K_M, ")
    assert not (snapshot / FILE).exists()
    assert not broken.is_symlink()


def test_rm_of_a_revision_keeps_the_other(abcli: Command, commits: tuple[str, str], cache: Path) -> None:
    older, newer = commits
    assert abcli("models", "rm", f"{NAME}@{older[:12]}", "--yes").code == 0
    assert listed(abcli).keys() == {f"{NAME}:Q4_K_M", f"{NAME}:Q8_0"}
    assert (cache / "models--user--tiny-GGUF" / "refs" / "main").read_text() == newer


def test_rm_asks(
    abcli: Command,
    commits: tuple[str, str],
    terminal: Callable[..., PseudoTerminal],
    hub: HubStandIn,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    outcome = abcli("models", "rm", NAME)
    assert outcome.code == 2
    assert b"--yes" in outcome.errors
    for key, value in hub.environment(tmp_path).items():
        monkeypatch.setenv(key, value)
    for answer, code, left in (("n", 130, 3), ("y", 0, 0)):
        screen = terminal("models", "rm", NAME)
        assert screen.until("delete, and free").count("of commit") == 3
        screen.press(f"{answer}\r")
        assert screen.until_end()[1] == code
        assert len(listed(abcli)) == left


def test_a_cache_behind_a_link(abcli: Command, hub: HubStandIn, tiny_model: Path, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "disk")
    hub.add(NAME, {FILE: tiny_model.read_bytes()})
    with pointed_at(hub, tmp_path / "linked"):
        path = abcli("pull", NAME).text
        assert listed(abcli)[f"{NAME}:Q4_K_M"]["path"] == path == str(locate_model(NAME))
        assert abcli("models", "rm", NAME, "--yes").code == 0
        assert listed(abcli) == {}


@pytest.mark.parametrize("name", ["default", "own", "./model.gguf"])
def test_rm_never_deletes_a_file_of_the_user(
    abcli: Command, cache: Path, folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(folder)
    for file in (DEFAULT_MODEL_FILE, "model.gguf"):
        shutil.copy(tiny_model, folder / file)
    assert abcli("models", "alias", "own", "model.gguf").code == 0
    outcome = abcli("models", "rm", name, "--yes")
    assert outcome.code == 2
    assert "delete it yourself" in outcome.problem()[1]
    assert len(list(folder.iterdir())) == 2


def test_aliases(abcli: Command, cache: Path, folder: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    shutil.copy(tiny_model, folder / "model.gguf")
    assert abcli("models", "alias").output == b""
    assert abcli("models", "alias", "q", "user/repo:q8_0").text == "q stands for hf:user/repo:Q8_0"
    assert abcli("models", "alias", "f", "model.gguf").text == f"f stands for {folder / 'model.gguf'}"
    assert abcli("models", "alias", "q", "f").text.endswith("not hf:user/repo:Q8_0 any more")
    # An alias of an alias stands for the same, whatever becomes of the first.
    assert aliases()["q"] == str(folder / "model.gguf")
    assert abcli("models", "alias", "known", "gemma-3-1b-it").text.startswith("known stands for hf:ggml-org/")
    assert abcli("models", "alias", "--remove", "f").code == 0
    assert json.loads(abcli("models", "alias", "--json").text) == aliases()
    assert abcli("models", "alias").text.splitlines() == [f"{name} -> {target}" for name, target in aliases().items()]
    # From anywhere.
    monkeypatch.chdir("/")
    assert locate_model("q") == folder / "model.gguf"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["a"], 2),
        (["a", "missing.gguf"], 1),
        (["a", "hf:nonsense"], 2),
        (["default", "user/repo"], 2),
        (["a b", "user/repo"], 2),
        (["--remove", "a"], 1),
        (["--remove", "a", "b"], 2),
    ],
)
def test_impossible_aliases(abcli: Command, words: list[str], code: int) -> None:
    outcome = abcli("models", "alias", *words)
    assert (outcome.code, outcome.output) == (code, b"")
    outcome.problem()
    assert aliases() == {}


def test_damaged_aliases_are_a_warning_in_the_list(abcli: Command, cache: Path, folder: Path, own_home: Path) -> None:
    (own_home / "aliases.json").write_text("{")
    outcome = abcli("models", "--json")
    assert (outcome.code, outcome.text) == (0, "[]")
    assert b"aliases.json" in outcome.errors
