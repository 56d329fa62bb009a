"""Flags: spelling, defaults, contradictions, and where the prompt comes from."""

from __future__ import annotations

import io
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import abcli.cli._setup as loading
from abcli.cli._options import (
    AnswerOptions,
    BucketOptions,
    ModelOptions,
    ProfiledBucketOptions,
    SamplingOptions,
    parse_logit_bias,
)
from abcli.cli._prompt_options import gather_prompt, split_words
from abcli.cli.main import call
from abcli.config import MAX_BUCKETS, BucketConfig, ContextConfig, ModelConfig
from abcli.errors import AbcliError, PromptError, UsageError
from abcli.sampling import GenerationConfig, SamplingConfig
from tests.cli.conftest import Command

# As llama-cli and llama-server spell them.
PROMPT_FLAGS = ("-p", "--prompt", "-f", "--file")
LLAMA_CPP_FLAGS = [
    *PROMPT_FLAGS,
    *("-m", "--model", "-sys", "-n", "--predict", "-c", "--ctx-size"),
    *("-b", "--batch-size", "-ub", "--ubatch-size", "-t", "--threads", "-ngl", "--gpu-layers", "-fa", "--flash-attn"),
    *("-ctk", "--cache-type-k", "-ctv", "--cache-type-v", "--temp", "--top-k", "--top-p", "--min-p", "--typical"),
    *("--top-n-sigma", "--xtc-probability", "--xtc-threshold", "--dry-multiplier", "--dry-base"),
    *("--dry-allowed-length", "--dry-penalty-last-n", "--dry-sequence-breaker", "--repeat-last-n", "--repeat-penalty"),
    *("--frequency-penalty", "--presence-penalty", "--mirostat", "--mirostat-ent", "--mirostat-lr", "--logit-bias"),
    *("-s", "--seed", "--grammar", "--grammar-file", "-j", "--json-schema", "--ignore-eos", "--chat-template", "-v"),
]


@pytest.mark.parametrize(
    ("words", "has_model", "has_prompt", "expected"),
    [
        ([], False, False, (None, None)),
        (["hello"], False, False, (None, "hello")),
        (["m.gguf"], False, False, ("m.gguf", None)),
        (["M.GGUF"], False, False, ("M.GGUF", None)),
        (["default"], False, False, ("default", None)),
        (["m.gguf", "hello"], False, False, ("m.gguf", "hello")),
        (["folder/model", "hello"], False, False, ("folder/model", "hello")),
        (["m.gguf"], True, False, (None, "m.gguf")),
        (["folder/model"], False, True, ("folder/model", None)),
        (["hello"], True, True, (None, "hello")),
        (["~nobody-of-this-name/x"], False, False, (None, "~nobody-of-this-name/x")),
        (["a\0b"], False, False, (None, "a\0b")),
        (["x" * 5000], False, False, (None, "x" * 5000)),
    ],
)
def test_positional_words(
    words: list[str], has_model: bool, has_prompt: bool, expected: tuple[str | None, str | None]
) -> None:
    assert split_words(words, has_model=has_model, has_prompt=has_prompt) == expected


def test_an_existing_file_is_the_model(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.touch()
    assert split_words([str(path)], has_model=False, has_prompt=False) == (str(path), None)


def test_three_words_are_too_many() -> None:
    with pytest.raises(UsageError, match="3 words"):
        split_words(["a", "b", "c"], has_model=False, has_prompt=False)


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes, *, terminal: bool = False) -> None:
    """Make `data` standard input."""
    stream = io.TextIOWrapper(io.BytesIO(data))
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(sys, "stdin", stream)


def test_the_prompt_comes_from_where_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("from the file\n\n", encoding="utf-8")
    pipe(monkeypatch, "from the pipe \u20ac\n".encode())
    assert gather_prompt("typed", None) == "typed"
    assert gather_prompt(None, str(path)) == "from the file\n\n"
    assert gather_prompt("typed", str(path)) == "from the file\n\ntyped"
    assert gather_prompt(None, None) == "from the pipe \u20ac\n"


@pytest.mark.parametrize(("text", "expected"), [(None, "data\n"), ("typed", "data\n\ntyped")])
def test_a_dash_is_standard_input(text: str | None, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"data\n")
    assert gather_prompt(text, "-") == expected


def test_a_terminal_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, b"never read", terminal=True)
    with pytest.raises(PromptError, match="there is no prompt"):
        gather_prompt(None, None)


@pytest.mark.parametrize(
    ("text", "data"), [("", b"x"), (" \n\t", b"x"), (None, b""), (None, b"\n\n"), (None, b"\xff"), ("a\udcffb", b"x")]
)
def test_prompts_that_are_none(text: str | None, data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, data)
    with pytest.raises(PromptError):
        gather_prompt(text, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("15043+1", (15043, 1.0)),
        ("15043-1.5", (15043, -1.5)),
        ("7+inf", (7, math.inf)),
        ("7-inf", (7, -math.inf)),
        ("0+1e-3", (0, 0.001)),
        (" 3 -2", (3, -2.0)),
    ],
)
def test_logit_bias(text: str, expected: tuple[int, float]) -> None:
    assert parse_logit_bias(text) == expected


@pytest.mark.parametrize("text", ["", "7", "+1", "7+", "7-", "7+x", "-7+1", "x+1", "1.5+1", "7++1", "7=1"])
def test_wrong_logit_bias(text: str) -> None:
    with pytest.raises(UsageError, match="logit-bias"):
        parse_logit_bias(text)


def test_bucket_options() -> None:
    assert BucketOptions(buckets=3, spread="paper", merge="max").config() == BucketConfig(3, "paper", merge="max")
    assert BucketOptions(bases="50000,100000").config() == BucketConfig(2, bases=(50000.0, 100000.0))
    assert BucketOptions(multipliers="0.5, 1,2", buckets=3).config() == BucketConfig(3, multipliers=(0.5, 1.0, 2.0))


@pytest.mark.parametrize(
    "options",
    [
        {"bases": "1e4", "multipliers": "1"},
        {"bases": "1e4,2e4", "buckets": 3},
        {"multipliers": "1,2", "buckets": 6},
        {"bases": "1e4", "spread": "symmetric"},
        {"multipliers": "1", "spread": "paper"},
        {"buckets": 0},
        {"buckets": -1},
        {"buckets": MAX_BUCKETS + 1},
        {"bases": ",".join(["1e4"] * (MAX_BUCKETS + 1))},
        {"bases": ""},
        {"bases": "1e4,,2e4"},
        {"multipliers": "1;2"},
    ],
)
def test_contradictory_buckets(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        BucketOptions(**options).config()
    assert caught.value.hint


def test_what_is_given_is_known() -> None:
    assert BucketOptions().given() is ProfiledBucketOptions(profile="x").given() is None
    assert BucketOptions(spread="paper", merge="max").given() == "--spread paper"
    # A default that is written out is given, too.
    assert BucketOptions(merge="confidence").given() == "--merge confidence"
    assert BucketOptions(buckets=6).given() == "--buckets 6"


def test_a_profile_is_given_alone() -> None:
    assert ProfiledBucketOptions(profile="x").config() == BucketConfig()
    assert ProfiledBucketOptions(profile="none", buckets=2).config() == BucketConfig(2)
    for options in ({"merge": "mean"}, {"buckets": 0}):
        with pytest.raises(UsageError, match=r"--profile x and --\w+ \w+ are both given"):
            ProfiledBucketOptions(profile="x", **options).config()
    with pytest.raises(UsageError, match="cannot be the name"):
        ProfiledBucketOptions(profile="a/b").config()


def test_the_most_buckets_are_allowed() -> None:
    assert BucketOptions(buckets=MAX_BUCKETS).config().count == MAX_BUCKETS


def test_defaults_are_those_of_the_configuration() -> None:
    assert SamplingOptions().config() == SamplingConfig()
    assert AnswerOptions().config(SamplingConfig()) == GenerationConfig()
    assert BucketOptions().config() == ProfiledBucketOptions().config() == BucketConfig()
    assert ModelOptions(model="x.gguf").model_config(None) == ModelConfig(Path("x.gguf"))
    assert ModelOptions().context_config() == ContextConfig()


def test_defaults_survive_the_parser(abcli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    answer_config = AnswerOptions.config

    def spy(self: AnswerOptions, sampling: SamplingConfig, gate: float | None) -> GenerationConfig:
        seen.append(answer_config(self, sampling, gate))
        return GenerationConfig()

    def stop(model: ModelConfig, context: ContextConfig, asked: BucketConfig | None, **others: object) -> None:
        del others["warn"]
        seen.extend([model, context, asked, others])
        raise AbcliError("far enough")

    monkeypatch.setattr(AnswerOptions, "config", spy)
    monkeypatch.setattr(loading, "prepare", stop)
    assert abcli("run", "x.gguf", "hello").code == 1
    model = [ModelConfig(Path("x.gguf")), ContextConfig(), None, {"prefill_base": None, "profile": "auto"}]
    assert seen == [GenerationConfig(), *model]


def test_every_value_arrives() -> None:
    options = SamplingOptions(temperature=0.1, typical_p=0.2, mirostat=2, mirostat_tau=3.0, mirostat_eta=0.4, seed=5)
    expected = SamplingConfig(
        temperature=0.1, typical_p=0.2, mirostat=2, mirostat_tau=3.0, mirostat_eta=0.4, seed=5, dry_breakers=("x",)
    )
    assert SamplingOptions(**{**vars(options), "dry_sequence_breaker": ["x"]}).config() == expected
    answer = AnswerOptions(predict=7, stop=["a", "b"], ignore_eos=True).config(SamplingConfig())
    assert answer == GenerationConfig(max_tokens=7, stop=("a", "b"), ignore_eos=True)


def test_grammars_are_read_from_files(tmp_path: Path) -> None:
    grammar, schema = tmp_path / "g.gbnf", tmp_path / "s.json"
    grammar.write_text('root ::= "a"', encoding="utf-8")
    schema.write_text('{"type": "null"}', encoding="utf-8")
    assert SamplingOptions(grammar_file=grammar).config().grammar == 'root ::= "a"'
    assert SamplingOptions(json_schema_file=schema).config().json_schema == '{"type": "null"}'
    with pytest.raises(UsageError, match="--grammar-file are both"):
        SamplingOptions(grammar="x", grammar_file=grammar).config()
    with pytest.raises(PromptError, match="no file"):
        SamplingOptions(grammar_file=tmp_path / "none").config()


@pytest.mark.parametrize(
    "options", [{"ctx_size": -1}, {"ctx_size": 2**31}, {"batch_size": 0}, {"threads": -1}, {"gpu_layers": -2}]
)
def test_impossible_numbers(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="impossible"):
        ModelOptions(model="x.gguf", **options).model_config(None)


def test_two_models_are_one_too_many() -> None:
    with pytest.raises(UsageError, match=r"two models: a\.gguf and b\.gguf"):
        ModelOptions(model="b.gguf").model_config("a.gguf")


def test_flags_are_spelled_as_in_llama_cpp(help_texts: dict[str, str]) -> None:
    for command, text in help_texts.items():
        # A chat reads its messages from standard input.
        expected = [flag for flag in LLAMA_CPP_FLAGS if command == "run" or flag not in PROMPT_FLAGS]
        assert [flag for flag in expected if not re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", text)] == []


@pytest.fixture(scope="module")
def help_texts() -> dict[str, str]:
    """The help of each command, wide enough that no flag is broken into lines."""
    texts = {}
    for command in ("run", "chat"):
        with pytest.MonkeyPatch.context() as patch:
            output = io.StringIO()
            patch.setattr(sys, "stdout", output)
            patch.setenv("COLUMNS", "200")
            patch.setattr("typer.rich_utils.MAX_WIDTH", 200)
            assert call([command, "--help"]) == 0
        texts[command] = output.getvalue()
    return texts


def test_help_names_what_there_is(abcli: Command, help_texts: dict[str, str]) -> None:
    for arguments in (["--help"], ["-h"]):
        outcome = abcli(*arguments)
        assert (outcome.code, outcome.errors) == (0, b"")
        assert "run" in outcome.text
        assert "chat" in outcome.text
    for text in help_texts.values():
        for flag in ("--buckets", "--bases", "--multipliers", "--spread", "--merge", "--profile", "--stats", "--help"):
            assert flag in text
        # Square brackets are also rich's markup, in which a default can disappear.
        for default in ("6", "symmetric", "confidence", "auto", "on a terminal", "0.95"):
            assert f"[default: {default}]" in text
    for flag in ("--session", "--no-save", "--overflow"):
        assert flag in help_texts["chat"]


def test_no_arguments_show_the_help_alone(abcli: Command) -> None:
    outcome = abcli()
    assert outcome.code == 2
    assert b"chat" in outcome.output + outcome.errors
    assert b"error" not in outcome.errors


def test_version_shows_the_build_and_devices(abcli: Command) -> None:
    outcome = abcli("--version")
    assert (outcome.code, outcome.errors) == (0, b"")
    first, second, *devices = outcome.text.splitlines()
    assert first.startswith("abcli ")
    assert second.startswith("llama.cpp ")
    assert "llama-cpp-python" in second
    assert any(line.startswith("device ") for line in devices)


def test_all_short_flags_at_once(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    grammar = tmp_path / "grammar.gbnf"
    grammar.write_text("root ::= [a-z]+", encoding="utf-8")
    outcome = abcli(
        *("run", "-m", tiny_model, "-p", "hello", "-sys", "be brief", "-n", "4", "-c", "256", "-b", "64", "-ub", "32"),
        *("-t", "2", "-ngl", "0", "-fa", "on", "-ctk", "f16", "-ctv", "bf16", "--temp", "0.5", "--top-k", "5"),
        *("--top-p", "0.9", "--min-p", "0.1", "--repeat-penalty", "1.1", "-s", "3", "--grammar-file", grammar),
    )
    assert (outcome.code, outcome.errors) == (0, b"")
    assert re.fullmatch("[a-z]{4,}", outcome.text)
