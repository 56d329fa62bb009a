"""The flag --lora in every command that takes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abcli.cli._lora import parse_lora, parse_loras
from abcli.config import LoraConfig, profiles_directory
from abcli.errors import UsageError
from abcli.profiles import catalogue
from abcli.profiles.store import save
from tests.cli.conftest import Command
from tests.profiles.samples import profile
from tests.support.lora import random_lora, write_lora, write_merged
from tests.support.models import checked_model
from tests.support.tiny_gguf import write_tiny_model

# One thread: several would wait for each other on a busy machine.
QUICK = ("-n", 12, "--temp", 0, "-t", 1, "-k", 2)


@pytest.fixture(autouse=True)
def _no_catalogue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No profile comes with abcli."""
    monkeypatch.setattr(catalogue, "catalogue_path", lambda: tmp_path / "catalogue.json")


@pytest.fixture(scope="session")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model; its name has a colon."""
    return write_lora(tmp_path_factory.mktemp("lora") / "a:1.gguf", random_lora(tiny_model))


# What is written -> the path and the scale; "there" and "there:2" are files that exist.
WORDS: dict[str, tuple[str, float]] = {
    "there": ("there", 1.0),
    "there:2": ("there:2", 1.0),
    "there:2:3": ("there:2", 3.0),
    "there:0.5": ("there", 0.5),
    "there:-1": ("there", -1.0),
    "there:+.25": ("there", 0.25),
    "there:1e-2": ("there", float(np.float32(0.01))),
    "there:0": ("there", 0.0),
    "there:-0.0": ("there", 0.0),
    "there:1e-60": ("there", 0.0),
    "missing:0.5": ("missing", 0.5),
    "missing:half": ("missing:half", 1.0),
    "missing:": ("missing:", 1.0),
    "missing:1_0": ("missing:1_0", 1.0),
    "missing: 1": ("missing: 1", 1.0),
    ":0.5": (":0.5", 1.0),
    r"C:\loras\a.gguf": (r"C:\loras\a.gguf", 1.0),
    r"C:\loras\a.gguf:0.5": (r"C:\loras\a.gguf", 0.5),
}


@pytest.mark.parametrize("word", WORDS)
def test_the_scale_is_a_number_after_the_last_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("there", "there:2"):
        (tmp_path / name).touch()
    path, scale = WORDS[word]
    assert parse_lora(word) == LoraConfig(Path(path), scale)


@pytest.mark.parametrize("scale", ["nan", "NaN", "inf", "-Infinity", "1e39", "-1e400"])
def test_scales_that_are_no_finite_numbers(scale: str) -> None:
    with pytest.raises(UsageError, match=f"the scale {scale} is impossible"):
        parse_lora(f"a.gguf:{scale}")


def test_the_same_file_twice(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "a")
    with pytest.raises(UsageError, match="is given twice"):
        parse_loras([f"{tmp_path}/a", f"{tmp_path}/link:0.5"])
    assert parse_loras(None) == parse_loras([]) == ()
    assert len(parse_loras([f"{tmp_path}/a", f"{tmp_path}/b"])) == 2


def report(abcli: Command, *arguments: object) -> dict[str, Any]:
    """What a run with --json prints, which says nothing else."""
    outcome = abcli("run", "--json", *arguments, *QUICK)
    assert (outcome.code, outcome.errors) == (0, b"")
    found: dict[str, Any] = json.loads(outcome.output)
    return found


@pytest.mark.parametrize("engine", ["contexts", "fused"])
def test_run_answers_as_the_merged_model_does(
    tiny_model: Path, adapter: Path, abcli: Command, tmp_path: Path, engine: str
) -> None:
    merged = write_merged(tmp_path / "merged.gguf", tiny_model, [(random_lora(tiny_model), 0.5)])
    ways = ("a question of some length, so that its prefill is shared", "--engine", engine)
    found = report(abcli, tiny_model, *ways, "--lora", f"{adapter}:0.5")
    assert found["text"] == report(abcli, merged, *ways)["text"]
    plain = report(abcli, tiny_model, *ways)
    assert found["text"] != plain["text"]
    assert found["lora"] == [{"path": str(adapter), "scale": 0.5}]
    assert plain["lora"] == []
    nothing = report(abcli, tiny_model, *ways, "--lora", f"{adapter}:0")
    assert (nothing["text"], nothing["lora"]) == (plain["text"], [])
    twice = report(
        abcli, tiny_model, *ways, "--lora-scaled", f"{adapter}:0.25", "--lora", _copy(adapter, tmp_path, 0.25)
    )
    assert twice["text"] == found["text"]


def _copy(adapter: Path, folder: Path, scale: float) -> str:
    path = folder / "copy.gguf"
    path.write_bytes(adapter.read_bytes())
    return f"{path}:{scale}"


@pytest.mark.parametrize(
    "command",
    [
        ("run", "MODEL", "hello"),
        ("chat", "MODEL"),
        ("eval", "kv", "MODEL"),
        ("calibrate", "MODEL"),
        ("inspect", "MODEL"),
    ],
)
def test_an_adapter_of_another_model_is_refused(
    tiny_model: Path, abcli: Command, tmp_path: Path, command: tuple[str, ...]
) -> None:
    other = write_tiny_model(tmp_path / "other.gguf", embedding=128)
    path = write_lora(tmp_path / "other-lora.gguf", random_lora(other))
    words = [tiny_model if word == "MODEL" else word for word in command]
    outcome = abcli(*words, "--lora", path)
    assert outcome.code == 1
    problem, hint = outcome.problem()
    assert f"{path} does not fit {tiny_model.name}" in problem
    assert "blk.0.attn_q.weight" in problem
    assert "the model it was made for" in hint


def test_bad_words_of_the_flag(tiny_model: Path, adapter: Path, abcli: Command) -> None:
    for flags, code, words in (
        (("--lora", "missing.gguf"), 1, "there is no file missing.gguf"),
        (("--lora", f"{adapter}:nan"), 2, "impossible"),
        (("--lora", adapter, "--lora", f"{adapter}:2"), 2, "given twice"),
        (("--lora", tiny_model), 1, "is no LoRA adapter"),
    ):
        outcome = abcli("run", tiny_model, "hello", *flags)
        assert outcome.code == code
        assert words in outcome.problem()[0]
    outcome = abcli("run", adapter, "hello")
    assert "is a LoRA adapter, not a model" in outcome.problem()[0]


def test_a_batch_is_bound_to_its_adapters(tiny_model: Path, adapter: Path, abcli: Command, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.txt", tmp_path / "answers.jsonl"
    prompts.write_text("one\ntwo\n")
    arguments = ("batch", tiny_model, prompts, "-o", output, *QUICK)
    assert abcli(*arguments, "--lora", adapter).code == 0
    assert abcli(*arguments, "--lora", adapter).code == 0
    for flags in ((), ("--lora", f"{adapter}:0.5")):
        outcome = abcli(*arguments, *flags)
        assert outcome.code != 0
        assert "model" in outcome.problem()[0]
    texts = [json.loads(line)["text"] for line in output.read_text().splitlines()]
    for prompt, text in zip(("one", "two"), texts, strict=True):
        assert report(abcli, tiny_model, prompt, "--lora", adapter)["text"] == text


def test_a_session_notices_other_adapters(tiny_model: Path, adapter: Path, abcli: Command) -> None:
    session = ("chat", tiny_model, *QUICK, "--session", "work")
    assert abcli(*session, "--lora", adapter, stdin=b"one").errors == b""
    assert abcli(*session, "--lora", adapter, stdin=b"two").errors == b""
    warning = "warning: the session was begun with another model: tiny.gguf + a:1.gguf\n"
    assert abcli(*session, stdin=b"three").errors.decode() == warning
    warning = "warning: the session was begun with another model: tiny.gguf\n"
    assert abcli(*session, "--lora", f"{adapter}:0.5", stdin=b"four").errors.decode() == warning


def test_profiles_belong_to_a_model_with_its_adapters(tiny_model: Path, adapter: Path, abcli: Command) -> None:
    model = checked_model(tiny_model, lora=[LoraConfig(adapter)])
    stored = profile("calm", fingerprint=model.fingerprint, model=model.name, native_base=10_000.0)
    save(stored, profiles_directory())
    quick = ("-n", 2, "-t", 1)
    for flags, used in (((), False), (("--lora", adapter), True), (("--lora", f"{adapter}:0.5"), False)):
        outcome = abcli("run", tiny_model, "hello", *quick, *flags)
        assert outcome.code == 0
        assert outcome.errors.decode().startswith("profile calm: ") == used
        named = abcli("run", tiny_model, "hello", *quick, *flags, "--profile", "calm")
        assert (named.code == 0) == used
    assert named.problem()[0] == "tiny.gguf + a:1.gguf:0.5 has no profile 'calm'"
    assert "tiny.gguf + a:1.gguf" in abcli("profiles", "show", "calm", "--model", tiny_model, "--lora", adapter).text
    assert abcli("profiles", "show", "calm", "--model", tiny_model).code == 1
    assert abcli("profiles", "show", "calm", "--lora", adapter).code == 2
    assert abcli("profiles", "remove", "calm", "--model", tiny_model, "--lora", adapter).code == 0


def test_an_evaluation_records_the_adapters(tiny_model: Path, adapter: Path, abcli: Command) -> None:
    asked = (
        "eval",
        "kv",
        tiny_model,
        "--length",
        400,
        "--limit",
        10,
        "--depths",
        2,
        "-t",
        1,
        "--compare",
        "native",
        "--json",
    )
    found = [json.loads(abcli(*asked, *flags).output) for flags in ((), ("--lora", adapter), ())]
    assert [one["model"]["name"] for one in found] == ["tiny.gguf", "tiny.gguf + a:1.gguf", "tiny.gguf"]
    model = checked_model(tiny_model, lora=[LoraConfig(adapter)])
    assert found[1]["model"]["fingerprint"] == model.fingerprint != found[0]["model"]["fingerprint"]
    scores = [[question["scores"] for question in one["questions"]] for one in found]
    assert scores[0] == scores[2] != scores[1]


def test_a_calibration_is_for_the_model_with_its_adapters(tiny_model: Path, adapter: Path, abcli: Command) -> None:
    few = ("--task", "kv", "--length", 400, "--depths", 2, "--limit", 6, "--held-out", 6, "-t", 1, "--buckets", 2)
    outcome = abcli(
        "calibrate", tiny_model, *few, "--rules", "mean", "--prefill-bases", "none", "--keep", "--lora", adapter
    )
    assert outcome.code == 0
    used = abcli("run", tiny_model, "hello", "-n", 2, "-t", 1, "--lora", adapter)
    assert used.errors.decode().startswith("profile kv-400: ")
    assert abcli("run", tiny_model, "hello", "-n", 2, "-t", 1).errors == b""
    (line,) = (line for line in abcli("profiles").text.splitlines() if line.startswith("kv-400"))
    assert "tiny.gguf + a:1.gguf" in line


def test_inspect_tells_what_an_adapter_is(tiny_model: Path, adapter: Path, abcli: Command) -> None:
    text = abcli("inspect", adapter).text
    for words in ("architecture          llama", "rank                  4 (1 times)", "attn_q x 2", "a:1.gguf"):
        assert words in text
    found = json.loads(abcli("inspect", adapter, "--json").output)
    assert (found["kind"], found["ranks"], found["changes"]["ffn_up"]) == ("lora", [4], 2)
    text = abcli("inspect", tiny_model, "--lora", f"{adapter}:2").text
    assert "4 (2 times); alpha 4, scale 2" in text
    assert "LoRA adapters" in text
    found = json.loads(abcli("inspect", tiny_model, "--lora", adapter, "--json").output)
    assert found["adapters"][0]["path"] == str(adapter)
    assert found["memory"]["parts"]["adapters"] == sum(share["size_bytes"] for share in found["adapters"][0]["types"])
    assert abcli("inspect", adapter, "--lora", adapter).code == 2
    plain = json.loads(abcli("inspect", tiny_model, "--json").output)
    assert (plain["adapters"], plain["memory"]["parts"]["adapters"]) == ([], 0)


def test_names_in_an_adapter_cannot_steer_the_terminal(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    names = dict.fromkeys(("general.name", "general.base_model.0.name", "adapter.lora.task_name"), "a\x1b[31m\nb")
    path = write_lora(tmp_path / "a.gguf", random_lora(tiny_model), metadata=names)
    text = abcli("inspect", path).text
    assert "\x1b" not in text
    assert "a[31m b" in text


def checks(abcli: Command, *arguments: object, code: int = 0) -> dict[str, dict[str, Any]]:
    """What verify finds, by the checks' names."""
    outcome = abcli("verify", "--json", *arguments)
    assert outcome.code == code
    return {check["name"]: check for check in json.loads(outcome.output)["checks"]}


def test_verify_checks_an_adapter(tiny_model: Path, adapter: Path, abcli: Command, tmp_path: Path) -> None:
    alone = checks(abcli, adapter)
    assert alone["matrices"]["detail"] == "14 pairs of matrices of rank 4"
    assert {name for name, check in alone.items() if check["status"] != "ok"} == {"trial"}
    together = checks(abcli, tiny_model, "--lora", f"{adapter}:0.5")
    assert all(check["status"] == "ok" for check in together.values())
    assert "fit" in together[f"lora {adapter.name}"]["detail"]
    assert "with its adapters" in together["trial"]["detail"]
    assert abcli("verify", adapter, "--lora", adapter).code == 2
    other = write_tiny_model(tmp_path / "other.gguf", layers=1)
    found = checks(abcli, other, "--lora", adapter, code=1)
    assert "blk.1.attn_q.weight" in found[f"lora {adapter.name}"]["detail"]
    assert found["trial"]["status"] == "skipped"
    broken = {"blk.0.attn_q.weight.lora_a": np.full((4, 64), np.inf, np.float32)}
    path = write_lora(tmp_path / "b.gguf", random_lora(tiny_model), tensors=broken)
    assert checks(abcli, path, code=1)["weights"]["status"] == "failed"
    assert checks(abcli, tiny_model, "--lora", path, code=1)["weights of b.gguf"]["status"] == "failed"
    path = write_lora(tmp_path / "c.gguf", random_lora(tiny_model), metadata={"adapter.lora.alpha": 1})
    assert "alpha is u32" in checks(abcli, path, code=1)["matrices"]["detail"]
