"""Profiles on disk: one file each, nothing lost, nothing damaged taken for sound."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.errors import ProfileError, UsageError
from abcli.profiles import store
from abcli.profiles.profile import Profile, encode
from abcli.profiles.store import choose, export, find, import_, load, pick, profiles, remove, save, stored_path
from tests.profiles.samples import FINGERPRINT, OTHER_FINGERPRINT, SAMPLE, profile

WRITER = """
import sys
from pathlib import Path
from abcli.errors import ProfileError
from abcli.profiles.store import choose, save
from tests.profiles.samples import profile

number, directory = int(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.read(1)
won = 0
for turn in range(8):
    save(profile("shared", length=number + 1), directory)
    save(profile(f"own-{number}-{turn}"), directory)
    choose(profile("shared", length=number + 1), directory)
    try:
        save(profile(f"race-{turn}", length=number + 1), directory, overwrite=False)
        won += 1
    except ProfileError:
        pass
print(won)
"""


def stored(directory: Path) -> list[Profile]:
    """All profiles of a directory in which nothing is damaged."""
    return profiles(directory, pytest.fail)


def test_what_is_saved_is_found(tmp_path: Path) -> None:
    directory = tmp_path / "new" / "profiles"
    path = save(SAMPLE, directory)
    assert path == directory / "0123456789abcdef-needle-1024.json" == stored_path(directory, FINGERPRINT, SAMPLE.name)
    assert load(path) == SAMPLE
    assert stored(directory) == [SAMPLE]
    assert find(directory, FINGERPRINT, None, pytest.fail) == SAMPLE
    assert find(directory, FINGERPRINT, "needle-1024", pytest.fail) == SAMPLE
    assert find(directory, FINGERPRINT, "other", pytest.fail) is None
    assert find(directory, OTHER_FINGERPRINT, None, pytest.fail) is None
    assert find(directory, OTHER_FINGERPRINT, "needle-1024", pytest.fail) is None


def test_no_directory_is_no_profile(tmp_path: Path) -> None:
    assert stored(tmp_path / "none") == []
    assert not store.has_any(tmp_path / "none")
    assert find(tmp_path / "none", FINGERPRINT, None, pytest.fail) is None
    with pytest.raises(ProfileError, match="no such file"):
        remove(tmp_path / "none", FINGERPRINT, "x")
    assert not (tmp_path / "none").exists()


def test_models_of_one_beginning_are_told_apart(tmp_path: Path) -> None:
    save(SAMPLE, tmp_path)
    twin = FINGERPRINT[:16] + "0" * 48
    assert find(tmp_path, twin, None, pytest.fail) is None
    assert find(tmp_path, twin, SAMPLE.name, pytest.fail) is None


def test_saving_again_replaces_unless_told_otherwise(tmp_path: Path) -> None:
    save(SAMPLE, tmp_path)
    newer = profile(length=2048)
    with pytest.raises(ProfileError, match="already is") as caught:
        save(newer, tmp_path, overwrite=False)
    assert "`force`" in caught.value.hint
    assert stored(tmp_path) == [SAMPLE]
    save(newer, tmp_path)
    assert stored(tmp_path) == [newer]
    save(profile(fingerprint=OTHER_FINGERPRINT), tmp_path, overwrite=False)
    assert len(stored(tmp_path)) == 2


def test_a_failed_write_leaves_the_old_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(SAMPLE, tmp_path)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ProfileError, match="No space left"):
        save(profile(length=2048), tmp_path)
    assert stored(tmp_path) == [SAMPLE]
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.name != ".lock") == [".json"]


def at(hour: int) -> str:
    return f"2025-01-01T{hour:02}:00:00+00:00"


def test_the_newest_is_the_default_unless_another_was_chosen(tmp_path: Path) -> None:
    first, second = profile("first", created=at(1)), profile("second", created=at(2))
    for one in (second, first):
        save(one, tmp_path)
    assert [one.name for one in stored(tmp_path)] == ["second", "first"]

    def default() -> str:
        found = find(tmp_path, FINGERPRINT, None, pytest.fail)
        assert found is not None
        return found.name

    assert default() == "second"
    assert load(stored_path(tmp_path, FINGERPRINT, "first")) == first
    chosen = choose(first, tmp_path)
    assert load(stored_path(tmp_path, FINGERPRINT, "first")) == chosen
    assert default() == "first"
    save(profile("third", created=at(3)), tmp_path)
    assert default() == "first"
    choose(second, tmp_path)
    assert default() == "second"
    remove(tmp_path, FINGERPRINT, "second")
    assert default() == "first"
    remove(tmp_path, FINGERPRINT, "first")
    assert default() == "third"


def test_a_choice_holds_although_the_clock_was_set_back(tmp_path: Path) -> None:
    save(profile("first", chosen="2999-12-31T00:00:00+00:00"), tmp_path)
    second = profile("second")
    save(second, tmp_path)
    choose(second, tmp_path)
    found = find(tmp_path, FINGERPRINT, None, pytest.fail)
    assert found is not None
    assert found.name == "second"


@given(st.lists(st.tuples(st.integers(0, 23), st.none() | st.integers(0, 23)), min_size=1, max_size=6), st.randoms())
def test_the_default_does_not_depend_on_the_order(times: list[tuple[int, int | None]], random: object) -> None:
    candidates = [
        profile(f"p{number}", created=at(created), chosen="" if chosen is None else at(chosen))
        for number, (created, chosen) in enumerate(times)
    ]
    shuffled = list(candidates)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    default = pick(shuffled, None)
    assert default is not None
    assert default == pick(candidates, None)
    assert all(default.chosen >= other.chosen for other in candidates)
    assert all(default.created >= other.created for other in candidates if other.chosen == default.chosen)
    assert pick(shuffled, "p0") == candidates[0]
    assert pick([], None) is None


def test_damaged_files_are_reported_and_the_rest_is_used(tmp_path: Path) -> None:
    save(SAMPLE, tmp_path)
    (tmp_path / "0123456789abcdef-broken.json").write_bytes(b"{")
    (tmp_path / "0123456789abcdef-renamed.json").write_bytes(encode(SAMPLE))
    (tmp_path / "0123456789abcdef-folder.json").mkdir()
    (tmp_path / "0123456789abcdef-large.json").write_bytes(b" " * (2 << 20))
    (tmp_path / "fedcba9876543210-broken.json").write_bytes(b"{")
    (tmp_path / ".0123456789abcdef-x.json-abc.tmp").write_bytes(b"{")
    (tmp_path / "notes.txt").write_bytes(b"{")
    os.mkfifo(tmp_path / "0123456789abcdef-pipe.json")
    warnings: list[str] = []
    assert profiles(tmp_path, warnings.append) == [SAMPLE]
    assert len(warnings) == 6
    assert all(line.startswith(str(tmp_path)) for line in warnings)
    warnings.clear()
    assert find(tmp_path, FINGERPRINT, None, warnings.append) == SAMPLE
    assert len(warnings) == 5
    with pytest.raises(ProfileError, match="broken"):
        find(tmp_path, FINGERPRINT, "broken", pytest.fail)
    assert find(tmp_path, FINGERPRINT, "renamed", pytest.fail) is None
    assert not remove(tmp_path, FINGERPRINT, "broken").exists()


@pytest.mark.parametrize(
    "use",
    [
        lambda directory: save(SAMPLE, directory),
        lambda directory: choose(SAMPLE, directory),
        stored,
        store.has_any,
        lambda directory: find(directory, FINGERPRINT, None, pytest.fail),
        lambda directory: remove(directory, FINGERPRINT, "x"),
    ],
)
def test_a_file_in_place_of_the_directory(tmp_path: Path, use: Callable[[Path], object]) -> None:
    directory = tmp_path / "profiles"
    directory.write_text("not a directory")
    with pytest.raises(ProfileError, match=re.escape(str(directory))):
        use(directory)
    assert directory.read_text() == "not a directory"


def test_an_impossible_name_reaches_no_file(tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_bytes(encode(SAMPLE))
    directory = tmp_path / "profiles"
    directory.mkdir()
    for name in ("../../outside", "x/../../outside", "\0", ""):
        with pytest.raises(UsageError):
            find(directory, FINGERPRINT, name, pytest.fail)
        with pytest.raises(UsageError):
            remove(directory, FINGERPRINT, name)
        with pytest.raises(ProfileError):
            save(profile(name), directory)
    assert outside.exists()


def test_export_and_import(tmp_path: Path) -> None:
    directory, file = tmp_path / "profiles", tmp_path / "mine.json"
    chosen = choose(SAMPLE, directory)
    export(chosen, file)
    with pytest.raises(ProfileError, match="already exists"):
        export(chosen, file)
    export(chosen, file, overwrite=True)
    assert load(file) == SAMPLE

    other = tmp_path / "other"
    assert import_(file, other) == SAMPLE
    assert stored(other) == [SAMPLE]
    with pytest.raises(ProfileError, match="already is"):
        import_(file, other)
    assert import_(chosen, other, overwrite=True) == SAMPLE
    assert stored(other) == [SAMPLE]
    with pytest.raises(ProfileError, match="no such file"):
        import_(tmp_path / "none.json", other)
    with pytest.raises(ProfileError, match="not a file"):
        import_(tmp_path, other)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(ProfileError, match="not a file"):
        export(SAMPLE, pipe, overwrite=True)
    assert pipe.is_fifo()
    with pytest.raises(ProfileError, match="no such file"):
        export(SAMPLE, tmp_path / "none" / "file.json")


def test_processes_that_write_at_once(tmp_path: Path) -> None:
    arguments = [sys.executable, "-c", WRITER]
    pipe = subprocess.PIPE
    writers = [
        subprocess.Popen([*arguments, str(number), str(tmp_path)], stdin=pipe, stdout=pipe) for number in range(3)
    ]
    # All begin at the same moment, once Python has started everywhere.
    for writer in writers:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"ready\n"
    for writer in writers:
        assert writer.stdin is not None
        writer.stdin.write(b"x")
        writer.stdin.flush()
    outputs = [writer.communicate(timeout=120)[0] for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0, 0]
    # Each contested name was won by exactly one.
    assert sum(int(output) for output in outputs) == 8
    found = stored(tmp_path)
    assert len(found) == 1 + 3 * 8 + 8
    default = find(tmp_path, FINGERPRINT, None, pytest.fail)
    assert default is not None
    assert default.name == "shared"
    assert not list(tmp_path.glob("*.tmp"))
