"""`abcli tune`: what it prints and stores, that it goes on, and what is refused before any work."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

import abcli.cli.tune as command_module
from abcli.config import profiles_directory
from abcli.profiles import catalogue
from abcli.profiles.profile import Profile
from abcli.profiles.store import profiles
from abcli.tune import everyday
from tests.cli.conftest import Command
from tests.support.tiny_gguf import write_tiny_model

needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="abcli[tune] is not installed")
# One thread: several would wait for each other on a busy machine.
FEW = ("--questions", 6, "--held-out", 6, "--depths", 2, "--steps", 2, "--contexts", 1, "--threads", 1)


@pytest.fixture(autouse=True)
def _little(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Few everyday prompts and short prose, and no profile that comes with abcli."""
    read = everyday._read

    def some(name: str) -> str:
        parts = ("\n\n", 4) if name == "prose.txt" else ("\n", 6)
        return parts[0].join(part[:200] for part in read(name).split(parts[0])[: parts[1]])

    monkeypatch.setattr(everyday, "_read", some)
    monkeypatch.setattr(everyday, "ANSWER_TOKENS", 8)
    monkeypatch.setattr(catalogue, "catalogue_path", lambda: tmp_path / "catalogue.json")


@pytest.fixture
def with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torch were here: what is refused before it is needed."""
    monkeypatch.setattr(command_module, "find_spec", lambda _name: True)


def stored() -> list[Profile]:
    return profiles(profiles_directory(), pytest.fail)


def examples(path: Path, lines: int = 40) -> Path:
    path.write_text("".join(f'{{"prompt": "Number {n}?", "answer": "It is {n}."}}\n' for n in range(lines)))
    return path


@needs_torch
def test_a_kept_profile_has_the_gains_and_the_figures(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    file, output = examples(tmp_path / "Mine of 2026.jsonl"), tmp_path / "found.json"
    arguments = ("tune", tiny_model, "--task", file, "--length", 200, *FEW, "--no-controls", "-o", output)
    outcome = abcli(*arguments)
    assert outcome.code == 0
    said = outcome.errors.decode()
    assert "learning takes about" in said
    assert "learning: step 2, 100%, loss " in said
    assert "too few contexts to tell" in said
    assert said.endswith("no profile is stored (--keep stores it in any case)\n")
    assert stored() == []
    assert "Mine of 2026.jsonl, 200 tokens, 6 questions on 6 contexts: untuned " in outcome.text
    assert "plain text: NLL " in outcome.text
    found = json.loads(output.read_bytes())
    assert [step["number"] for step in found["steps"]] == [1, 2]
    assert len(found["answers"]) == found["everyday"]["prompts"] == 3
    # What is learned is not learned again.
    again = abcli(*arguments, "--keep")
    assert "step" not in again.errors.decode()
    (made,) = stored()
    assert made.name == "tuned-mine-of-2026-200"
    assert made.gains == tuple(map(tuple, found["gains"]))
    assert {gain for layer in made.gains for gain in layer} != {1.0}
    assert made.everyday is not None
    assert made.evidence.own.configuration == "Mine of 2026.jsonl 200: tuned"
    shown = abcli("profiles", "show", made.name).text
    assert "gains" in shown
    assert "plain text" in shown
    run = abcli("run", tiny_model, "hello", "-n", 2, "--threads", 1)
    assert "with gains of 8 heads (tuned on Mine of 2026.jsonl" in run.errors.decode()


@needs_torch
@pytest.mark.parametrize(("flags", "gains"), [(["--bases"], True), (["--bases", "--no-gains"], False)])
def test_bases_are_learned_with_gains_or_alone(
    tiny_model: Path, abcli: Command, tmp_path: Path, flags: list[str], gains: bool
) -> None:
    file = examples(tmp_path / "mine.jsonl")
    outcome = abcli("tune", tiny_model, "--task", file, "--length", 200, *FEW, *flags, "--no-controls", "--keep")
    assert outcome.code == 0
    (made,) = stored()
    assert bool(made.gains) == gains
    assert [*map(len, made.head_multipliers)] == [2, 2]
    assert {number for layer in made.head_multipliers for number in layer} != {1.0}
    untuned, tuned = (score.mean_nll for score in made.evidence.scores[:2])
    assert untuned != tuned
    assert "head bases" in abcli("profiles", "show", made.name).text
    run = abcli("run", tiny_model, "hello", "-n", 2, "--threads", 1)
    wanted = "with gains of 8 heads and bases of 4 heads" if gains else "with bases of 4 heads"
    assert wanted in run.errors.decode()


@needs_torch
def test_tasks_of_eval_are_judged_with_their_controls(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"This is sentence number {number} of a long text." for number in range(120)))
    arguments = ("--task", "kv", "--length", 400, "--text", text, "--dry-run")
    outcome = abcli("tune", tiny_model, *arguments, *FEW, "--questions", 12)
    assert outcome.code == 0
    assert "control: the same for all heads: step 2" in outcome.errors.decode()
    lines = outcome.text.splitlines()
    place = next(number for number, line in enumerate(lines) if line.startswith("kv, 400 tokens, "))
    assert [line.partition(":")[0].strip() for line in lines[place + 1 : place + 4]] == [
        "tuned",
        "control, the same for all heads",
        "control, learned from wrong answers",
    ]
    assert lines[place + 4].startswith("  control, native, sharpened by ")
    assert any(line.startswith("kv, 800 tokens (not learned), ") for line in lines)
    assert any(line.startswith("needle, 400 tokens (not learned), ") for line in lines)
    assert "no profile is stored (--dry-run)" in outcome.errors.decode()
    assert stored() == []


def test_without_torch_it_says_what_to_install(
    tiny_model: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command_module, "find_spec", lambda name: None if name == "torch" else True)
    outcome = abcli("tune", tiny_model)
    assert outcome.code == 2
    message, hint = outcome.problem()
    assert message == "abcli tune needs torch and gguf, which are not installed"
    assert hint == "pip install 'abcli[tune]'"


WRONG: dict[str, tuple[list[object], str]] = {
    "task": (["--task", "poetry"], "'poetry' is neither a task nor a file"),
    "qa": (["--task", "qa"], "qa needs --qa-data FILE"),
    "tools": (["--task", "tools", "--tools-data", "x"], "tools needs --tools-answers FILE"),
    "half of what tools need": (["--tools-answers", "x"], "tools needs --tools-data FILE"),
    "answers": (["--answers", "x"], "--answers x has no say in needle,kv"),
    "device": (["--device", "tpu"], "'tpu' is not one of 'auto', 'cpu', 'cuda', 'mps'"),
    "nothing": (["--no-gains"], "--no-gains without --bases leaves nothing to learn"),
    "both": (["--keep", "--dry-run"], "--keep and --dry-run contradict each other"),
    "length": (["--length", "0"], "--length 0 is impossible"),
    "rate": (["--rate", "nan"], "--rate nan is impossible"),
    "guard": (["--guard", "-1"], "--guard -1 is impossible"),
    "minutes": (["--minutes", "0"], "--minutes 0 is impossible"),
    "name": (["--name", "../x"], "cannot be the name of a profile"),
    "prefill": (["--prefill", "exact"], "--prefill has no say in tuning"),
    "output": (["-o", "/nowhere/found.json"], "/nowhere"),
}


@pytest.mark.usefixtures("with_torch")
@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_noticed_at_once(tiny_model: Path, abcli: Command, case: str) -> None:
    arguments, message = WRONG[case]
    outcome = abcli("tune", tiny_model, *arguments)
    assert outcome.code == 2
    assert message in outcome.problem()[0]


@pytest.mark.usefixtures("with_torch")
def test_a_model_that_cannot_be_tuned_is_refused(tmp_path: Path, abcli: Command) -> None:
    outcome = abcli("tune", write_tiny_model(tmp_path / "model.gguf", architecture="stablelm"))
    assert outcome.code == 1
    assert "is of the architecture stablelm" in outcome.problem()[0]
    assert "llama, qwen2, qwen3, gemma3" in outcome.problem()[1]


@needs_torch
def test_a_file_that_cannot_be_read_is_an_error(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_bytes(b'{"prompt": "a", "answer": "b"}\n{"prompt": "a", "ans')
    outcome = abcli("tune", tiny_model, "--task", file)
    assert outcome.code == 1
    assert "line 2: not JSON" in outcome.problem()[0]


@needs_torch
def test_a_twin_that_computes_otherwise_is_refused(
    tiny_model: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from abcli.tune.twin import Twin

    right = Twin.hidden
    monkeypatch.setattr(Twin, "hidden", lambda *arguments, **named: 1.5 * right(*arguments, **named))
    arguments = ("--task", examples(tmp_path / "mine.jsonl"), "--length", 200)
    outcome = abcli("tune", tiny_model, *arguments, *FEW)
    assert outcome.code == 1
    assert "error: tiny.gguf computes otherwise in torch: " in outcome.errors.decode()
    assert "step 1" not in outcome.errors.decode()
