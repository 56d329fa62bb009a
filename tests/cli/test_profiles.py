"""`abcli profiles`, and what a profile does to `run` and `chat`."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from abcli.config import BucketConfig, Buckets, ContextConfig, profiles_directory
from abcli.errors import AbcliError
from abcli.gguf.check import check_file
from abcli.gguf.fingerprint import fingerprint
from abcli.prepare import Prepared
from abcli.profiles import catalogue, store
from abcli.profiles.profile import Profile, encode
from abcli.profiles.store import choose, find, load, profiles, save
from abcli.rope.bases import resolve_buckets
from tests.cli.conftest import Command
from tests.profiles.samples import EVERYDAY, FINGERPRINT, OTHER_FINGERPRINT, SAMPLE, profile
from tests.support.tiny_gguf import write_tiny_model

NOTE = (
    "profile needle-1024: 3 buckets 50000 100000 150000 merge mean "
    "(calibrated on needle; --profile none to do without)\n"
)


@pytest.fixture
def fitting(tiny_model: Path) -> Profile:
    """A profile of the tiny model, stored."""
    stored = profile(fingerprint=fingerprint(check_file(tiny_model)), model=tiny_model.name, native_base=10_000.0)
    save(stored, profiles_directory())
    return stored


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A catalogue without profiles, whatever abcli's own has by now."""
    path = tmp_path / "catalogue.json"
    monkeypatch.setattr(catalogue, "catalogue_path", lambda: path)
    return path


def write_catalogue(path: Path, model: Path, *profiles: Profile) -> None:
    values = [json.loads(encode(one)) for one in profiles]
    models = [{"name": "tiny", "size": model.stat().st_size, "profiles": values}]
    path.write_text(json.dumps({"models": models}), encoding="utf-8")


def report(abcli: Command, *arguments: object, note: str = "") -> dict[str, Any]:
    """What a short answer with --json reports; `note` is all that standard error may hold."""
    outcome = abcli("run", "--json", "-n", 2, "-s", 1, *arguments)
    assert (outcome.code, outcome.errors.decode()) == (0, note)
    found: dict[str, Any] = json.loads(outcome.output)
    return found


class Settings:
    """What `run` would load a model with."""

    def __init__(self, abcli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        self._abcli = abcli
        self._patch = monkeypatch

    def __call__(self, *arguments: object, command: str = "run") -> tuple[ContextConfig, Buckets, str]:
        """How it runs, its buckets, and standard error without the last line."""
        seen: list[Any] = []

        def stop(_terminal: object, found: Prepared, _options: object) -> None:
            seen.extend([found.context, found.buckets])
            raise AbcliError("far enough")

        self._patch.setattr(f"abcli.cli.{command}.opened", stop)
        outcome = self._abcli(command, *arguments)
        *notes, last = outcome.errors.decode().splitlines(keepends=True)
        assert last == "error: far enough\n", outcome.errors
        return seen[0], seen[1], "".join(notes)


@pytest.fixture
def settings(abcli: Command, monkeypatch: pytest.MonkeyPatch) -> Settings:
    return Settings(abcli, monkeypatch)


def test_no_profiles(abcli: Command, own_home: Path) -> None:
    outcome = abcli("profiles")
    assert (outcome.code, outcome.output) == (0, b"")
    assert str(own_home / "profiles") in outcome.errors.decode()
    assert abcli("profiles", "--json").text == "[]"
    assert abcli("profiles", "show", "x").problem()[0] == "there is no profile 'x'"
    assert abcli("profiles", "list").code == 2


def test_without_a_home_the_configuration_of_the_platform_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ABCLI_HOME")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/somewhere")
    assert profiles_directory().parts[-2:] == ("abcli", "profiles")


def test_the_list(abcli: Command, tmp_path: Path, tiny_model: Path, known: Path) -> None:
    older = profile("old", created="2024-06-01T12:00:00+00:00", model="a\n\x1b[2Jb.gguf", task="qa")
    other = profile("other", fingerprint=OTHER_FINGERPRINT, created="2024-05-01T12:00:00+00:00")
    for one in (SAMPLE, older):
        save(one, profiles_directory())
    write_catalogue(known, tiny_model, profile(length=5), other)
    outcome = abcli("profiles")
    assert outcome.code == 0
    title, *lines = outcome.text.split("\n")
    assert title.split() == ["NAME", "MODEL", "BUCKETS", "TASK", "GAIN", "CREATED", "NOTE"]
    assert [line.split()[0] for line in lines] == ["needle-1024", "old", "other"]
    assert lines[0].split()[1:5] == ["model.gguf", "3", "needle", "+0.1250"]
    assert [line.endswith("default") for line in lines] == [True, False, False]
    assert lines[2].endswith("default, with abcli")
    assert b"gain: nats" in outcome.errors
    found = json.loads(abcli("profiles", "--json").text)
    assert [(one["name"], one["default"], one["shipped"]) for one in found] == [
        ("needle-1024", True, False),
        ("old", False, False),
        ("other", True, True),
    ]
    assert found[0] == {**json.loads(json.dumps(asdict(SAMPLE))), "default": True, "shipped": False}


def test_damage_is_reported_and_the_rest_is_listed(abcli: Command, known: Path) -> None:
    path = save(SAMPLE, profiles_directory()).with_name("0123456789abcdef-broken.json")
    path.write_bytes(b"{")
    known.write_bytes(b"{")
    outcome = abcli("profiles")
    assert outcome.code == 0
    assert len(outcome.text.splitlines()) == 2
    assert f"warning: {path} is damaged" in outcome.errors.decode()
    assert f"warning: {known} is not a catalogue" in outcome.errors.decode()


def test_show(abcli: Command) -> None:
    save(SAMPLE, profiles_directory())
    outcome = abcli("profiles", "show", "needle-1024")
    assert (outcome.code, outcome.errors) == (0, b"")
    lines = dict(line.split("  ", 1) for line in outcome.text.split("\n\n")[0].splitlines())
    values = {key: text.strip() for key, text in lines.items()}
    assert values["fingerprint"] == FINGERPRINT
    assert values["multiples"] == "0.5 1 1.5"
    assert values["prefill"] == "shared, base 50000"
    assert values["calibrated on"] == "needle, contexts of 1,024 tokens"
    assert values["note"] == "default"
    assert "gate" not in values
    save(replace(SAMPLE, gate=0.8), profiles_directory())
    assert "gate           0.8 costs nothing" in abcli("profiles", "show", "needle-1024").text
    title, native, _, own = outcome.text.split("\n\n")[1].splitlines()
    assert title.startswith("CONFIGURATION")
    assert native.split() == ["native", "0.5000", "34.0%", "0.9000", "-", "-"]
    assert own.split()[:6] == ["calibrated", "(this", "profile)", "0.3750", "42.0%", "0.6000"]
    assert own.endswith("+0.1250  +0.1000 to +0.1500")
    assert json.loads(abcli("profiles", "show", "needle-1024", "--json").text)["name"] == "needle-1024"
    assert abcli("profiles", "--json", "show", "needle-1024").code == 2


def test_show_a_tuned_profile(abcli: Command) -> None:
    tuned = replace(SAMPLE, gains=((0.5, 1.0), (1.25, 2.0)), everyday=EVERYDAY, head_multipliers=((0.5,), (3.0,)))
    save(tuned, profiles_directory())
    lines = abcli("profiles", "show", "needle-1024").text.split("\n\n")[0].splitlines()
    values = {line.split("  ", 1)[0]: line.split("  ", 1)[1].strip() for line in lines}
    assert values["gains"] == "of 4 heads, 0.5 to 2"
    assert values["head bases"] == "of 2 heads, 0.5 to 3 times"
    assert values["tuned on"] == "needle, contexts of 1,024 tokens"
    assert values["plain text"] == "NLL 3.000 to 3.010, 1,234 tokens"
    assert values["everyday"] == "20 of 50 answers are the same; 2 repeated themselves, 0 do now"


def test_what_runs_says_that_a_profile_is_tuned(abcli: Command, tiny_model: Path, fitting: Profile) -> None:
    native = fitting.native_base
    tuned = replace(fitting, name="tuned", bases=(native,), gains=((0.5,) * 4, (1.25,) * 4), prefill_base=None)
    save(tuned, profiles_directory())
    outcome = abcli("run", tiny_model, "hello", "-n", 1, "--threads", 1)
    assert outcome.code == 0
    wanted = f"profile tuned: 1 bucket {native:g} with gains of 8 heads (tuned on needle; --profile none to do without)"
    assert wanted in outcome.errors.decode().splitlines()
    save(replace(tuned, head_multipliers=((0.5, 1.0), (2.0, 1.0))), profiles_directory())
    outcome = abcli("run", tiny_model, "hello", "-n", 1, "--threads", 1)
    assert "with gains of 8 heads and bases of 4 heads (tuned on needle;" in outcome.errors.decode()


def test_one_name_for_two_models(abcli: Command, tiny_model: Path, fitting: Profile) -> None:
    save(SAMPLE, profiles_directory())
    outcome = abcli("profiles", "show", "needle-1024")
    assert outcome.code == 2
    message, hint = outcome.problem()
    assert message == "2 models have a profile 'needle-1024'"
    assert "01234567/needle-1024" in hint
    for arguments in (["--model", tiny_model, "needle-1024"], [f"{fitting.fingerprint[:8]}/needle-1024"]):
        shown = json.loads(abcli("profiles", "show", "--json", *arguments).text)
        assert shown["fingerprint"] == fitting.fingerprint
    assert abcli("profiles", "show", "01234567/needle-1024", "-m", tiny_model).code == 2
    assert abcli("profiles", "show", "99999999/needle-1024").problem()[1] == "there are: needle-1024"
    assert abcli("profiles", "show", "x", "-m", tiny_model).problem()[0].startswith("there is no profile 'x' for ")


@pytest.mark.parametrize("command", ["show", "export", "remove", "use"])
@pytest.mark.parametrize("name", ["../x", "none", "", "0123/../x", "A"])
def test_impossible_names(abcli: Command, command: str, name: str) -> None:
    outcome = abcli("profiles", command, "--", name)
    assert outcome.code == 2
    assert "cannot be the name" in outcome.problem()[0]


def test_export_and_import(abcli: Command, tmp_path: Path) -> None:
    choose(SAMPLE, profiles_directory())
    file = tmp_path / "mine.json"
    outcome = abcli("profiles", "export", "needle-1024", file)
    assert (outcome.code, outcome.output) == (0, b"")
    assert load(file) == SAMPLE
    assert "already exists" in abcli("profiles", "export", "needle-1024", file).problem()[0]
    assert abcli("profiles", "export", "needle-1024", file, "--force").code == 0
    for arguments in ([], ["-"]):
        outcome = abcli("profiles", "export", "needle-1024", *arguments)
        assert (outcome.code, outcome.output, outcome.errors) == (0, file.read_bytes(), b"")

    assert "--force" in abcli("profiles", "import", file).problem()[1]
    assert abcli("profiles", "remove", "needle-1024").text == "removed needle-1024 for model.gguf"
    assert abcli("profiles", "import", file).text == "imported needle-1024 for model.gguf"
    assert abcli("profiles", "import", "-", "--force", stdin=file.read_bytes()).code == 0
    assert profiles(profiles_directory(), pytest.fail) == [SAMPLE]
    outcome = abcli("profiles", "import", "-", stdin=b"\xff")
    assert outcome.problem()[0] == "standard input is not UTF-8 (at byte 0)"
    assert "no such file" in abcli("profiles", "import", tmp_path / "none").problem()[0]


def test_use_and_remove(abcli: Command, tiny_model: Path, fitting: Profile, known: Path, settings: Settings) -> None:
    shipped = profile("shipped", fingerprint=fitting.fingerprint, native_base=10_000.0, bases=(5_000.0,))
    write_catalogue(known, tiny_model, shipped)
    assert settings(tiny_model, "hello")[2] == NOTE
    assert "comes with abcli" in abcli("profiles", "remove", "shipped").problem()[0]
    assert abcli("profiles", "use", "shipped").text == "model.gguf uses shipped"
    assert settings(tiny_model, "hello")[1] == Buckets((5_000.0,), 50_000.0, "mean")
    assert abcli("profiles", "remove", "shipped").code == 0
    assert settings(tiny_model, "hello")[2] == NOTE
    assert abcli("profiles", "remove", "needle-1024").code == 0
    assert settings(tiny_model, "hello")[2].startswith("profile shipped: 1 bucket 5000 ")


def test_a_run_uses_the_profile_and_says_so(abcli: Command, tiny_model: Path, fitting: Profile) -> None:
    found = report(abcli, tiny_model, "hello", note=NOTE)
    assert (found["bases"], found["merge"]) == ([50_000.0, 100_000.0, 150_000.0], "mean")
    assert report(abcli, tiny_model, "hello", "--profile", "needle-1024", note=NOTE)["bases"] == found["bases"]
    plain = report(abcli, tiny_model, "hello", "--profile", "none")
    assert (len(plain["bases"]), plain["merge"]) == (6, "confidence")


def test_a_chat_uses_the_profile(abcli: Command, tiny_model: Path, fitting: Profile, settings: Settings) -> None:
    outcome = abcli("chat", tiny_model, "-n", 2, "--no-save", stdin=b"hello\n")
    assert (outcome.code, outcome.errors.decode()) == (0, NOTE)
    context, buckets, note = settings(tiny_model, command="chat")
    assert (context.prefill, note) == ("shared", NOTE)
    assert buckets == Buckets(fitting.bases, 50_000.0, "mean")


@pytest.mark.parametrize(
    "flags", [["--buckets", 2], ["--bases", "1e4"], ["--multipliers", "1,2"], ["--spread", "paper"], ["--merge", "max"]]
)
def test_flags_about_buckets_win(
    abcli: Command, tiny_model: Path, fitting: Profile, settings: Settings, flags: list[object]
) -> None:
    context, buckets, note = settings(tiny_model, "hello", *flags)
    assert (context.prefill, buckets.prefill_base, note) == ("auto", 10_000.0, "")
    outcome = abcli("run", tiny_model, "hello", "--profile", "needle-1024", *flags)
    assert outcome.code == 2
    assert f"{flags[0]} {flags[1]}" in outcome.problem()[0]
    assert settings(tiny_model, "hello", "--profile", "none", *flags)[2] == ""


def test_flags_about_the_prefill_win(tiny_model: Path, fitting: Profile, settings: Settings) -> None:
    def prefill(*flags: object) -> tuple[str | None, float]:
        context, buckets, _ = settings(tiny_model, "hello", *flags)
        assert buckets.bases == fitting.bases
        return context.prefill, buckets.prefill_base

    assert prefill() == ("shared", 50_000.0)
    assert prefill("--prefill", "auto") == ("auto", 50_000.0)
    assert prefill("--prefill-base", 7e4) == ("shared", 70_000.0)
    assert prefill("--prefill", "exact", "--prefill-base", 7e4) == ("exact", 70_000.0)


def test_unknown_profiles(abcli: Command, tiny_model: Path, fitting: Profile, tmp_path: Path) -> None:
    outcome = abcli("run", tiny_model, "hello", "--profile", "x")
    assert outcome.problem() == ("tiny.gguf has no profile 'x'", "there are: needle-1024")
    other = tmp_path / "other.gguf"
    write_tiny_model(other, seed=7)
    outcome = abcli("run", other, "hello", "--profile", "needle-1024")
    assert outcome.problem()[0] == "other.gguf has no profile 'needle-1024'"
    assert abcli("run", tiny_model, "hello", "--profile", "../x").code == 2


def test_a_damaged_profile(abcli: Command, tiny_model: Path, fitting: Profile) -> None:
    path = store.stored_path(profiles_directory(), fitting.fingerprint, fitting.name)
    path.write_bytes(b"{")
    outcome = abcli("run", tiny_model, "hello", "--json", "-n", 2)
    assert outcome.code == 0
    assert len(json.loads(outcome.text)["bases"]) == 6
    (line,) = outcome.errors.decode().splitlines()
    assert line.startswith(f"warning: {path} is damaged")
    outcome = abcli("run", tiny_model, "hello", "--profile", "needle-1024")
    assert outcome.problem()[0].startswith(f"{path} is damaged")


def test_an_unreadable_store_is_a_warning(abcli: Command, tiny_model: Path) -> None:
    profiles_directory().write_text("not a directory")
    outcome = abcli("run", tiny_model, "hello", "-n", 2)
    assert outcome.code == 0
    (line,) = outcome.errors.decode().splitlines()
    assert line.endswith("no profile is used")


def test_the_weights_of_models_without_profiles_are_not_read(
    tiny_model: Path, known: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("abcli.gguf.checked.fingerprint", lambda *_: pytest.fail("the weights are read"))
    large = tmp_path / "large.gguf"
    large.write_bytes(bytes(tiny_model.stat().st_size + 1))
    write_catalogue(known, large, SAMPLE)
    assert settings(tiny_model, "hello")[1] == resolve_buckets(BucketConfig(), 10_000.0)
    save(SAMPLE, profiles_directory())
    assert settings(tiny_model, "hello", "--buckets", 6)[1] == resolve_buckets(BucketConfig(), 10_000.0)
    assert find(profiles_directory(), FINGERPRINT, None, pytest.fail) == SAMPLE
