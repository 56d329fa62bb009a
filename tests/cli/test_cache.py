"""`abcli cache`: what is stored is listed and cleared."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from abcli.cli.cache import size_text
from abcli.cli.main import call
from abcli.config import prompt_cache_directory
from abcli.engine.prompt_cache import CacheKey, Piece, PromptCache
from tests.cli.conftest import Command

DAY = 86_400.0


def store(directory: Path, count: int, base: float = 10000.0, name: str = "tiny.gguf") -> Path:
    """One stored prefix of `count` tokens; its file."""
    before = set(directory.glob("*"))
    key = CacheKey("model", base, "none", "f16", "f16", "on", "build", model_name=name)
    piece = Piece(0, count, np.zeros(count * 100, np.uint8))
    PromptCache(directory, key, 1 << 30, pytest.fail).write([4711, *[count] * (count - 1)], [piece])
    (new,) = set(directory.glob("*")) - before
    return new


def age(path: Path, days: float) -> None:
    moment = time.time() - days * DAY
    os.utime(path, (moment, moment))


def test_path_is_below_the_home_of_abcli(abcli: Command, own_home: Path) -> None:
    outcome = abcli("cache", "path")
    assert (outcome.code, outcome.text, outcome.errors) == (0, str(own_home / "prompts"), b"")
    assert prompt_cache_directory() == own_home / "prompts"


def test_without_a_home_the_cache_of_the_platform_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ABCLI_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert prompt_cache_directory().parts[-2:] == ("abcli", "prompts")


def test_an_empty_cache(abcli: Command) -> None:
    outcome = abcli("cache", "list")
    assert (outcome.code, outcome.output) == (0, b"")
    assert outcome.errors.startswith(b"0 files, 0 B in ")
    assert abcli("cache", "list", "--json").text == "[]"
    outcome = abcli("cache", "clear")
    assert (outcome.code, outcome.text) == (0, "removed 0 files, 0 B")


def test_list_shows_everything_but_the_text(abcli: Command) -> None:
    directory = prompt_cache_directory()
    age(store(directory, 1234), 1)
    store(directory, 99, base=12345.5, name="a\n\x1b[2Jmodel.gguf")
    (directory / f"{'0' * 16}-{'0' * 32}.prefix").write_bytes(b"nothing sound")
    age(directory / f"{'0' * 16}-{'0' * 32}.prefix", 2)
    outcome = abcli("cache", "list")
    assert outcome.code == 0
    title, first, second, third = outcome.text.split("\n")
    assert title.split() == ["TOKENS", "SIZE", "MODEL", "BASE", "LAST", "USE"]
    assert first.split()[0] == "99"
    assert "12345.5" in first
    assert second.split()[:5] == ["1234", "128.8", "kB", "tiny.gguf", "10000.0"]
    assert second.split()[5] == time.strftime("%Y-%m-%d", time.localtime(time.time() - DAY))
    assert "damaged" in third
    assert "4711" not in outcome.text
    assert outcome.errors.startswith(b"3 files, ")


def test_list_as_json(abcli: Command) -> None:
    path = store(prompt_cache_directory(), 100)
    age(path, 3)
    (entry,) = json.loads(abcli("cache", "list", "--json").text)
    assert abs(entry.pop("last_use") - (time.time() - 3 * DAY)) < 60
    key = entry.pop("key")
    assert (key["base"], key["cache_type_k"]) == ("10000.0", "f16")
    assert entry == {
        "path": str(path),
        "tokens": 100,
        "size": path.stat().st_size,
        "model": "tiny.gguf",
        "problem": None,
    }


def test_clear_removes_all_or_what_is_old(abcli: Command) -> None:
    directory = prompt_cache_directory()
    old, new = store(directory, 100), store(directory, 200)
    age(old, 8)
    age(new, 6)
    size = old.stat().st_size
    outcome = abcli("cache", "clear", "--older-than", "7")
    assert (outcome.code, outcome.text) == (0, f"removed 1 file, {size_text(size)}")
    assert list(directory.iterdir()) == [new]
    assert abcli("cache", "clear").text.startswith("removed 1 file, ")
    assert list(directory.iterdir()) == []


@pytest.mark.parametrize("days", ["0", "-1", "inf", "nan"])
def test_an_impossible_age_removes_nothing(abcli: Command, days: str) -> None:
    path = store(prompt_cache_directory(), 100)
    outcome = abcli("cache", "clear", "--older-than", days)
    assert outcome.code == 2
    assert outcome.problem()[0].startswith("--older-than")
    assert path.exists()


def test_another_directory_may_be_named(abcli: Command, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    store(tmp_path, 100)
    assert len(json.loads(abcli("cache", "list", "--json", "--dir", str(tmp_path)).text)) == 1
    assert abcli("cache", "clear", "--dir", str(tmp_path)).code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_file_instead_of_a_directory_is_an_error(abcli: Command, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    outcome = abcli("cache", "list", "--dir", str(path))
    assert outcome.code == 1
    assert str(path) in outcome.problem()[0]


def test_cache_alone_shows_its_commands(abcli: Command) -> None:
    outcome = abcli("cache")
    assert outcome.code == 2
    for name in (b"list", b"clear", b"path"):
        assert name in outcome.output + outcome.errors


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (999_949, "999.9 kB"), (999_950, "1.0 MB"), (71_234_567, "71.2 MB")],
)
def test_sizes_are_for_people(size: int, text: str) -> None:
    assert size_text(size) == text


def test_the_directory_may_follow_the_flag(tiny_model: Path, tmp_path: Path) -> None:
    words = ["run", str(tiny_model), "word " * 100, "-n", "1", "--temp", "0", f"--prompt-cache={tmp_path / 'kept'}"]
    assert call(words) == 0
    assert len(list((tmp_path / "kept").iterdir())) == 1
