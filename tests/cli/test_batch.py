"""`abcli batch`: what a run leaves behind, however it ends."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import PATIENCE, Command, Outcome
from tests.cli.pseudo_terminal import CTRL_C, PseudoTerminal
from tests.support.tiny_gguf import write_tiny_model

# One thread: two that wait for each other by spinning crawl on a busy machine.
BATCH = ("batch", "-t", 1)
Spawn = Callable[..., "subprocess.Popen[bytes]"]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results_of(path: Path) -> dict[str, Any]:
    """Every result by its id, after a check that none is there twice."""
    found = lines_of(path)
    results = {result["id"]: result for result in found}
    assert len(results) == len(found)
    return results


def write_prompts(path: Path, count: int, words: str = "prompt number") -> Path:
    path.write_text("".join(f"{words} {index}\n" for index in range(count)), encoding="utf-8")
    return path


def finished(outcome: Outcome, code: int = 0) -> list[str]:
    """The lines on standard error of a run that must end with `code`."""
    lines = outcome.errors.decode().splitlines()
    assert outcome.code == code, lines
    return lines


def test_a_file_of_prompts_becomes_a_file_of_answers(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    prompts, output, summary = tmp_path / "prompts.txt", tmp_path / "answers.jsonl", tmp_path / "summary.json"
    prompts.write_text("one\n\ntwo\none\n")
    outcome = abcli(*BATCH, tiny_model, prompts, "-o", output, "-n", 5, "--temp", 0, "--summary", summary, "-k", 2)
    plan, told = finished(outcome)
    assert outcome.output == b""
    assert plan.startswith("3 slots of 4,096 tokens for 2 buckets: about ")
    assert told.startswith("3 answers, 0 errors, 1 of the answers for prompts that came again")
    results = results_of(output)
    assert set(results) == {"1", "3", "4"}
    assert results["1"]["text"] == results["4"]["text"] != results["3"]["text"]
    alone = abcli("run", "-t", 1, tiny_model, "two", "-n", 5, "--temp", 0, "-k", 2)
    assert alone.text == results["3"]["text"]
    report = json.loads(summary.read_text())
    assert report["finished"] is True
    assert (report["lines"], report["written"], report["duplicates"], report["errors"]) == (3, 3, 1, 0)
    assert report["completion_tokens"] == 10
    assert report["tokens_per_second"] > 0


def test_the_same_command_again_does_nothing_more(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    prompts, output = write_prompts(tmp_path / "prompts.txt", 3), tmp_path / "answers.jsonl"
    arguments = (*BATCH, tiny_model, prompts, "-o", output, "-n", 4, "-k", 1)
    finished(abcli(*arguments))
    before = output.read_bytes()
    told = finished(abcli(*arguments))
    assert told[0] == f"continuing {output}, which has 3 results"
    assert "3 done before" in told[1]
    assert output.read_bytes() == before
    message, hint = abcli(*arguments, "--temp", 0.5).problem()
    assert "temperature: 0.8 -> 0.5" in message
    assert "--restart" in hint
    assert output.read_bytes() == before
    finished(abcli(*arguments, "--temp", 0.5, "--restart"))
    assert output.read_bytes() != before


@pytest.mark.parametrize("engine", ["contexts", "fused"])
@pytest.mark.parametrize("buckets", [1, 3])
def test_slots_change_nothing(tiny_model: Path, abcli: Command, tmp_path: Path, buckets: int, engine: str) -> None:
    """Greedy answers of a model in F32, with and without a text that the prompts share."""
    prompts = write_prompts(tmp_path / "prompts.txt", 20)
    shared = tmp_path / "context.txt"
    shared.write_text("all of this comes first. " * 12)
    arguments = (
        *BATCH,
        tiny_model,
        prompts,
        "-o",
        "-",
        "--ordered",
        "--temp",
        0,
        "-n",
        12,
        "-k",
        buckets,
        "-c",
        512,
        "-s",
        1,
        "--engine",
        engine,
    )
    for more in ((), ("--context", shared)):
        one = abcli(*arguments, *more, "--slots", 1)
        eight = abcli(*arguments, *more, "--slots", 8)
        finished(one), finished(eight)
        assert one.output.count(b"\n") == 20
        assert one.output == eight.output


def test_each_answer_is_the_one_that_run_gives(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    """Sharing a prefill with others does not change what a prompt gets, short ones included."""
    prompts = tmp_path / "prompts.jsonl"
    texts = ["a", "tell me more about this", "tell me more about this, and that", "tell me more about " * 9]
    prompts.write_text("".join(json.dumps({"prompt": text, "seed": 7}) + "\n" for text in texts * 2))
    output = tmp_path / "answers.jsonl"
    finished(abcli(*BATCH, tiny_model, prompts, "-o", output, "-n", 10, "--slots", 2))
    results = results_of(output)
    for index, text in enumerate(texts):
        alone = abcli("run", "-t", 1, tiny_model, "-p", text, "-n", 10, "-s", 7, "--json")
        assert json.loads(alone.text)["text"] == results[str(index + 1)]["text"] == results[str(index + 5)]["text"]


def test_a_shared_document_is_computed_once(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    prompts, summary = write_prompts(tmp_path / "prompts.txt", 30), tmp_path / "summary.json"
    document = tmp_path / "document.txt"
    document.write_text("the document that all questions are about. " * 30)
    arguments = (*BATCH, tiny_model, prompts, "-o", "-", "-n", 2, "-k", 2, "--summary", summary)
    finished(abcli(*arguments, "--context", document))
    report = json.loads(summary.read_text())
    once = report["prompt_tokens"] / 30
    assert once > 500
    assert report["prompt_tokens"] - report["cached_tokens"] < 3 * once


def test_bad_lines_are_results_and_the_exit_code(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text(
        '{"id": "a", "prompt": "good"}\nnot json\n{"id": "long", "prompt": "' + "x" * 900 + '"}\n'
        '{"id": "a", "prompt": "again"}\n{"id": "b", "prompt": "good", "top_p": 3}\n'
        '{"id": "z", "prompt": "end"}\n'
    )
    arguments = (*BATCH, tiny_model, prompts, "-o", output, "-n", 3, "-k", 1, "-c", 512)
    told = finished(abcli(*arguments), 1)
    assert "2 answers, 4 errors" in told[-1]
    found = {result["line"]: result for result in lines_of(output)}
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert "context holds 512" in found[3]["error"]["message"]
    assert sorted(line for line, result in found.items() if "text" in result and not result.get("error")) == [1, 6]
    before = output.read_bytes()
    finished(abcli(*arguments), 1)
    assert output.read_bytes() == before


def test_fail_fast_stops_at_the_first_error(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    good = "".join(json.dumps({"id": f"g{index}", "prompt": "good"}) + "\n" for index in range(9))
    prompts.write_text('{"id": "bad"}\n' + good)
    arguments = (*BATCH, tiny_model, prompts, "-o", output, "-n", 3, "-k", 1)
    finished(abcli(*arguments, "--fail-fast"), 1)
    assert len(lines_of(output)) == 1
    # Without it the rest is done.
    finished(abcli(*arguments), 1)
    assert len(results_of(output)) == 10


def test_shards_merge_into_the_whole(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt", 7)
    arguments = (*BATCH, tiny_model, prompts, "-n", 4, "-k", 1, "-s", 3, "--ordered")
    whole, merged = tmp_path / "whole.jsonl", tmp_path / "merged.jsonl"
    finished(abcli(*arguments, "-o", whole))
    parts = [tmp_path / f"part{index}.jsonl" for index in (1, 2, 3)]
    for index, part in enumerate(parts, 1):
        finished(abcli(*arguments, "-o", part, "--shard", f"{index}/3"))
    assert [len(lines_of(part)) for part in parts] == [3, 2, 2]
    assert finished(abcli("batch", "merge", *parts, "-o", merged)) == [f"7 results in {merged}"]
    assert merged.read_bytes() == whole.read_bytes()
    assert abcli("batch", "merge", *parts[:2], "-o", tmp_path / "other.jsonl").code == 1


def test_a_file_called_merge_is_named_by_its_path(
    tiny_model: Path, abcli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "merge", 2)
    outcome = abcli(*BATCH, "./merge", "-m", tiny_model, "-o", "-", "-n", 2, "-k", 1)
    assert outcome.output.count(b"\n") == 2, outcome.errors


def test_standard_input_and_output(tiny_model: Path, abcli: Command) -> None:
    arguments = (*BATCH, tiny_model, "-", "-o", "-", "--output-format", "text", "-n", 3, "-k", 1, "--temp", 0)
    outcome = abcli(*arguments, stdin=b"one\ntwo\n")
    finished(outcome)
    assert outcome.output.count(b"\n") == 2


def test_openai_lines_get_openai_answers(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    prompts, output = tmp_path / "requests.jsonl", tmp_path / "answers.jsonl"
    body = {"model": "any", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3}
    request = {"custom_id": "r1", "method": "POST", "url": "/v1/chat/completions", "body": body}
    prompts.write_text(json.dumps(request) + "\n")
    finished(abcli(*BATCH, tiny_model, prompts, "-o", output, "-k", 1))
    (found,) = lines_of(output)
    assert found["custom_id"] == "r1"
    assert found["response"]["status_code"] == 200
    assert found["response"]["body"]["usage"]["completion_tokens"] <= 3


WRONG = {
    "no input": (("-o", "out"), "there is no input"),
    "no output": (("in.txt",), "there is no output"),
    "three words": (("a", "b", "c", "-o", "out"), "3 words"),
    "a missing input": (("{model}", "nothing.txt", "-o", "out"), "nothing.txt"),
    "no slots": (("{model}", "in.txt", "-o", "out", "--slots", "0"), "--slots 0"),
    "odd slots": (("{model}", "in.txt", "-o", "out", "--slots", "many"), "--slots 'many'"),
    "too many slots": (("{model}", "in.txt", "-o", "out", "--slots", "200", "-c", "99999999"), "slots of"),
    "a shard beyond the end": (("{model}", "in.txt", "-o", "out", "--shard", "3/2"), "--shard"),
    "the prompt cache": (("{model}", "in.txt", "-o", "out", "--prompt-cache"), "--prompt-cache"),
    "a summary nowhere": (("{model}", "in.txt", "-o", "out", "--summary", "no/where"), "--summary"),
    "the input as output": (("{model}", "in.txt", "-o", "in.txt"), "is the input"),
    "no folder": (("{model}", "in.txt", "-o", "no/where"), "no directory"),
    "no template": (("{model}", "in.txt", "-o", "out", "--template", "none.txt"), "none.txt"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_told_before_anything_is_done(
    tiny_model: Path, abcli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_prompts(tmp_path / "in.txt", 2)
    arguments, expected = WRONG[case]
    outcome = abcli("batch", *(word.replace("{model}", str(tiny_model)) for word in arguments))
    assert outcome.code in (1, 2)
    assert expected in outcome.problem()[0]
    assert (tmp_path / "in.txt").read_text().count("\n") == 2


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"no {what} after {PATIENCE} s"
        time.sleep(0.002)


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


KILLS = 6


def test_kills_at_any_moment_lose_and_double_nothing(
    tiny_model: Path, abcli: Command, spawn: Spawn, tmp_path: Path
) -> None:
    """SIGKILL again and again, each after a random number of further results or while the run is still starting."""
    prompts = write_prompts(tmp_path / "prompts.txt", 60)
    shared = tmp_path / "context.txt"
    shared.write_text("what all prompts have in common. " * 4)
    options = ("--context", shared, "-n", 6, "-k", 2, "-s", 5, "-c", 512, "--slots", 3)
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    finished(abcli(*BATCH, tiny_model, prompts, "-o", whole, *options))
    chance = random.Random(11)
    for _ in range(KILLS):
        before = count_lines(output)
        wanted = chance.choice((0, 1, 2, 3, 4))
        process = spawn(*BATCH, tiny_model, prompts, "-o", output, *options)
        if wanted:
            wait_for(lambda: count_lines(output) >= before + wanted or process.poll() is not None, "result")  # noqa: B023
        time.sleep(chance.random() * 0.01 if wanted else chance.random() * 0.4)
        process.kill()
        process.wait()
    assert 0 < count_lines(output) < 60
    told = finished(abcli(*BATCH, tiny_model, prompts, "-o", output, *options))
    assert told[0].startswith("continuing")
    assert results_of(output) == results_of(whole)


def test_one_interrupt_finishes_what_is_begun(tiny_model: Path, abcli: Command, spawn: Spawn, tmp_path: Path) -> None:
    prompts, output = write_prompts(tmp_path / "my prompts.txt", 150), tmp_path / "answers.jsonl"
    options = ("-n", 40, "-k", 1, "-s", 2, "-c", 512, "--slots", 2, "--ignore-eos")
    process = spawn(*BATCH, tiny_model, prompts, "-o", output, *options, "--restart")
    wait_for(lambda: count_lines(output) >= 3, "result")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    told = errors.decode().splitlines()
    assert process.returncode == 130, told
    again = f"abcli batch -t 1 {tiny_model} '{prompts}' -o {output} {' '.join(map(str, options))}"
    assert told[-3] == f"to continue: {again}"
    assert told[-2].startswith("error: interrupted after ")
    done = results_of(output)
    # Both slots end in the same step, after which nothing is begun that could be finished.
    assert "finishing what is begun; once more stops at once" in told or len(done) % 2 == 0
    assert 3 <= len(done) < 150
    assert all(result["usage"]["completion_tokens"] == 40 for result in done.values())
    finished(abcli(*BATCH, tiny_model, prompts, "-o", output, *options))
    assert len(results_of(output)) == 150
    assert done.items() <= results_of(output).items()


def test_two_interrupts_stop_at_once(spawn: Spawn, tmp_path: Path) -> None:
    # No answer but the first is complete before the second signal.
    model = write_tiny_model(tmp_path / "model.gguf", context_length=1 << 20)
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines = [{"prompt": "first", "max_tokens": 1}, {"prompt": "second"}, {"prompt": "third"}, {"prompt": "fourth"}]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    process = spawn(*BATCH, model, prompts, "-o", output, "-k", 1, "-c", 200_000, "--slots", 2, "--ignore-eos")
    assert process.stderr is not None
    wait_for(lambda: count_lines(output) == 1, "result")
    process.send_signal(signal.SIGINT)
    assert b"2 slots of 200,000 tokens" in process.stderr.readline()
    assert process.stderr.readline() == b"finishing what is begun; once more stops at once\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert b"to continue: abcli batch" in errors
    assert count_lines(output) == 1


def test_an_interrupt_ends_the_wait_for_standard_input(tiny_model: Path, spawn: Spawn) -> None:
    process = spawn(*BATCH, tiny_model, "-", "-o", "-", "-k", 1, "-n", 2)
    assert process.stderr is not None
    assert process.stdin is not None
    process.stdin.write(b"one\n")
    process.stdin.flush()
    assert b"slots" in process.stderr.readline()
    time.sleep(0.3)  # the model is loaded and the next line awaited; a signal before that ends the run as well
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130


def test_a_reader_that_leaves_ends_the_run_quietly(tiny_model: Path, spawn: Spawn, tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "prompts.txt", 3000)
    process = spawn(*BATCH, tiny_model, prompts, "-o", "-", "-k", 1, "-n", 4)
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b"{")
    process.stdout.close()
    assert process.wait(PATIENCE) == 1
    assert b"error" not in process.stderr.read()


def test_a_bar_on_a_terminal(tiny_model: Path, terminal: Callable[..., PseudoTerminal], tmp_path: Path) -> None:
    prompts, output = write_prompts(tmp_path / "prompts.txt", 2000), tmp_path / "answers.jsonl"
    run = terminal(*BATCH, tiny_model, prompts, "-o", output, "-k", 1, "-n", 4)
    run.until("of 2,000 lines")
    run.until("tokens/s")
    run.press(CTRL_C)
    shown, code = run.until_end()
    assert "to continue: abcli batch" in shown
    assert code == 130
