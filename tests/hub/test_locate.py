"""A name is looked for in one order: file, hub prefix, alias, catalogue, repository, path."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from abcli.config import DEFAULT_MODEL_FILE, aliases_file
from abcli.errors import AbcliError, ModelFileError, UsageError
from abcli.hub import locate
from abcli.hub.aliases import aliases, remove_alias, set_alias
from abcli.hub.locate import (
    BundledName,
    LocalName,
    locate_model,
    looks_like_model,
    portable_name,
    resolve_name,
)
from abcli.hub.names import HubName
from tests.support.hub import HubStandIn

QWEN = HubName("Qwen/Qwen2.5-0.5B-Instruct-GGUF", file="qwen2.5-0.5b-instruct-q4_k_m.gguf")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a few files in it, and aliases."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("model.gguf", "taken", "user/repo", "folder/model.gguf"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    set_alias("mine", "hf:some/model:Q8_0")
    set_alias("file", str(folder / "model.gguf"))
    set_alias("again", "mine")
    set_alias("small", "smollm2-135m-instruct")
    set_alias("usual", "default")
    set_alias("taken", "hf:some/other")
    set_alias("gemma-3-1b-it", "hf:mine/instead")
    return folder


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, BundledName(DEFAULT_MODEL_FILE)),
        ("default", BundledName(DEFAULT_MODEL_FILE)),
        ("model.gguf", LocalName(Path("model.gguf"))),
        ("./model.gguf", LocalName(Path("model.gguf"))),
        ("~/here/model.gguf", "expanded"),
        # A file that exists is that file, whatever else has its name.
        ("taken", LocalName(Path("taken"))),
        ("user/repo", LocalName(Path("user/repo"))),
        ("hf:user/repo", HubName("user/repo")),
        ("mine", HubName("some/model", "Q8_0")),
        ("small", BundledName(DEFAULT_MODEL_FILE)),
        ("usual", BundledName(DEFAULT_MODEL_FILE)),
        # The user's own names win over abcli's, and do not lead to each other.
        ("gemma-3-1b-it", HubName("mine/instead")),
        ("again", LocalName(Path("mine"))),
        ("qwen2.5-0.5b-instruct", QWEN),
        ("Qwen2.5-0.5B-Instruct", QWEN),
        ("qwen2.5-0.5b-instruct:q8_0", HubName("Qwen/Qwen2.5-0.5B-Instruct-GGUF", "Q8_0")),
        ("qwen2.5-0.5b-instruct:best", LocalName(Path("qwen2.5-0.5b-instruct:best"))),
        ("smollm2-135m-instruct", BundledName(DEFAULT_MODEL_FILE)),
        # The default model is one file, and of no repository.
        ("smollm2-135m-instruct:Q8_0", LocalName(Path("smollm2-135m-instruct:Q8_0"))),
        ("other/repo", HubName("other/repo")),
        ("other/repo:q8_0", HubName("other/repo", "Q8_0")),
        ("other/repo/file.gguf", HubName("other/repo", file="file.gguf")),
        # What begins with a folder that is here is a path with a typing error.
        ("folder/modle.gguf", LocalName(Path("folder/modle.gguf"))),
        ("folder/modle", LocalName(Path("folder/modle"))),
        ("user/repo2", LocalName(Path("user/repo2"))),
        ("user/repo2/file.gguf", LocalName(Path("user/repo2/file.gguf"))),
        ("hf:user/repo2", HubName("user/repo2")),
        ("nowhere/model.gguf", LocalName(Path("nowhere/model.gguf"))),
        ("./other/repo", LocalName(Path("other/repo"))),
        ("../other/repo", LocalName(Path("../other/repo"))),
        ("/other/repo", LocalName(Path("/other/repo"))),
        ("missing.gguf", LocalName(Path("missing.gguf"))),
        ("missing", LocalName(Path("missing"))),
        ("a b", LocalName(Path("a b"))),
        ("", LocalName(Path())),
        ("nul\0byte", LocalName(Path("nul\0byte"))),
        ("x" * 5000, LocalName(Path("x" * 5000))),
        ("hf:nonsense", UsageError),
        ("https://example.org/model.gguf", UsageError),
    ],
)
def test_names(here: Path, tmp_path: Path, text: str | None, expected: object) -> None:
    if expected is UsageError:
        with pytest.raises(UsageError):
            resolve_name(text)
    else:
        assert resolve_name(text) == (LocalName(here / "model.gguf") if expected == "expanded" else expected)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("default", True),
        ("missing.gguf", True),
        ("model.gguf", True),
        ("taken", True),
        ("mine", True),
        ("qwen2.5-0.5b-instruct", True),
        ("qwen2.5-0.5b-instruct:fp16", True),
        ("hf:other/repo", True),
        ("other/repo-GGUF", True),
        ("other/repo:Q4_K_M", True),
        ("https://huggingface.co/other/repo", True),
        ("yes/no", False),
        ("and/or:not", False),
        ("https://example.org/what-is-this", False),
        ("hello", False),
        ("hf: what is it?", False),
        ("tell me of default", False),
        ("", False),
    ],
)
def test_a_single_word_is_a_model_or_a_prompt(here: Path, word: str, expected: bool) -> None:
    assert looks_like_model(word) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, "default"),
        ("usual", "default"),
        ("mine", "hf:some/model:Q8_0"),
        ("hf:user/repo", "hf:user/repo"),
        ("model.gguf", "{here}/model.gguf"),
        ("file", "{here}/model.gguf"),
        ("no/where.gguf", "{here}/no/where.gguf"),
    ],
)
def test_a_name_for_other_machines_needs_no_alias_and_no_directory(here: Path, name: str | None, expected: str) -> None:
    (here / "no").mkdir()
    assert portable_name(name) == expected.replace("{here}", str(here))


def test_what_is_cached_needs_no_request(hub: HubStandIn, cache: Path) -> None:
    commit = hub.add("user/model-GGUF", {"m-Q8_0.gguf": b"GGUF", "m-Q4_0.gguf": b"other"})
    asked: list[HubName] = []

    def bring(name: HubName) -> Path:
        asked.append(name)
        return Path("brought")

    with pytest.raises(ModelFileError) as caught:
        locate_model("user/model-GGUF:q8_0")
    assert "abcli pull user/model-GGUF:Q8_0" in caught.value.hint
    assert locate_model("user/model-GGUF:q8_0", bring) == Path("brought")
    assert asked == [HubName("user/model-GGUF", "Q8_0")]

    snapshot = cache / "models--user--model-GGUF" / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "m-Q8_0.gguf").write_bytes(b"GGUF")
    for name in ("user/model-GGUF", "hf:user/model-GGUF:Q8_0", "user/model-GGUF/m-Q8_0.gguf"):
        assert locate_model(name) == snapshot / "m-Q8_0.gguf"
    assert locate_model(f"user/model-GGUF@{commit[:7]}") == snapshot / "m-Q8_0.gguf"
    # Another quant than the one that is asked for is not taken.
    assert locate_model("user/model-GGUF:Q4_0", bring) == Path("brought")
    assert hub.requests == []


def test_the_default_model_is_fetched_where_no_folder_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locate, "model_folders", lambda: (tmp_path,))
    with pytest.raises(ModelFileError) as caught:
        locate_model(None)
    assert "abcli pull default" in caught.value.hint
    asked = []
    assert locate_model(None, lambda name: asked.append(name) or Path("brought")) == Path("brought")
    assert asked == [BundledName(DEFAULT_MODEL_FILE)]
    (tmp_path / DEFAULT_MODEL_FILE).touch()
    assert locate_model("default") == tmp_path / DEFAULT_MODEL_FILE


def test_naming_a_file_does_not_load_the_hub_library(tmp_path: Path) -> None:
    code = (
        "import sys; from abcli.hub.locate import locate_model, looks_like_model; import abcli.cli.main\n"
        "locate_model('x.gguf'); looks_like_model('hello'); looks_like_model('user/repo-GGUF')\n"
        "raise SystemExit('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "ABCLI_HOME": str(tmp_path)}, check=False)
    assert done.returncode == 0


def test_aliases_are_kept_and_forgotten(own_home: Path) -> None:
    assert aliases() == {}
    assert set_alias("a", "hf:user/repo") is None
    assert set_alias("a", "other.gguf") == "hf:user/repo"
    assert set_alias("B.1_x-", "ü") is None
    assert aliases() == {"B.1_x-": "ü", "a": "other.gguf"}
    assert json.loads((own_home / "aliases.json").read_text())["version"] == 1
    assert remove_alias("a") == "other.gguf"
    with pytest.raises(ModelFileError) as caught:
        remove_alias("a")
    assert "B.1_x-" in caught.value.hint


@pytest.mark.parametrize("name", ["", "default", "Default", "a b", "a/b", "a:b", "-a", "x.gguf", "a" * 65, "ü"])
def test_impossible_aliases(name: str) -> None:
    with pytest.raises(UsageError):
        set_alias(name, "x")
    assert aliases() == {}


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"version": 2, "aliases": {}}', '{"version": 1, "aliases": {"a": 3}}', "[" * 100_000, "\xff"],
)
def test_damaged_aliases_are_not_overwritten(own_home: Path, content: str) -> None:
    path = aliases_file()
    path.write_bytes(content.encode("latin-1"))
    for action in (aliases, lambda: set_alias("a", "x"), lambda: resolve_name("word")):
        with pytest.raises(ModelFileError) as caught:
            action()
        assert str(path) in caught.value.message
    assert path.read_bytes() == content.encode("latin-1")
    # What cannot be an alias does not need the file.
    assert resolve_name("user/repo") == HubName("user/repo")


def test_without_a_home_the_aliases_are_in_the_users_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("ABCLI_HOME")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert aliases_file().parts[-2:] == ("abcli", "aliases.json")


def test_a_folder_for_aliases_that_cannot_be_made(own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (own_home / "file").touch()
    monkeypatch.setenv("ABCLI_HOME", str(own_home / "file"))
    with pytest.raises(AbcliError):
        set_alias("a", "x")
