"""What people get wrong: every mistake is one line of error, one of advice and an exit code, never a crash."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from abcli.chat.known_templates import KNOWN_TEMPLATES
from tests.cli.conftest import Command
from tests.support.tiny_gguf import write_tiny_mamba, write_tiny_model

# Makes a file that is no model, given a sound one; returns where it is.
Damage = Callable[[Path, Path], Path]


def missing(_model: Path, folder: Path) -> Path:
    """A path where nothing is."""
    return folder / "missing.gguf"


def directory(_model: Path, folder: Path) -> Path:
    """A directory."""
    return folder


def empty(_model: Path, folder: Path) -> Path:
    """A file of no bytes."""
    path = folder / "empty.gguf"
    path.touch()
    return path


def truncated(model: Path, folder: Path) -> Path:
    """The first half of a model."""
    path = folder / "truncated.gguf"
    size = model.stat().st_size // 2
    with model.open("rb") as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)
        target.truncate(size)
    return path


def without_last_byte(model: Path, folder: Path) -> Path:
    """A model whose last byte is missing."""
    path = folder / "short.gguf"
    path.write_bytes(model.read_bytes()[:-1])
    return path


def header_only(model: Path, folder: Path) -> Path:
    """The first hundred bytes of a model."""
    path = folder / "header.gguf"
    path.write_bytes(model.read_bytes()[:100])
    return path


def picture(_model: Path, folder: Path) -> Path:
    """A PNG file under another name."""
    path = folder / "picture.gguf"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
    return path


def noise(model: Path, folder: Path) -> Path:
    """Random bytes after the first kilobytes of a model."""
    path = folder / "noise.gguf"
    path.write_bytes(model.read_bytes()[:2000] + random.Random(1).randbytes(100_000))
    return path


def without_tokenizer(_model: Path, folder: Path) -> Path:
    """A model that has no vocabulary."""
    return write_tiny_model(folder / "mute.gguf", tokenizer=False)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (missing, "there is no file"),
        (directory, "is a directory"),
        (empty, "is empty"),
        (truncated, "is truncated"),
        (without_last_byte, "is truncated: 1 of"),
        (header_only, "header.gguf"),
        (picture, "is a PNG image"),
        (noise, "noise.gguf"),
        (without_tokenizer, "has no tokenizer"),
    ],
)
def test_files_that_are_no_models(damage: Damage, words: str, tiny_model: Path, tmp_path: Path, abcli: Command) -> None:
    path = damage(tiny_model, tmp_path)
    outcome = abcli("run", "-m", path, "hello", "-n", 1)
    assert (outcome.code, outcome.output) == (1, b"")
    error, _ = outcome.problem()
    assert words in error
    assert path.name in error


def test_a_truncated_real_model(real_model: Path, tmp_path: Path, process: Command) -> None:
    outcome = process("run", truncated(real_model, tmp_path), "hello", "-n", 1)
    assert (outcome.code, outcome.output) == (1, b"")
    assert "is truncated" in outcome.problem()[0]


def test_a_truncated_model_in_a_chat(tiny_model: Path, tmp_path: Path, process: Command) -> None:
    outcome = process("chat", truncated(tiny_model, tmp_path), stdin=b"hello\n")
    assert (outcome.code, outcome.output) == (1, b"")
    assert "is truncated" in outcome.problem()[0]


def test_a_model_that_was_sound_yesterday(tiny_model: Path, tmp_path: Path, process: Command) -> None:
    """What is remembered of a file does not outlive a change of it."""
    path = Path(shutil.copy(tiny_model, tmp_path / "changing.gguf"))
    assert process("run", path, "hello", "-n", 1).code == 0
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    assert process("run", path, "hello", "-n", 1).code == 1


@pytest.mark.parametrize(
    ("flags", "code", "words"),
    [
        (["--buckets", "0"], 2, "0 buckets are impossible"),
        (["--buckets", "17"], 2, "17 buckets are impossible"),
        (["--buckets", "x"], 2, "--buckets"),
        (["--bases", "nan"], 2, "--bases: 'nan'"),
        (["--bases", "inf"], 2, "--bases: 'inf'"),
        (["--bases", "1e999"], 2, "--bases: '1e999'"),
        (["--bases", "0"], 2, "base 0"),
        (["--bases", "-10000"], 2, "base -10000"),
        (["--bases", ""], 2, "--bases"),
        (["--multipliers", "0"], 2, "multiplier 0"),
        (["--multipliers", "nan"], 2, "--multipliers: 'nan'"),
        (["--multipliers", "1e300"], 2, "1e+304"),
        (["--merge", "vote"], 2, "--merge"),
        (["--spread", "wide"], 2, "--spread"),
        (["-c", "-1"], 2, "--ctx-size -1"),
        (["-c", "99999999999"], 2, "--ctx-size"),
        (["-b", "0"], 2, "--batch-size 0"),
        (["-t", "-1"], 2, "--threads -1"),
        (["-t", "513"], 2, "--threads 513"),
        (["-n", "-2"], 2, "--predict -2"),
        (["--stop", ""], 2, "stop string"),
        (["--temp", "nan"], 2, "--temp nan"),
        (["--temp", "inf"], 2, "--temp inf"),
        (["--top-p", "nan"], 2, "--top-p nan"),
        (["--repeat-penalty", "0"], 2, "--repeat-penalty 0"),
        (["--mirostat", "1"], 2, "--mirostat 1"),
        (["--seed", "99999999999"], 2, "--seed"),
        (["--logit-bias", "320+1"], 2, "320"),
        (["--logit-bias", "99999999999999999999+1"], 2, "--logit-bias"),
        (["--logit-bias", "1+nan"], 2, "--logit-bias"),
        (["--logit-bias", "one"], 2, "--logit-bias"),
        (["-ctv", "q8_0", "-fa", "off"], 2, "needs flash attention"),
        (["-ctk", "q9"], 2, "--cache-type-k"),
        (["--no-such-flag"], 2, "--no-such-flag"),
        (["--temp"], 2, "--temp"),
        (["two", "words"], 2, "words are given"),
        (["--parse-special"], 2, "--parse-special only works with --raw"),
        (["--raw", "--system", "x"], 2, "--system"),
        (["--grammar", "x", "--grammar-file", "y"], 2, "--grammar-file"),
        (["-p", "twice"], 2, "given twice"),
        (["--grammar", "root ::= ("], 1, "line 1 of the grammar"),
        (["--grammar", 'start ::= "a"'], 1, "grammar"),
        (["--grammar-file", "none.gbnf"], 1, "none.gbnf"),
        (["-j", '{"type": 3'], 1, "JSON schema"),
        (["-j", '{"type": 3}'], 1, "schema"),
        (["-j", "[]"], 1, "schema"),
        (["-j", '{"$ref": "#/nowhere"}'], 1, "schema"),
        (["-j", '{"type": "integer"}', "--grammar", 'root ::= "a"'], 2, "both a grammar and a JSON schema"),
        (["-f", "none.txt"], 1, "none.txt"),
        (["-f", "."], 1, "is a directory"),
        (["-c", "8"], 1, "but the context holds 8"),
        (["--chat-template", "none.jinja"], 1, "none.jinja"),
        (["--system", "\udcff"], 1, "--system is not UTF-8"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_make_no_sense(flags: list[str], code: int, words: str, tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("run", tiny_model, "hello world", *flags)
    error, hint = outcome.problem()
    assert (outcome.code, outcome.output) == (code, b"")
    assert words in error
    assert hint


def test_a_context_larger_than_memory(tiny_model: Path, process: Command) -> None:
    outcome = process("run", tiny_model, "hello", "-c", 2_000_000_000)
    assert (outcome.code, outcome.output) == (1, b"")
    error, hint = outcome.problem()
    assert "GiB" in error
    assert "--ctx-size" in hint


def test_a_prompt_longer_than_the_context_is_counted(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("run", tiny_model, "--raw", "q" * 100, "-c", 64, "-k", 1)
    assert outcome.code == 1
    assert outcome.problem()[0] == "the prompt needs 100 tokens, but the context holds 64"


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt(prompt: str, tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("run", tiny_model, prompt)
    assert (outcome.code, outcome.output) == (1, b"")
    assert outcome.problem()[0] == "the prompt is empty"


def test_an_empty_pipe(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("run", tiny_model, stdin=b"")
    assert (outcome.code, outcome.problem()[0]) == (1, "the prompt is empty")


def test_prompts_that_are_not_utf_8(tiny_model: Path, tmp_path: Path, abcli: Command, process: Command) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes(b"caf\xe9")
    for outcome in (
        abcli("run", tiny_model, "-f", path),
        abcli("run", tiny_model, stdin=b"caf\xe9"),
        process("run", tiny_model, b"caf\xe9"),
    ):
        assert (outcome.code, outcome.output) == (1, b"")
        error, _ = outcome.problem()
        assert "is not UTF-8" in error
        assert " 3" in error


def test_a_prompt_in_another_encoding_or_no_text(tiny_model: Path, abcli: Command) -> None:
    assert "UTF-16" in abcli("run", tiny_model, stdin="hello".encode("utf-16")).problem()[0]
    assert "NUL byte" in abcli("run", tiny_model, stdin=b"a\0b").problem()[0]


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: write_tiny_mamba(path), "recurrent state"),
        (lambda path: write_tiny_model(path, architecture="gpt2"), "does not use RoPE"),
        (lambda path: write_tiny_model(path, architecture="bloom"), "does not use RoPE"),
    ],
    ids=["mamba", "gpt2", "bloom"],
)
def test_models_without_a_base_to_vary(
    write: Callable[[Path], Path], words: str, tmp_path: Path, abcli: Command
) -> None:
    model = write(tmp_path / "other.gguf")
    outcome = abcli("run", model, "hello", "-n", 3)
    error, hint = outcome.problem()
    assert (outcome.code, outcome.output) == (1, b"")
    assert words in error
    assert "--buckets 1" in hint
    plain = abcli("run", model, "hello", "-n", 3, "--buckets", 1, "--ignore-eos")
    assert (plain.code, plain.errors) == (0, b"")
    assert plain.text


def test_a_model_without_chat_template(tmp_path: Path, abcli: Command) -> None:
    model = write_tiny_model(tmp_path / "bare.gguf", chat_template=None)
    outcome = abcli("run", model, "hello", "-n", 3)
    error, hint = outcome.problem()
    assert (outcome.code, outcome.output) == (1, b"")
    assert "has no chat template" in error
    assert "--chat-template" in hint
    assert abcli("chat", model, stdin=b"hello\n").problem() == (error, hint)
    assert abcli("run", model, "hello", "-n", 3, "--raw").code == 0
    for name in KNOWN_TEMPLATES:
        assert name in hint
    assert abcli("run", model, "hello", "-n", 3, "--chat-template", "chatml").code == 0


@pytest.mark.parametrize(
    "source",
    [
        "{{ x",
        "{% for m in messages %}",
        "{{ raise_exception('no') }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ 1 / 0 }}",
        "{{ x.y }}",
    ],
)
def test_a_broken_template_file(source: str, tiny_model: Path, tmp_path: Path, abcli: Command) -> None:
    path = tmp_path / "broken.jinja"
    path.write_text(source, encoding="utf-8")
    outcome = abcli("run", tiny_model, "hello", "--chat-template", path)
    error, _ = outcome.problem()
    assert (outcome.code, outcome.output) == (1, b"")
    assert "template" in error


def test_an_error_in_a_chat_is_told_as_well(tiny_model: Path, abcli: Command) -> None:
    for flags, code in ((["--buckets", "0"], 2), (["--session", "../x"], 2), (["--overflow", "wrap"], 2)):
        outcome = abcli("chat", tiny_model, *flags, stdin=b"hello\n")
        assert outcome.problem()
        assert (outcome.code, outcome.output) == (code, b"")
    contradiction = abcli("chat", tiny_model, "--no-save", "--session", "x")
    assert (contradiction.code, contradiction.problem()[1]) == (2, "drop one of them")


def test_the_details_are_shown_on_request(tiny_model: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ABCLI_DEBUG", "1")
    outcome = abcli("run", tiny_model, "hello", "--buckets", 0)
    assert outcome.code == 2
    assert b"Traceback" in outcome.errors
