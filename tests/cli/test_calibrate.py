"""`abcli calibrate`: what it prints and stores, that it goes on after an interruption, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import abcli.cli.calibrate as command_module
from abcli.calibrate.calibration import CALIBRATED, CalibrationSettings
from abcli.calibrate.judgement import Verdict
from abcli.cli.calibrate import CalibrationOptions
from abcli.config import MERGE_RULES, profiles_directory
from abcli.evals import scorer
from abcli.gguf.check import check_file
from abcli.gguf.fingerprint import fingerprint
from abcli.profiles import catalogue
from abcli.profiles.profile import Profile
from abcli.profiles.store import choose, profiles, save
from tests.cli.conftest import Command, Outcome
from tests.cli.pseudo_terminal import PseudoTerminal
from tests.profiles.samples import profile

# One thread: several would wait for each other on a busy machine.
SIZE = ("--task", "kv", "--length", 400, "--depths", 2, "--threads", 1)
FEW = (*SIZE, "--limit", 12, "--held-out", 9, "--buckets", 2, "--rules", "mean", "--prefill-bases", "none")
NAME = "kv-400"


@pytest.fixture(autouse=True)
def _no_catalogue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No profile comes with abcli."""
    monkeypatch.setattr(catalogue, "catalogue_path", lambda: tmp_path / "catalogue.json")


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where results are kept from test to test, for those that are not about computing them."""
    return tmp_path_factory.mktemp("results")


@pytest.fixture
def kept_results(results: Path, own_home: Path) -> None:
    """Let the home of a test share the results."""
    (own_home / "evaluations").symlink_to(results)


def stored() -> list[Profile]:
    def unexpected(line: str) -> None:
        raise AssertionError(line)

    return profiles(profiles_directory(), unexpected)


def lines(outcome: Outcome) -> list[str]:
    return outcome.errors.decode().splitlines()


def verdict(monkeypatch: pytest.MonkeyPatch, chosen: Verdict) -> None:
    """Let every calibration come to this."""
    judge = command_module.judge
    monkeypatch.setattr(command_module, "judge", lambda found: replace(judge(found), verdict=chosen))


@pytest.mark.usefixtures("kept_results")
def test_a_kept_profile_is_used_by_run(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("calibrate", tiny_model, *FEW, "--keep")
    assert outcome.code == 0
    (made,) = stored()
    assert (made.name, made.task, made.length, made.model) == (NAME, "kv", 400, tiny_model.name)
    assert made.fingerprint == fingerprint(check_file(tiny_model))
    path = next(profiles_directory().glob("*.json"))
    said = lines(outcome)
    assert said[-1] == f"profile {NAME} is stored: {path}; it is used from now on, --profile none does without"
    assert "too few to tell" in said[-2]
    answer = abcli("run", tiny_model, "hello", "-n", 2, "--threads", 1, "--json")
    assert json.loads(answer.output)["bases"] == list(made.bases)
    assert answer.errors.decode().startswith(f"profile {NAME}: ")
    without = abcli("run", tiny_model, "hello", "-n", 2, "--threads", 1, "--json", "--profile", "none")
    assert len(json.loads(without.output)["bases"]) == 6


@pytest.mark.usefixtures("kept_results")
def test_the_result_goes_to_standard_output_and_remarks_do_not(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("calibrate", tiny_model, *FEW)
    assert outcome.code == 0
    shown = outcome.text.splitlines()
    assert shown[0].startswith("kv, 400 tokens: ")
    for name in ("native", "spread2", "paper2", CALIBRATED):
        assert any(line.startswith(f"{name} ") for line in shown)
    said = lines(outcome)
    assert said[0].startswith("tried on ")
    assert any(line.startswith("chosen: --bases ") for line in said)
    assert said[-1].startswith("no profile is stored; hold out more questions")
    assert stored() == []


@pytest.mark.usefixtures("kept_results")
def test_the_report_can_be_shown_again(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    path, page = tmp_path / "report.json", tmp_path / "report.html"
    outcome = abcli("calibrate", tiny_model, *FEW, "--json", "-o", path, "--html", page)
    assert outcome.output == path.read_bytes()
    assert set(json.loads(outcome.output)["costs"]) == {"native", "spread2", "paper2", CALIBRATED}
    assert "Quality against speed" in page.read_text()
    found = json.loads(outcome.output)
    assert [item["name"] for item in found["configurations"]] == ["native", "spread2", "paper2", CALIBRATED]
    tried = found["about"]["calibration"]
    assert (tried["verdict"], tried["rules"]) == ("too few contexts", ["mean"])
    assert tried["questions"] + len(found["questions"]) == found["limit"] == 21
    assert tried["chosen"]["bases"] == found["configurations"][-1]["bases"]
    assert abcli("eval", "--from", path).output == abcli("calibrate", tiny_model, *FEW).output


@pytest.mark.usefixtures("kept_results")
def test_scores_are_those_of_an_evaluation(tiny_model: Path, abcli: Command) -> None:
    found = json.loads(abcli("calibrate", tiny_model, *FEW, "--json").output)
    compared = [item["name"] for item in found["configurations"][:-1]]
    bases = ",".join(f"{base:.9g}" for base in found["configurations"][-1]["bases"])
    own = f"bases={bases};merge={found['configurations'][-1]['merge']}"
    arguments = [word for name in (*compared, own) for word in ("--compare", name)]
    # Computed anew, and by other buckets in company.
    outcome = abcli("eval", "kv", tiny_model, *SIZE[2:], "--limit", found["limit"], *arguments, "--json", "--fresh")
    expected = {item["identifier"]: item for item in json.loads(outcome.output)["questions"]}
    assert found["questions"][-1]["identifier"] == list(expected)[-1]
    for question in found["questions"]:
        other = expected[question["identifier"]]
        assert question["sha256"] == other["sha256"]
        for name in (*compared, CALIBRATED):
            nll = other["scores"][own if name == CALIBRATED else name]["nll"]
            assert question["scores"][name]["nll"] == pytest.approx(nll, abs=0.02)


@pytest.mark.usefixtures("kept_results")
@pytest.mark.parametrize(
    ("come_to", "flags", "is_stored"),
    [
        (Verdict.CALIBRATED, (), True),
        (Verdict.CALIBRATED, ("--dry-run",), False),
        *((other, (), False) for other in Verdict if other is not Verdict.CALIBRATED),
        *((other, ("--keep",), True) for other in Verdict),
    ],
)
def test_what_is_stored(
    tiny_model: Path,
    abcli: Command,
    monkeypatch: pytest.MonkeyPatch,
    come_to: Verdict,
    flags: tuple[str, ...],
    is_stored: bool,
) -> None:
    verdict(monkeypatch, come_to)
    outcome = abcli("calibrate", tiny_model, *FEW, "--name", "mine", *flags)
    assert outcome.code == 0
    assert [item.name for item in stored()] == (["mine"] if is_stored else [])
    assert lines(outcome)[-1].startswith("profile mine is stored" if is_stored else "no profile is stored")


@pytest.mark.usefixtures("kept_results")
def test_a_profile_is_replaced_and_stays_chosen(tiny_model: Path, abcli: Command) -> None:
    identity = fingerprint(check_file(tiny_model))
    mine = profile(NAME, fingerprint=identity, model=tiny_model.name, native_base=10_000.0)
    save(mine, profiles_directory())
    chosen = choose(mine, profiles_directory())
    outcome = abcli("calibrate", tiny_model, *FEW, "--keep")
    assert lines(outcome)[0] == f"profile {NAME} of 2025-01-02 is replaced"
    (found,) = stored()
    assert found.chosen == chosen.chosen != ""
    assert found.created > mine.created
    other = abcli("calibrate", tiny_model, *FEW, "--keep", "--name", "other")
    assert lines(other)[-1].endswith(f"{NAME} stays the default until `abcli profiles use other`")
    assert {item.name for item in stored()} == {NAME, "other"}


@pytest.mark.usefixtures("kept_results")
def test_a_damaged_profile_is_replaced(tiny_model: Path, abcli: Command) -> None:
    identity = fingerprint(check_file(tiny_model))
    mine = profile(NAME, fingerprint=identity, model=tiny_model.name, native_base=10_000.0)
    save(mine, profiles_directory()).write_bytes(b"{")
    assert abcli("calibrate", tiny_model, *FEW, "--keep").code == 0
    assert [item.name for item in stored()] == [NAME]


def test_an_interrupted_calibration_goes_on_where_it_stopped(
    tiny_model: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[object] = []
    trace = scorer.trace

    def stopping(*arguments: Any, **settings: Any) -> Any:
        if len(traced) == 5:
            raise KeyboardInterrupt
        traced.append(arguments)
        return trace(*arguments, **settings)

    monkeypatch.setattr(scorer, "trace", stopping)
    stopped = abcli("calibrate", tiny_model, *FEW, "--keep")
    assert (stopped.code, stopped.output) == (130, b"")
    assert stopped.problem() == ("interrupted", "the same command goes on where it stopped")
    assert stored() == []

    def counting(*arguments: Any, **settings: Any) -> Any:
        traced.append(arguments)
        return trace(*arguments, **settings)

    monkeypatch.setattr(scorer, "trace", counting)
    resumed = abcli("calibrate", tiny_model, *FEW)
    # 21 questions under all bases; a single bucket that is chosen asks those held out once more.
    assert resumed.code == 0
    first = [arguments for arguments in traced if len(arguments[0].bases) > 2]  # type: ignore[index]
    assert len(first) == 21
    done = len(traced)
    assert abcli("calibrate", tiny_model, *FEW).output == resumed.output
    assert len(traced) == done


def test_fresh_results_are_not_stored(tiny_model: Path, abcli: Command, own_home: Path) -> None:
    assert abcli("calibrate", tiny_model, *FEW, "--fresh").code == 0
    assert not (own_home / "evaluations").exists()


@pytest.mark.usefixtures("kept_results")
def test_progress_is_shown_on_a_terminal_and_goes(
    tiny_model: Path, terminal: Callable[..., PseudoTerminal], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    shown, code = terminal("calibrate", tiny_model, *FEW, output=output).until_end()
    assert code == 0
    assert "asking under every base" in shown
    assert output.read_text("utf-8").startswith("kv, 400 tokens")


def options(**values: Any) -> CalibrationSettings:
    return CalibrationOptions(**values).settings()


def test_the_defaults_are_those_of_the_settings() -> None:
    assert options() == CalibrationSettings("needle", 1024)
    assert CalibrationOptions().profile_name("needle") == "needle-1024"
    assert CalibrationOptions(length=512, name="mine").profile_name("needle") == "mine"


def test_flags_become_settings(tmp_path: Path) -> None:
    assert options(rules="pool, mean").rules == ("mean", "pool")
    assert options(rules=",".join(MERGE_RULES)).rules == MERGE_RULES
    assert options(prefill_bases="none").prefill_multipliers == ()
    assert options(prefill_bases="0.5,2").prefill_multipliers == (0.5, 2.0)
    data = tmp_path / "questions.jsonl"
    data.write_text("{}\n")
    asked = options(task=str(data))
    assert (asked.task, asked.data) == ("qa", data)
    assert options(task="qa", data=data) == asked
    assert CalibrationOptions(task=str(data)).profile_name(asked.task) == "qa-1024"


def test_a_file_of_questions_is_read(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    data = tmp_path / "questions.jsonl"
    data.write_text("{}\n")
    outcome = abcli("calibrate", tiny_model, "--task", data)
    assert (outcome.code, outcome.output) == (1, b"")
    assert f"{data}" in outcome.problem()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--task", "chess"), "unknown task 'chess'"),
        (("--task", "x" * 5000), "unknown task"),
        (("--task", "{folder}"), "unknown task"),
        (("--task", "{model}", "--data", "{model}"), "both name a file"),
        (("--task", "qa"), "qa needs --data FILE"),
        (("--task", "tools", "--data", "{model}"), "tools needs --answers FILE"),
        (("--task", "kv", "--data", "{model}"), "has no say in kv"),
        (("--answers", "{model}"), "has no say in needle"),
        (("--length", 0), "--length 0"),
        (("--buckets", 0), "--buckets 0"),
        (("--buckets", 17), "--buckets 17"),
        (("--limit", 1), "--limit 1"),
        (("--limit", 2**31), f"--limit {2**31}"),
        (("--held-out", 0), "--held-out 0"),
        (("--depths", 0), "--depths 0"),
        (("--seed", -1), "--seed -1"),
        (("--rules", "mean,luck"), "'luck'"),
        (("--rules", ""), "''"),
        (("--prefill-bases", "50000"), "50000"),
        (("--prefill-bases", "0"), "0 times"),
        (("--prefill-bases", "nan"), "'nan'"),
        (("--prefill-bases", "one"), "'one'"),
        (("--name", "../x"), "'../x'"),
        (("--name", "none"), "'none'"),
        (("--keep", "--dry-run"), "--keep and --dry-run"),
        (("-c", 2048), "--ctx-size"),
        (("--prefill", "exact"), "--prefill"),
        (("--prefill-base", 5000), "--prefill-base"),
        (("--prompt-cache",), "--prompt-cache"),
        (("-m", "other.gguf"), "two models"),
        (("-o", "{folder}/none/report.json"), "--output"),
        (("--png", "{folder}"), "--png"),
        (("--examples",), "--examples"),
    ],
)
def test_wrong_usage_is_noticed_before_a_model_is_loaded(
    tiny_model: Path,
    abcli: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(command_module, "Subject", forbidden)
    places = {"model": tiny_model, "folder": tmp_path}
    outcome = abcli("calibrate", tiny_model, *(str(word).format(**places) for word in arguments))
    assert (outcome.code, outcome.output) == (2, b"")
    problem, hint = outcome.problem()
    assert message in problem
    assert hint


def test_what_only_the_questions_can_tell(tiny_model: Path, abcli: Command) -> None:
    one = abcli("calibrate", tiny_model, *SIZE, "--limit", 2, "--held-out", 9)
    assert (one.code, one.output) == (2, b"")
    assert "one context in common" in one.problem()[0]
    long = abcli("calibrate", tiny_model, "--task", "kv", "--length", 6000, "--limit", 9, "--held-out", 9)
    assert (long.code, long.output) == (1, b"")
    assert "4096" in long.problem()[0]
