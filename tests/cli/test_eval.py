"""`abcli eval`: reports, tables, figures, resuming, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import abcli.cli.eval as command_module
from abcli.cli.main import call
from abcli.config import profiles_directory
from abcli.evals import scorer
from abcli.evals.report import read_report
from abcli.gguf.check import check_file
from abcli.gguf.fingerprint import fingerprint
from abcli.profiles import catalogue
from abcli.profiles.store import save
from tests.cli.conftest import Command
from tests.cli.pseudo_terminal import PseudoTerminal
from tests.profiles.samples import profile
from tests.support.tiny_gguf import write_tiny_model

# One thread: several would wait for each other on a busy machine.
SIZE = ("--length", 400, "--limit", 10, "--depths", 3, "--threads", 1)
COMPARED = ("--compare", "native", "--compare", "spread2")


@pytest.fixture(autouse=True)
def _no_catalogue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No profile comes with abcli."""
    monkeypatch.setattr(catalogue, "catalogue_path", lambda: tmp_path / "catalogue.json")


def report(abcli: Command, model: Path, *arguments: object) -> dict[str, Any]:
    """What --json prints."""
    outcome = abcli("eval", "kv", model, *SIZE, *arguments, "--json")
    assert (outcome.code, outcome.errors) == (0, b"")
    found: dict[str, Any] = json.loads(outcome.output)
    return found


@pytest.fixture(scope="session")
def stored(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of the tiny model."""
    folder = tmp_path_factory.mktemp("report")
    patch = pytest.MonkeyPatch()
    patch.setenv("ABCLI_HOME", str(folder / "home"))
    path = folder / "report.json"
    try:
        assert call([*map(str, ("eval", "kv", tiny_model, *SIZE, *COMPARED, "-o", path))]) == 0
    finally:
        patch.undo()
    return path


def test_the_report_has_everything_and_no_path_of_the_machine(
    tiny_model: Path, abcli: Command, tmp_path: Path, own_home: Path
) -> None:
    path = tmp_path / "report.json"
    found = report(abcli, tiny_model, *COMPARED, "--seed", 7, "-o", path)
    text = path.read_text("utf-8")
    assert json.loads(text) == found
    assert not any(str(folder) in text for folder in (tmp_path, own_home, tiny_model.parent, Path.cwd()))
    assert found["model"] == {
        "name": tiny_model.name,
        "fingerprint": fingerprint(check_file(tiny_model)),
        "architecture": "llama",
        "native_base": 10000.0,
    }
    assert (found["task"], found["lengths"], found["limit"], found["depths"], found["seed"]) == ("kv", [400], 10, 3, 7)
    assert [item["name"] for item in found["configurations"]] == ["native", "spread2"]
    assert [len(item["bases"]) for item in found["configurations"]] == [1, 2]
    assert found["about"]
    assert len(found["questions"]) == 10
    assert len({question["sha256"] for question in found["questions"]}) == 10
    assert {name for question in found["questions"] for name in question["scores"]} == {"native", "spread2"}
    (summary,) = found["summaries"]
    mean = sum(question["scores"]["native"]["nll"] for question in found["questions"]) / 10
    assert summary["summaries"][0]["measures"]["nll"]["value"] == pytest.approx(mean)
    assert found["contexts"] == {}


def test_configurations_do_not_depend_on_their_company(tiny_model: Path, abcli: Command) -> None:
    together = report(abcli, tiny_model, *COMPARED, "--fresh")
    alone = report(abcli, tiny_model, "--compare", "native", "--fresh")
    for one, other in zip(alone["questions"], together["questions"], strict=True):
        assert one["sha256"] == other["sha256"]
        assert one["scores"]["native"]["nll"] == pytest.approx(other["scores"]["native"]["nll"], abs=0.02)


def test_examples_bring_the_contexts(tiny_model: Path, abcli: Command) -> None:
    found = report(abcli, tiny_model, "--compare", "native", "--examples")
    assert set(found["contexts"]) == {question["group"] for question in found["questions"]}
    for question in found["questions"]:
        key = question["text"].split('"')[1]
        assert f'"{key}": "{question["answer"]}' in found["contexts"][question["group"]]


def test_a_stored_report_is_shown_again(stored: Path, abcli: Command, tiny_model: Path, tmp_path: Path) -> None:
    first = abcli("eval", "kv", tiny_model, *SIZE, *COMPARED)
    assert (first.code, first.errors) == (0, b"")
    again = abcli("eval", "--from", stored)
    assert (again.code, again.errors, again.output) == (0, b"", first.output)
    assert abcli("eval", "--from", stored, "--json").output == stored.read_bytes()
    png, svg = tmp_path / "depth.png", tmp_path / "depth.svg"
    page = tmp_path / "depth.html"
    shown = abcli("eval", "--from", stored, "--png", png, "--svg", svg, "--html", page)
    assert shown.output == first.output
    assert "Quality against cost" in page.read_text()
    assert png.read_bytes().startswith(b"\x89PNG\r\n")
    assert b"<svg" in svg.read_bytes()


def test_costs_are_measured_for_a_stored_report(stored: Path, abcli: Command, tiny_model: Path, tmp_path: Path) -> None:
    costed, page = tmp_path / "costed.json", tmp_path / "costed.html"
    outcome = abcli("eval", "--from", stored, tiny_model, "--cost", "-t", 1, "-o", costed)
    assert (outcome.code, outcome.errors) == (0, b"")
    found = json.loads(costed.read_text())
    assert set(found["costs"]) == {item["name"] for item in found["configurations"]}
    for cost in found["costs"].values():
        assert 0 < cost["low"] <= cost["tokens_per_second"] <= cost["high"]
        assert cost["memory"] > 0
    assert {**found, "costs": {}} == json.loads(stored.read_text())
    assert abcli("eval", "--from", costed, "--html", page).code == 0
    assert "Quality against speed" in page.read_text()
    assert "Quality against memory" in page.read_text()


def test_costs_are_those_of_the_reports_model(stored: Path, abcli: Command, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other.gguf", layers=3)
    outcome = abcli("eval", "--from", stored, other, "--cost")
    assert outcome.code == 2
    assert "not of other.gguf" in outcome.problem()[0]
    assert abcli("eval", "--from", stored, other).code == 2


def test_the_table_names_what_was_compared(stored: Path, abcli: Command) -> None:
    lines = abcli("eval", "--from", stored).text.splitlines()
    assert lines[0].startswith("kv, 400 tokens: 10 questions on ")
    summaries = read_report(stored).summaries()[0].summaries
    for summary in summaries:
        row = next(line.split() for line in lines if line.startswith(f"{summary.configuration} "))
        assert f"{summary.measures.nll.value:.3f}" in row
    assert any(line.startswith("difference to native") for line in lines)


def test_bars_only_where_asked_for_or_on_a_terminal(
    stored: Path, abcli: Command, terminal: Callable[..., PseudoTerminal]
) -> None:
    assert "█" not in abcli("eval", "--from", stored).text
    assert "█" in abcli("eval", "--from", stored, "--plot").text
    shown, code = terminal("eval", "--from", stored).until_end()
    assert code == 0
    assert "█" in shown
    hidden, code = terminal("eval", "--from", stored, "--no-plot").until_end()
    assert (code, "█" in hidden) == (0, False)


def test_an_interrupted_run_goes_on_where_it_stopped(
    tiny_model: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced: list[object] = []
    trace = scorer.trace

    def counting(*arguments: Any, **settings: Any) -> Any:
        if len(traced) == 4:
            raise KeyboardInterrupt
        traced.append(arguments)
        return trace(*arguments, **settings)

    monkeypatch.setattr(scorer, "trace", counting)
    stopped = abcli("eval", "kv", tiny_model, *SIZE, *COMPARED)
    assert (stopped.code, stopped.output) == (130, b"")
    assert stopped.problem() == ("interrupted", "the same command goes on where it stopped")
    monkeypatch.setattr(scorer, "trace", lambda *arguments: (traced.append(arguments), trace(*arguments))[1])
    resumed = abcli("eval", "kv", tiny_model, *SIZE, *COMPARED)
    assert (resumed.code, len(traced)) == (0, 10)
    # Nothing is left to compute; --fresh computes all of it.
    assert abcli("eval", "kv", tiny_model, *SIZE, *COMPARED).output == resumed.output
    assert len(traced) == 10
    assert abcli("eval", "kv", tiny_model, *SIZE, *COMPARED, "--fresh").output == resumed.output
    assert len(traced) == 20


def test_fresh_results_are_not_stored(tiny_model: Path, abcli: Command, own_home: Path) -> None:
    report(abcli, tiny_model, "--compare", "native", "--fresh")
    assert not list(own_home.rglob("*.npz"))
    report(abcli, tiny_model, "--compare", "native")
    assert len(list(own_home.rglob("*.npz"))) == 10


def test_the_usual_configurations_and_the_model_s_profile(tiny_model: Path, abcli: Command) -> None:
    few = ("--limit", 1)
    names = [item["name"] for item in report(abcli, tiny_model, *few)["configurations"]]
    assert names == ["native", "spread6", "paper6"]
    mine = profile(fingerprint=fingerprint(check_file(tiny_model)), model=tiny_model.name, native_base=10_000.0)
    save(mine, profiles_directory())
    *_, last = report(abcli, tiny_model, *few)["configurations"]
    assert (last["name"], last["bases"]) == ("profile", list(mine.bases))
    (named,) = report(abcli, tiny_model, *few, "--compare", f"profile={mine.name}")["configurations"]
    assert named["bases"] == list(mine.bases)


def test_what_was_asked_of_tools_otherwise_is_not_compared_without_a_word(
    tiny_model: Path, abcli: Command, stored: Path, tmp_path: Path
) -> None:
    identity = fingerprint(check_file(tiny_model))
    for number, task in enumerate(("tools", "tools in the model's own format")):
        name = f"tools-{number}"
        save(
            profile(name=name, task=task, fingerprint=identity, model=tiny_model.name, native_base=10_000.0),
            profiles_directory(),
        )
        outcome = abcli("eval", "kv", tiny_model, *SIZE, "--limit", 1, "--compare", f"profile={name}")
        assert (b"abcli's own" in outcome.errors) == (number == 0)
        assert ("abcli's own" in abcli("profiles", "show", name).text) == (number == 0)
    values = json.loads(stored.read_bytes())
    path = tmp_path / "tools.json"
    for about, warned in ((values["about"], True), ({**values["about"], "calls": "JSON"}, False)):
        path.write_text(json.dumps({**values, "task": "tools", "about": about}))
        outcome = abcli("eval", "--from", path)
        assert (outcome.code, b"do not compare" in outcome.errors) == (0, warned)


def test_calls_are_asked_for_in_the_model_s_format(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    data, answers = tmp_path / "requests.json", tmp_path / "calls.json"
    functions = [
        {"name": name, "description": f"It does {name}.", "parameters": {"type": "dict", "properties": {}}}
        for name in ("walk", "swim")
    ]
    question = [[{"role": "user", "content": "Swim."}]]
    data.write_text(json.dumps({"id": "a", "question": question, "function": functions}))
    answers.write_text(json.dumps({"id": "a", "ground_truth": [{"swim": {}}]}))
    outcome = abcli("eval", "tools", tiny_model, *SIZE, "--limit", 1, "--data", data, "--answers", answers, "--json")
    assert outcome.code == 0
    found = json.loads(outcome.output)
    assert found["about"]["calls"] == "JSON in <tool_call> tags"
    (item,) = found["questions"]
    assert (item["text"], item["answer"]) == ("Swim.", "swim")
    assert {scores["rank"] for scores in item["scores"].values()} <= {0, 1}


def test_a_damaged_default_profile_is_a_warning(tiny_model: Path, abcli: Command) -> None:
    mine = profile(fingerprint=fingerprint(check_file(tiny_model)), model=tiny_model.name, native_base=10_000.0)
    save(mine, profiles_directory()).write_bytes(b"{")
    outcome = abcli("eval", "kv", tiny_model, *SIZE, "--limit", 1)
    assert outcome.code == 0
    assert outcome.errors.startswith(b"warning: ")
    asked = abcli("eval", "kv", tiny_model, *SIZE, "--limit", 1, "--compare", f"profile={mine.name}")
    assert (asked.code, asked.output) == (1, b"")
    missing = abcli("eval", "kv", tiny_model, *SIZE, "--limit", 1, "--compare", "profile=unknown")
    assert missing.code == 1
    assert "unknown" in missing.problem()[0]


def test_a_profile_that_is_not_there(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("eval", "kv", tiny_model, "--compare", "profile")
    assert outcome.code == 1
    assert outcome.problem() == (f"{tiny_model.name} has no profile", "`abcli calibrate` makes one")


def test_data_is_recorded_and_must_be_readable(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    outcome = abcli("eval", "needle", tiny_model, "--data", tmp_path / "none.txt")
    assert (outcome.code, outcome.output) == (1, b"")
    assert "none.txt" in outcome.problem()[0]
    data = tmp_path / "prose.txt"
    data.write_text("The evening was long and quiet. " * 2000)
    done = abcli(
        *(
            "eval",
            "needle",
            tiny_model,
            "--length",
            1500,
            "--limit",
            1,
            "--threads",
            1,
            "--compare",
            "native",
            "--json",
        ),
        *("--data", data),
    )
    assert (done.code, done.errors) == (0, b"")
    (recorded,) = json.loads(done.output)["data"]
    assert (recorded["flag"], recorded["name"], len(recorded["sha256"])) == ("--data", "prose.txt", 64)


def test_another_chat_template_is_recorded(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    few = ("--limit", 1, "--compare", "native")
    own = report(abcli, tiny_model, *few)
    assert own["data"] == []
    known = report(abcli, tiny_model, *few, "--chat-template", "gemma")
    assert known["data"] == [{"flag": "--chat-template", "name": "gemma", "sha256": ""}]
    assert known["questions"][0]["scores"] != own["questions"][0]["scores"]
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    (recorded,) = report(abcli, tiny_model, *few, "--chat-template", template)["data"]
    assert (recorded["name"], len(recorded["sha256"])) == ("template.jinja", 64)
    wrong = abcli("eval", "kv", tiny_model, *SIZE, "--chat-template", tmp_path / "none")
    assert (wrong.code, wrong.output) == (1, b"")
    assert "none" in wrong.problem()[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no task is given"),
        (("chess", "{model}"), "unknown task 'chess'"),
        (("kv", "{model}", "--length", 0), "--length 0"),
        (("kv", "{model}", "--length", 2**31), f"--length {2**31}"),
        (("kv", "{model}", "--length", 512, "--length", 512), "512, 512"),
        (("kv", "{model}", "--limit", 0), "--limit 0"),
        (("kv", "{model}", "--depths", 0), "--depths 0"),
        (("kv", "{model}", "--depths", 1001), "--depths 1001"),
        (("kv", "{model}", "--seed", -1), "--seed -1"),
        (("kv", "{model}", "--compare", "luck"), "luck"),
        (("kv", "{model}", "--compare", "spread99"), "99"),
        (("kv", "{model}", "--compare", "native;merge=luck"), "luck"),
        (("kv", "{model}", "--compare", "native", "--compare", "native"), "given twice"),
        (("kv", "{model}", "--data", "{model}"), "has no say in kv"),
        (("needle", "{model}", "--answers", "{model}"), "has no say in needle"),
        (("qa", "{model}"), "qa needs --data FILE"),
        (("tools", "{model}", "--data", "{model}"), "tools needs --answers FILE"),
        (("kv", "{model}", "-c", 2048), "--ctx-size"),
        (("kv", "{model}", "--prefill", "exact"), "--prefill"),
        (("kv", "{model}", "--prefill-base", 5000), "--prefill-base"),
        (("kv", "{model}", "--prompt-cache"), "--prompt-cache"),
        (("kv", "{model}", "-m", "other.gguf"), "two models"),
        (("kv", "{model}", "--threads", -1), "--threads -1"),
        (("kv", "{model}", "-o", "{folder}/none/report.json"), "--output"),
        (("kv", "{model}", "--png", "{folder}"), "--png"),
        (("kv", "{model}", "--examples"), "--examples"),
        (("kv", "--from", "{report}"), "TASK"),
        (("--from", "{report}", "-m", "{model}"), "--model"),
        (("--from", "{report}", "--limit", 3), "--limit"),
        (("--from", "{report}", "--fresh"), "--fresh"),
        (("--from", "{report}", "-o", "{folder}/copy.json"), "--output"),
        (("--from", "{report}", "--json", "--examples"), "--examples"),
    ],
)
def test_wrong_usage_is_noticed_before_a_model_is_loaded(
    tiny_model: Path,
    stored: Path,
    abcli: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[object, ...],
    message: str,
) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(command_module, "Subject", forbidden)
    places = {"model": tiny_model, "report": stored, "folder": tmp_path}
    outcome = abcli("eval", *(str(word).format(**places) for word in arguments))
    assert (outcome.code, outcome.output) == (2, b"")
    problem, hint = outcome.problem()
    assert message in problem
    assert hint


def test_what_only_the_model_can_tell(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    short = abcli("eval", "kv", tiny_model, "--length", 20)
    assert (short.code, short.output) == (2, b"")
    assert "20 tokens" in short.problem()[0]
    long = abcli("eval", "kv", tiny_model, "--length", 6000, "--limit", 1, "--compare", "native")
    assert (long.code, long.output) == (1, b"")
    assert "4096" in long.problem()[0]
    missing = abcli("eval", "kv", tmp_path / "none.gguf")
    assert (missing.code, missing.output) == (1, b"")
    assert "none.gguf" in missing.problem()[0]


def test_a_file_that_is_no_report(abcli: Command, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("{}")
    outcome = abcli("eval", "--from", path)
    assert (outcome.code, outcome.output) == (1, b"")
    assert outcome.problem()[0] == f"{path} is not a report of `abcli eval`"


@pytest.mark.parametrize("flag", ["--png", "--svg"])
def test_a_figure_without_matplotlib_is_refused(
    tiny_model: Path, abcli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    # What Python itself stores for a module that must not be imported.
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = abcli("eval", "kv", tiny_model, flag, tmp_path / "figure")
    assert outcome.code == 2
    assert outcome.problem() == (f"{flag} needs matplotlib, which is not installed", "pip install 'abcli[plot]'")


def test_progress_is_shown_on_a_terminal_and_goes(
    tiny_model: Path, terminal: Callable[..., PseudoTerminal], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    shown, code = terminal("eval", "kv", tiny_model, *SIZE, *COMPARED, output=output).until_end()
    assert code == 0
    assert "10/10" in shown
    assert output.read_text("utf-8").startswith("kv, 400 tokens")
