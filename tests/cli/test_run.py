"""`abcli run`: what stands on standard output and error, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abcli.config import MERGE_RULES
from tests.cli.conftest import PATIENCE, Command, command_line
from tests.cli.pseudo_terminal import PseudoTerminal
from tests.support.tiny_gguf import write_tiny_model

Spawn = Callable[..., "subprocess.Popen[bytes]"]


def answer(abcli: Command, *arguments: object, stdin: bytes = b"") -> str:
    """The answer of a run that must work and say nothing else."""
    outcome = abcli("run", *arguments, stdin=stdin)
    assert (outcome.code, outcome.errors) == (0, b"")
    assert outcome.output.endswith(b"\n") or not outcome.output
    return outcome.text


def report(abcli: Command, *arguments: object) -> dict[str, Any]:
    """What --json prints."""
    outcome = abcli("run", "--json", *arguments)
    assert (outcome.code, outcome.errors) == (0, b"")
    assert outcome.output.count(b"\n") == 1
    found: dict[str, Any] = json.loads(outcome.output)
    return found


def test_the_answer_stands_alone_on_standard_output(tiny_model: Path, process: Command) -> None:
    outcome = process("run", tiny_model, "hello", "-n", 8, "-s", 1)
    assert (outcome.code, outcome.errors) == (0, b"")
    assert outcome.text
    told = process("run", tiny_model, "hello", "-n", 8, "-s", 1, "--stats")
    assert told.output == outcome.output
    assert b"answer 8 tokens" in told.errors
    assert told.errors.count(b"\n") == 1


def test_a_gate_lets_one_bucket_decide(tiny_model: Path, abcli: Command) -> None:
    arguments = (tiny_model, "hello " * 20, "-n", 12, "--temp", 0)
    single = report(abcli, *arguments, "--buckets", 1)
    never, always = (report(abcli, *arguments, "--gate", gate) for gate in (1, 0))
    assert (never["text"], never["asked"]) == (answer(abcli, *arguments).removesuffix("\n"), 1)
    assert (always["text"], always["asked"]) == (single["text"], 0)
    for wrong in ("1.5", "nan", "maybe"):
        outcome = abcli("run", *arguments, "--gate", wrong)
        assert outcome.code == 2
        assert b"--gate" in outcome.errors
        assert b"from 0 to 1, auto, or off" in outcome.errors


def test_json_has_the_documented_keys(tiny_model: Path, abcli: Command) -> None:
    arguments = (tiny_model, "hello", "-n", 8, "-s", 1)
    found = report(abcli, *arguments)
    numbers = {
        "bases": list,
        "merge": str,
        "seed": int,
        "agreement": float,
        "asked": float,
        "usage": dict,
        "timings": dict,
    }
    kinds = {
        "text": str,
        "reasoning": str,
        "tool_calls": list,
        "finish_reason": str,
        "model": str,
        "lora": list,
        **numbers,
    }
    assert {key: type(value) for key, value in found.items()} == kinds
    assert found["text"] == answer(abcli, *arguments)
    assert found["finish_reason"] == "length"
    assert found["model"] == str(tiny_model)
    assert (found["merge"], found["seed"], len(found["bases"])) == ("confidence", 1, 6)
    assert 0 < found["agreement"] < 1
    assert found["asked"] == 1
    usage = found["usage"]
    assert usage == {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": 8,
        "total_tokens": usage["prompt_tokens"] + 8,
    }
    assert set(found["timings"]) == {"load_s", "prefill_s", "decode_s"}
    assert all(isinstance(value, float) and value > 0 for value in found["timings"].values())


def test_the_seed_decides(tiny_model: Path, abcli: Command) -> None:
    def with_seed(seed: int) -> str:
        return answer(abcli, tiny_model, "hello", "-n", 16, "--temp", 1.5, "-s", seed)

    assert with_seed(1) == with_seed(1)
    assert with_seed(1) != with_seed(2)


def test_a_random_seed_is_told_and_repeats_the_text(tiny_model: Path, abcli: Command) -> None:
    first = report(abcli, tiny_model, "hello", "-n", 16, "--temp", 1.5)
    again = report(abcli, tiny_model, "hello", "-n", 16, "--temp", 1.5, "-s", first["seed"])
    assert again["text"] == first["text"]
    other = report(abcli, tiny_model, "hello", "-n", 16, "--temp", 1.5)
    assert other["seed"] != first["seed"]


def test_temperature_zero_needs_no_seed(tiny_model: Path, abcli: Command) -> None:
    texts = {answer(abcli, tiny_model, "hello", "-n", 16, "--temp", 0, "-s", seed) for seed in (1, 2)}
    assert len(texts) == 1


def test_the_prompt_comes_from_argument_flag_file_and_pipe(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("hello", encoding="utf-8")
    fixed = ("-n", 8, "-s", 1)
    texts = {
        answer(abcli, tiny_model, "hello", *fixed),
        answer(abcli, "-m", tiny_model, "hello", *fixed),
        answer(abcli, tiny_model, "-p", "hello", *fixed),
        answer(abcli, tiny_model, "-f", path, *fixed),
        answer(abcli, tiny_model, *fixed, stdin=b"hello"),
        answer(abcli, tiny_model, "-f", "-", *fixed, stdin=b"hello"),
    }
    assert len(texts) == 1
    assert answer(abcli, tiny_model, "-f", path, "more", *fixed) == answer(abcli, tiny_model, "hello\n\nmore", *fixed)


def test_a_question_can_follow_a_file(real_model: Path, abcli: Command, tmp_path: Path) -> None:
    """Without a model argument the single word is the question, not a model."""
    path = tmp_path / "prompt.txt"
    path.write_text("1 2 3 4", encoding="utf-8")
    found = report(abcli, "-f", path, "Go on.", "-n", 1, "-k", 1)
    assert found["model"].endswith(real_model.name)


def test_raw_text_has_no_template(tiny_model: Path, abcli: Command) -> None:
    def prompt_tokens(*arguments: str) -> int:
        count: int = report(abcli, tiny_model, *arguments, "-n", 0, "-k", 1)["usage"]["prompt_tokens"]
        return count

    plain = prompt_tokens("hello", "--raw")
    assert plain <= 5
    assert prompt_tokens("hello") > plain + 10
    assert prompt_tokens("<|im_start|>hello", "--raw", "--parse-special") == plain + 1
    assert prompt_tokens("<|im_start|>hello", "--raw") > plain + 5


def test_the_system_prompt_arrives(tiny_model: Path, abcli: Command) -> None:
    plain = report(abcli, tiny_model, "hello", "-n", 0)["usage"]["prompt_tokens"]
    assert report(abcli, tiny_model, "hello", "-n", 0, "-sys", "brief")["usage"]["prompt_tokens"] > plain + 5


@pytest.mark.parametrize(
    ("flags", "bases"),
    [
        (["--buckets", "1"], [10000]),
        (["--buckets", "3"], [5000, 10000, 20000]),
        (["--bases", "50000,1e5"], [50000, 100000]),
        (["--multipliers", "0.5,1,4"], [5000, 10000, 40000]),
        (["--spread", "paper"], [10000, 17500, 18000, 19000, 20000, 25000]),
        (["--spread", "paper", "--buckets", "1"], [10000]),
    ],
)
def test_bases(flags: list[str], bases: list[float], tiny_model: Path, abcli: Command) -> None:
    found = report(abcli, tiny_model, "hello", "-n", 3, *flags)
    assert found["bases"] == pytest.approx(bases)
    assert (found["agreement"] == 1) == (len(bases) == 1)


def test_the_native_base_is_among_the_default_ones(tiny_model: Path, abcli: Command) -> None:
    bases = report(abcli, tiny_model, "hello", "-n", 0)["bases"]
    assert 10000.0 in bases
    assert (min(bases), max(bases)) == (5000.0, 20000.0)
    assert bases == sorted(bases)


def test_every_merge_rule_answers(tiny_model: Path, abcli: Command) -> None:
    found = {}
    for rule in MERGE_RULES:
        made = report(abcli, tiny_model, "hello", "-n", 24, "-s", 1, "--merge", rule)
        assert made["merge"] == rule
        assert made["usage"]["completion_tokens"] > 0
        found[rule] = made["text"]
    # Random weights disagree enough for the rules to matter.
    assert len(set(found.values())) > 1


def test_with_one_bucket_the_merge_rules_are_the_same(tiny_model: Path, abcli: Command) -> None:
    texts = {answer(abcli, tiny_model, "hi", "-n", 16, "-s", 1, "-k", 1, "--merge", rule) for rule in MERGE_RULES}
    assert len(texts) == 1


def test_grammar(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    path = tmp_path / "choice.gbnf"
    path.write_text('root ::= "yes" | "no"', encoding="utf-8")
    assert answer(abcli, tiny_model, "hello", "--grammar-file", path) in ("yes", "no")
    found = report(abcli, tiny_model, "hello", "--grammar", 'root ::= "perhaps"')
    assert (found["text"], found["finish_reason"]) == ("perhaps", "stop")


def test_json_schema(tiny_model: Path, abcli: Command) -> None:
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}, "b": {"type": "boolean"}}, "required": ["n", "b"]}
    made = json.loads(answer(abcli, tiny_model, "hello", "-j", json.dumps(schema), "-n", 200, "-s", 1))
    assert set(made) == {"n", "b"}
    assert made["n"] in (1, 2)
    assert isinstance(made["b"], bool)


def test_escapes_are_read_as_in_llama_cpp(tiny_model: Path, abcli: Command) -> None:
    arguments = (tiny_model, "hello", "--grammar", 'root ::= "ab\\ncd"', "-k", 1)
    assert report(abcli, *arguments, "-r", r"\n")["text"] == "ab"
    assert report(abcli, *arguments, "-r", r"\n", "--no-escape")["text"] == "ab\ncd"
    assert (
        abcli("run", *arguments, "-r", r"\xff").problem()[0]
        == r"--stop '\\xff' is not UTF-8 after its escapes are read"
    )

    def prompt_tokens(*flags: str) -> int:
        return int(report(abcli, tiny_model, r"a\nb", "--raw", "-n", 0, "-k", 1, *flags)["usage"]["prompt_tokens"])

    # Each letter is a token here.
    assert (prompt_tokens(), prompt_tokens("--escape"), prompt_tokens("-e")) == (4, 3, 3)


def test_text_of_the_command_line_may_begin_with_a_byte_order_mark(
    tiny_model: Path, abcli: Command, tmp_path: Path
) -> None:
    mark, schema, grammar = "\ufeff", '{"const": true}', 'root ::= "yes"'
    assert answer(abcli, tiny_model, "hello", "-k", 1, "-j", mark + schema) == "true"
    assert answer(abcli, tiny_model, "hello", "-k", 1, "--grammar", mark + grammar) == "yes"
    for flag, text in (("--json-schema-file", schema), ("--grammar-file", grammar)):
        path = tmp_path / "text"
        path.write_text(mark + text, encoding="utf-8")
        assert answer(abcli, tiny_model, "hello", "-k", 1, flag, path) in ("true", "yes")
    flags = ("--temp", 0, "-n", 4, "-k", 1)
    marked = report(abcli, tiny_model, mark + "hello", "-sys", mark + "be kind", *flags)
    assert marked["usage"] == report(abcli, tiny_model, "hello", "-sys", "be kind", *flags)["usage"]


def test_stop_strings_end_the_answer_and_are_not_part_of_it(tiny_model: Path, abcli: Command) -> None:
    arguments = (tiny_model, "hello", "-s", 1, "--grammar", 'root ::= "abcdefgh"')
    found = report(abcli, *arguments, "--stop", "x", "--stop", "de")
    assert (found["text"], found["finish_reason"]) == ("abc", "stop")
    assert answer(abcli, *arguments, "-r", "ab") == ""


def test_no_tokens_at_all(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("run", tiny_model, "hello", "-n", 0)
    assert (outcome.code, outcome.output, outcome.errors) == (0, b"", b"")
    found = report(abcli, tiny_model, "hello", "-n", 0)
    assert (found["text"], found["finish_reason"], found["usage"]["completion_tokens"]) == ("", "length", 0)


def test_the_answer_ends_where_the_context_does(tiny_model: Path, abcli: Command) -> None:
    found = report(abcli, tiny_model, "hello", "-c", 40, "--ignore-eos", "-s", 1)
    assert found["finish_reason"] == "length"
    # The last token is sampled, but needs no room.
    assert found["usage"]["total_tokens"] == 41


def test_a_context_longer_than_trained_is_warned_about(abcli: Command, tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "short.gguf", context_length=128)
    outcome = abcli("run", model, "hello", "-n", 1, "-c", 256)
    assert outcome.code == 0
    assert outcome.errors == b"warning: a context of 256 tokens is longer than the 128 the model was trained with\n"
    assert abcli("run", model, "hello", "-n", 1, "-c", 0).errors == b""


def test_verbose_tells_what_was_decided(tiny_model: Path, process: Command) -> None:
    outcome = process("run", tiny_model, "hello", "-n", 1, "--bases", "5e3,1e4", "-v")
    assert outcome.code == 0
    assert b"bases 5000, 10000; merge confidence" in outcome.errors
    assert b"llama_" in outcome.errors


def test_a_broken_pipe_ends_quietly(tiny_model: Path, spawn: Spawn) -> None:
    process = spawn("run", tiny_model, "hello", "--ignore-eos")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.read(5)
    process.stdout.close()
    assert process.wait(PATIENCE) == 1
    assert process.stderr.read() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_full_disk_is_one_error(flags: list[str], tiny_model: Path) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            command_line("run", tiny_model, "hello", "-n", 4, *flags),
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=PATIENCE,
            check=False,
        )
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert len(lines) == 2
    assert "No space left" in lines[0]


@pytest.mark.skipif(os.name == "nt", reason="needs a POSIX shell")
@pytest.mark.parametrize(
    ("closing", "code", "output", "errors"),
    [
        (">&-", 2, False, ["error: standard output is closed", "hint: send it to /dev/null to drop the answer"]),
        ("2>&-", 0, True, []),
        ("<&-", 0, True, []),
        ("<&- >&- 2>&-", 2, False, []),
    ],
)
def test_closed_standard_streams(closing: str, code: int, output: bool, errors: list[str], tiny_model: Path) -> None:
    shell = ["sh", "-c", f'"$@" {closing}', "sh", *command_line("run", tiny_model, "hello", "-n", 4, "-s", 1)]
    done = subprocess.run(shell, capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == code
    assert bool(done.stdout) == output
    assert done.stderr.decode().splitlines() == errors


def test_interrupting_keeps_what_was_written(tiny_model: Path, spawn: Spawn) -> None:
    process = spawn("run", tiny_model, "hello", "--ignore-eos")
    assert process.stdout is not None
    assert process.stderr is not None
    beginning = process.stdout.read(10)
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(PATIENCE) == 130
    assert beginning
    assert rest.endswith(b"\n")
    assert process.stderr.read() == b"error: interrupted\n"


def test_interrupting_before_there_is_an_answer(spawn: Spawn, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    process = spawn("run", "none.gguf", "-f", pipe)
    # Opening for writing returns when the process reads: it waits for a prompt that does not come.
    with pipe.open("wb"):
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
    assert process.stderr is not None
    # The parser of some versions of typer is silent here.
    assert process.stderr.read() in (b"", b"error: interrupted\n")


def test_on_a_terminal_there_are_statistics(tiny_model: Path, terminal: Callable[..., PseudoTerminal]) -> None:
    screen, code = terminal("run", tiny_model, "hello", "-n", 5, "-s", 1, "--engine", "contexts").until_end()
    assert code == 0
    assert "loading tiny.gguf" in screen
    assert "answer 5 tokens" in screen
    assert "6 buckets agree on" in screen


def test_forced_colour_brings_no_spinner_into_a_pipe(
    tiny_model: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert answer(abcli, tiny_model, "hello", "-n", 2)
