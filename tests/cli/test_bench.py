"""`abcli bench`: tables, JSON, figures, interruption, what auto remembers, and what is refused."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import abcli.cli.bench as command_module
from abcli.bench import measure as run
from abcli.bench.plan import BenchSettings
from abcli.bench.resident import Memory, measure_memory
from abcli.cli.bench import parse_counts
from abcli.config import engines_directory
from abcli.engine import memory
from abcli.errors import NativeError, UsageError
from tests.cli.conftest import Command
from tests.cli.pseudo_terminal import CTRL_C, PseudoTerminal
from tests.support.models import checked_model, set_up
from tests.support.tiny_gguf import write_tiny_mamba, write_tiny_model

# One thread: several would wait for each other on a busy machine.
SIZE = ("-p", 24, "-n", 2, "-r", 2, "--threads", 1, "-c", 256)
QUICK = (*SIZE, "--no-memory")


def report(abcli: Command, *arguments: object) -> dict[str, Any]:
    """What --json prints."""
    outcome = abcli("bench", "--json", *arguments)
    assert outcome.code == 0, outcome.errors
    assert outcome.output.count(b"\n") == 1
    found: dict[str, Any] = json.loads(outcome.output)
    return found


def rows(found: dict[str, Any]) -> list[tuple[int, str]]:
    """The contenders that have a row."""
    return [(row["buckets"], row["engine"]) for row in found["rows"]]


@pytest.mark.usefixtures("nothing_found_out")
def test_the_object_has_both_engines_and_the_limits(tiny_model: Path, abcli: Command) -> None:
    found = report(abcli, tiny_model, *SIZE, "--buckets", 3)
    kinds = ("raw", "contexts", "fused")
    assert rows(found) == [(count, kind) for count in (1, 3) for kind in kinds]
    assert found["complete"]
    assert (found["left_out"], found["settings"]["buckets"]) == ([], [1, 3])
    assert (found["model"]["name"], found["settings"]["threads"]) == (tiny_model.name, 1)
    for row in found["rows"]:
        decode, several = row["decode"], row["buckets"] > 1
        assert len(decode["seconds_per_token"]) == 2
        spread = decode["tokens_per_second"]
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
        assert (decode["ratio_to_raw_batch"] is None) == (row["engine"] == "raw")
        assert (row["prompt_shared"] is not None) == (several and row["engine"] != "raw")
        assert len(row["prompt_exact"]["seconds_per_token"]) == 1
        if row["engine"] != "raw":
            assert row["memory"]["resident_bytes"] > 10 * 2**20
            assert len(row["bases"]) == row["buckets"]
    (one, many) = found["auto"]
    assert (one["engine"], one["reason"]) == ("contexts", "there is one bucket")
    assert many["reason"].startswith("measured: ")
    assert not many["remembered"]
    times = {row["engine"]: row["decode"]["tokens_per_second"]["median"] for row in found["rows"][4:]}
    assert many["engine"] == max(times, key=lambda kind: times[kind]) or len(set(times.values())) == 1


@pytest.mark.usefixtures("nothing_found_out")
def test_what_auto_takes_is_remembered_until_it_is_measured_again(tiny_model: Path, abcli: Command) -> None:
    first = report(abcli, tiny_model, *QUICK, "-k", 2)["auto"][1]
    assert not first["remembered"]
    second = report(abcli, tiny_model, *QUICK, "-k", 2)["auto"][1]
    assert second == {**first, "remembered": True}
    third = report(abcli, tiny_model, *QUICK, "-k", 2, "--remeasure")["auto"][1]
    assert not third["remembered"]
    assert len(list(engines_directory().glob("speeds-*.json"))) == 1


def test_the_tables_and_figures(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    png, svg, page = tmp_path / "speed.png", tmp_path / "speed.svg", tmp_path / "speed.html"
    outcome = abcli("bench", "-m", tiny_model, *QUICK, "--buckets", "1-2", "--png", png, "--svg", svg, "--html", page)
    assert outcome.code == 0
    assert outcome.errors.decode().startswith("measuring 1 and 2 buckets, contexts and fused beside raw llama.cpp")
    assert outcome.errors.count(b"\n") == 1
    assert outcome.text.startswith(f"{tiny_model.name}: llama ")
    assert "\ndecoding 2 tokens, after 24; 2 rounds\n" in outcome.text
    assert "\nreading 24 tokens of prompt; shared: 1 round, exact: 1 round\n" in outcome.text
    assert "2 buckets: --engine auto takes " in outcome.text
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "Tokens per second, decoding" in page.read_text()
    assert b"<svg" in svg.read_bytes()


def test_a_terminal_sees_progress_and_a_file_only_the_tables(
    tiny_model: Path, terminal: Callable[..., PseudoTerminal], tmp_path: Path
) -> None:
    output = tmp_path / "output"
    screen, status = terminal("bench", tiny_model, *QUICK, "-k", 2, "-r", 30, output=output).until_end()
    assert status == 0
    assert "2 buckets, decoding" in screen
    text = output.read_text("utf-8")
    assert text.startswith(tiny_model.name)
    assert "\x1b" not in text


def test_prompts_alone_one_way_and_one_engine(tiny_model: Path, abcli: Command) -> None:
    found = report(abcli, tiny_model, *QUICK, "-k", 2, "-n", 0, "--engine", "fused", "--prefill", "shared")
    assert rows(found) == [(1, "raw"), (1, "contexts"), (1, "fused"), (2, "fused")]
    assert found["rows"][3]["decode"] is None
    assert found["rows"][3]["prompt_exact"] is None
    assert found["rows"][3]["prompt_shared"]["ratio_to_one_bucket"] is not None


def test_a_model_that_the_fused_engine_cannot_serve(tmp_path: Path, abcli: Command) -> None:
    model = write_tiny_model(tmp_path / "sections.gguf", architecture="qwen2vl")
    found = report(abcli, model, *QUICK, "-k", 2)
    assert rows(found) == [(1, "raw"), (1, "contexts"), (2, "raw"), (2, "contexts")]
    assert {item["engine"] for item in found["left_out"]} == {"fused"}
    assert all("M-RoPE" in item["reason"] for item in found["left_out"])
    assert found["auto"][1]["engine"] == "contexts"
    assert "M-RoPE" in found["auto"][1]["reason"]
    assert "M-RoPE" in found["rows"][3]["prompt_note"]
    text = abcli("bench", model, *QUICK, "-k", 2).text
    assert text.count("left out: fused with 1 and 2: ") == 1
    assert "contexts, 2 buckets: exact prefill: " in text


def test_a_recurrent_model_is_measured_with_one_bucket(tmp_path: Path, abcli: Command) -> None:
    model = write_tiny_mamba(tmp_path / "mamba.gguf")
    found = report(abcli, model, *QUICK, "-k", 2)
    assert rows(found) == [(1, "raw"), (1, "contexts")]
    assert found["rows"][1]["decode"]["tokens_per_second"]["median"] > 0
    assert {(item["buckets"], item["engine"]) for item in found["left_out"]} == {
        *((1, "fused"), (2, "raw"), (2, "contexts"), (2, "fused"))
    }


def test_quantised_caches_and_the_settings_are_said(tiny_model: Path, abcli: Command) -> None:
    # Heads of 16 numbers are too short for blocks of 32.
    found = report(abcli, tiny_model, *QUICK, "-k", 1, "-ctk", "f32", "-ctv", "bf16", "-fa", "off", "-ngl", 0)
    settings = found["settings"]
    assert (settings["cache_type_k"], settings["cache_type_v"]) == ("f32", "bf16")
    assert (settings["flash_attention"], settings["gpu_layers"]) == ("off", 0)


@pytest.mark.parametrize("as_json", [True, False])
def test_an_interruption_shows_what_was_measured(
    tiny_model: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    original = run.take_turns

    def interrupted(turns: Any, rounds: int, *others: Any) -> None:
        original(turns, rounds, *others)
        if len(turns) == 4:  # the first comparison of two buckets
            raise KeyboardInterrupt

    monkeypatch.setattr(run, "take_turns", interrupted)
    outcome = abcli("bench", tiny_model, *QUICK, "-k", 2, "-p", 0, *(["--json"] if as_json else []))
    assert outcome.code == 130
    assert outcome.errors.decode().endswith("error: interrupted\n")
    if as_json:
        found = json.loads(outcome.output)
        assert not found["complete"]
        assert len(found["rows"]) == 6
    else:
        assert outcome.text.endswith("not complete: what is shown was measured before it ended")


def test_ctrl_c_ends_it_with_what_was_measured(tiny_model: Path, terminal: Callable[..., PseudoTerminal]) -> None:
    screen = terminal("bench", tiny_model, *QUICK, "-k", 2, "-r", 10_000, "-p", 0)
    screen.until("1 bucket, decoding")
    screen.press(CTRL_C)
    shown, status = screen.until_end()
    assert status == 130
    assert "not complete: what is shown was measured before it ended" in shown
    assert shown.rstrip().endswith("error: interrupted")
    assert "Traceback" not in shown


def test_an_interruption_that_a_callback_of_llama_cpp_swallows_is_noticed_at_the_next_turn(
    tiny_model: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = run.take_turns

    def swallowing(*arguments: Any) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        original(*arguments)

    monkeypatch.setattr(run, "take_turns", swallowing)
    outcome = abcli("bench", tiny_model, *QUICK, "-k", 2, "-p", 0, "--json")
    assert outcome.code == 130
    assert [row["decode"] is not None for row in json.loads(outcome.output)["rows"]] == [True]


def test_a_failure_while_measuring_keeps_what_was_measured(
    tiny_model: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> Memory:
        raise NativeError("the device is gone", "plug it in")

    monkeypatch.setattr("abcli.bench.workshop.measure_memory", failing)
    outcome = abcli("bench", tiny_model, *SIZE, "-k", 1, "--json")
    assert outcome.code == 1
    assert b"error: the device is gone\nhint: plug it in\n" in outcome.errors
    assert len(json.loads(outcome.output)["rows"]) == 3


def test_memory_that_is_too_little(tiny_model: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda: 2**20)
    outcome = abcli("bench", tiny_model, *QUICK, "-ngl", 0)
    assert outcome.code == 1
    assert b"needs" in outcome.errors
    assert b"--force tries it as it is" in outcome.errors
    assert outcome.output == b""


def test_many_buckets_without_room_are_left_out(
    tiny_model: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = memory.predict(checked_model(tiny_model), *set_up((1e4,), context_size=256, threads=1)).total
    monkeypatch.setattr(memory, "available_memory", lambda: 5 * one)
    found = report(abcli, tiny_model, *QUICK, "-k", 16, "-ngl", 0)
    assert rows(found) == [(1, "raw"), (1, "contexts"), (1, "fused")]
    assert {item["buckets"] for item in found["left_out"]} == {16}


def test_memory_that_cannot_be_measured_is_predicted(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checked_model(tiny_model, gpu_layers=0)
    config, buckets = set_up((1e4, 2e4), context_size=256, threads=1)
    predicted = memory.predict(model, config, buckets).total
    found = measure_memory(model, config, buckets, 24)
    assert found.resident is not None
    assert (found.predicted, found.device) == (predicted, 0)
    gone = replace(model, header=replace(model.header, path=tiny_model.with_name("gone")))
    assert measure_memory(gone, config, buckets, 24) == Memory(predicted)
    monkeypatch.setattr(sys, "executable", "/nowhere")
    assert measure_memory(model, config, buckets, 24) == Memory(predicted)
    monkeypatch.undo()
    monkeypatch.setattr(memory, "available_memory", lambda: 1)
    assert measure_memory(model, config, buckets, 24) == Memory(predicted)


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("6", (1, 6)),
        ("1,2,4", (1, 2, 4)),
        ("4, 2", (1, 2, 4)),
        ("1-3", (1, 2, 3)),
        ("2-3,6,3", (1, 2, 3, 6)),
        ("1", (1,)),
    ],
)
def test_lists_of_numbers(text: str, counts: tuple[int, ...]) -> None:
    assert parse_counts(text) == counts


@pytest.mark.parametrize("text", ["", "0", "17", "2-", "-2", "3-2", "a", "1,,2", "1.5", "²", "1" * 50, "1-2-3", "1_0"])
def test_impossible_lists_of_numbers(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_counts(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (("-k", "0"), "impossible"),
        (("-p", 1), "impossible"),
        (("-p", -1), "impossible"),
        (("-n", -1), "impossible"),
        (("-n", 0, "-p", 0), "nothing"),
        (("-r", 0), "impossible"),
        (("-c", 2), "impossible"),
        (("--prefill-base", 5000), "no say"),
        (("--prompt-cache",), "no say"),
        (("--chat-template", "chatml"), "no say"),
        (("--png", "/nowhere/at/all.png"), "cannot be written"),
        (("-m", "other.gguf"), "two models"),
        (("-ctv", "q8_0", "-fa", "off"), "flash attention"),
    ],
    ids=str,
)
def test_flags_that_make_no_sense(tiny_model: Path, abcli: Command, flags: tuple[object, ...], word: str) -> None:
    outcome = abcli("bench", tiny_model, *flags)
    assert (outcome.code, outcome.output) == (2, b"")
    assert word in outcome.problem()[0]


def test_a_file_that_is_no_model(tmp_path: Path, abcli: Command) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF" + bytes(100))
    outcome = abcli("bench", path)
    assert (outcome.code, outcome.output) == (1, b"")
    assert outcome.problem()[0]


def test_figures_without_matplotlib(tiny_model: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    outcome = abcli("bench", tiny_model, "--png", "x.png")
    assert outcome.code == 2
    assert "abcli[plot]" in outcome.problem()[1]


def test_the_defaults_are_those_of_the_settings(
    tiny_model: Path, abcli: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[BenchSettings] = []

    def remembered(_terminal: Any, _config: Any, _header: Any, settings: BenchSettings, **_: Any) -> tuple[None, None]:
        asked.append(settings)
        return None, None

    monkeypatch.setattr(command_module, "_measure", remembered)
    assert abcli("bench", tiny_model).code == 0
    assert asked == [BenchSettings()]


def test_a_closed_pipe_ends_quietly(tiny_model: Path, spawn: Callable[..., subprocess.Popen[bytes]]) -> None:
    process = spawn("bench", tiny_model, *QUICK, "-k", 1)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 1
    assert b"error" not in errors
