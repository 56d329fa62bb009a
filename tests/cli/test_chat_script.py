"""`abcli chat` as a script has it: messages on standard input, answers alone on standard output."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import PATIENCE, Command
from tests.support.tiny_gguf import write_tiny_model

# A grammar makes random weights say something that can be recognised.
ENDLESS = ("--grammar", 'root ::= "ab" root')
CHATTER = ("--grammar", 'root ::= "answer " [a-z] [a-z]')
ANSWER = "answer [a-z]{2}\n"

Spawn = Callable[..., "subprocess.Popen[bytes]"]


def messages(home: Path, name: str = "work") -> list[tuple[str, str]]:
    """Role and text of what a stored session holds."""
    stored = json.loads((home / "sessions" / f"{name}.json").read_text(encoding="utf-8"))
    return [(message["role"], message["content"]) for message in stored["messages"]]


def asked(home: Path, name: str = "work") -> list[str]:
    """What the user said in a stored session."""
    return [content for role, content in messages(home, name) if role == "user"]


def test_answers_alone_on_standard_output(tiny_model: Path, process: Command) -> None:
    outcome = process("chat", tiny_model, *CHATTER, stdin=b"one\n\ntwo\r\nthree")
    assert (outcome.code, outcome.errors) == (0, b"")
    assert re.fullmatch(ANSWER * 3, outcome.output.decode())


def test_no_input_is_no_chat(tiny_model: Path, abcli: Command, own_home: Path) -> None:
    outcome = abcli("chat", tiny_model)
    assert (outcome.code, outcome.output, outcome.errors) == (0, b"", b"")
    assert not (own_home / "sessions").exists()


def test_errors_are_told_and_the_chat_goes_on(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("chat", tiny_model, *CHATTER, stdin=b"one\n/nope\ncaf\xe9\ntwo\n")
    assert outcome.code == 1
    assert re.fullmatch(ANSWER * 2, outcome.output.decode())
    first, _, second, _ = outcome.errors.decode().splitlines()
    assert first == "error: there is no command /nope"
    assert "is not UTF-8" in second


def test_commands_work_without_a_terminal(tiny_model: Path, abcli: Command, own_home: Path) -> None:
    script = b"one\ntwo\n/undo\n/set system be brief\nthree\n/bye\nnever read\n"
    outcome = abcli("chat", tiny_model, *CHATTER, "--session", "work", stdin=script)
    assert outcome.code == 0
    assert re.fullmatch(ANSWER * 3, outcome.output.decode())
    assert b"took back the last turn" in outcome.errors
    assert messages(own_home)[0] == ("system", "be brief")
    assert asked(own_home) == ["one", "three"]


def test_a_chat_is_written_and_read_without_a_session(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    for script in (f"/save {file}\n/load {file}\n", f"one\n/save {file}\n/load {file}\n/load {file}\n"):
        outcome = abcli("chat", tiny_model, *CHATTER, "--no-save", stdin=script.encode())
        assert (outcome.code, b"error" in outcome.errors) == (0, False)
    assert b"loaded 1 turn" in outcome.errors
    assert json.loads(file.read_text())["messages"][0] == {"role": "user", "content": "one"}


def test_a_thought_is_kept_apart(tiny_model: Path, abcli: Command, own_home: Path) -> None:
    grammar = ("--grammar", 'root ::= "<think>hm</think>yes"')
    outcome = abcli("chat", tiny_model, *grammar, "--session", "work", stdin=b"one\n")
    assert (outcome.code, outcome.text) == (0, "yes")
    stored = json.loads((own_home / "sessions" / "work.json").read_text())["messages"]
    assert stored[1] == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}


def test_blocks(tiny_model: Path, abcli: Command, own_home: Path) -> None:
    script = b'"""\nfirst\n\n/second\n"""\n"""open\nto the end'
    outcome = abcli("chat", tiny_model, *CHATTER, "--session", "work", stdin=script)
    assert (outcome.code, outcome.errors) == (0, b"")
    assert asked(own_home) == ["first\n\n/second", "open\nto the end"]


def test_a_block_that_cannot_be_read_is_skipped_as_a_whole(tiny_model: Path, abcli: Command, own_home: Path) -> None:
    script = b'"""\nfirst\ncaf\xe9\n/bye\n"""\nafter\n'
    outcome = abcli("chat", tiny_model, *CHATTER, "--session", "work", stdin=script)
    assert outcome.code == 1
    assert "is not UTF-8" in outcome.problem()[0]
    assert asked(own_home) == ["after"]


def test_a_space_makes_a_command_text(tiny_model: Path, abcli: Command, own_home: Path) -> None:
    assert abcli("chat", tiny_model, *CHATTER, "--session", "work", stdin=b" /bye\n").code == 0
    assert asked(own_home) == [" /bye"]


def test_a_session_is_continued(tiny_model: Path, abcli: Command, own_home: Path) -> None:
    for number, text in enumerate(("one", "two", "three"), 1):
        outcome = abcli("chat", tiny_model, *CHATTER, "--session", "work", stdin=text.encode())
        assert (outcome.code, outcome.errors) == (0, b"")
        assert len(messages(own_home)) == 2 * number
    assert asked(own_home) == ["one", "two", "three"]


def test_another_model_is_noticed(tiny_model: Path, abcli: Command, own_home: Path, tmp_path: Path) -> None:
    other = write_tiny_model(tmp_path / "other.gguf", seed=1)
    abcli("chat", other, *CHATTER, "--session", "work", stdin=b"one")
    outcome = abcli("chat", tiny_model, *CHATTER, "--session", "work", stdin=b"two")
    assert outcome.code == 0
    assert outcome.errors.decode() == "warning: the session was begun with another model: other.gguf\n"
    assert asked(own_home) == ["one", "two"]


def test_a_damaged_session_is_an_error_and_stays(tiny_model: Path, abcli: Command, own_home: Path) -> None:
    path = own_home / "sessions" / "work.json"
    path.parent.mkdir()
    path.write_bytes(b'{"format": "abcli-session", "vers')
    outcome = abcli("chat", tiny_model, "--session", "work", stdin=b"one")
    assert (outcome.code, outcome.output) == (1, b"")
    assert "work.json" in outcome.problem()[0]
    assert path.read_bytes() == b'{"format": "abcli-session", "vers'


def test_later_turns_compute_only_what_is_new(tiny_model: Path, abcli: Command) -> None:
    # An answer that is tokenised again as it was generated: one byte, one token.
    flags = ("--grammar", 'root ::= "Q"', "--stats")
    outcome = abcli("chat", tiny_model, *flags, stdin=b"1\n2\n3\n/undo\n/regen\n")
    lines = [line for line in outcome.errors.decode().splitlines() if line.startswith("prompt")]
    prompts = [int(re.findall(r"prompt (\d+) tokens", line)[0]) for line in lines]
    cached = [int((re.findall(r"\((\d+) cached\)", line) or [0])[0]) for line in lines]
    assert cached[0] == 0
    turn = prompts[1] - prompts[0]
    assert prompts[2] - prompts[1] == turn
    # The answer is held already, so a turn costs less than what it adds; a regenerated one costs one token.
    assert [have >= total - turn for have, total in zip(cached[1:3], prompts[1:3], strict=True)] == [True, True]
    assert (prompts[3], cached[3]) == (prompts[1], prompts[1] - 1)


def test_a_full_context_is_an_error_that_counts(tiny_model: Path, abcli: Command, own_home: Path) -> None:
    flags = (*CHATTER, "-c", 128, "--session", "work", "-sys", "be brief")
    script = b"one\n" + b"x" * 200 + b"\ntwo\n"
    outcome = abcli("chat", tiny_model, *flags, stdin=script)
    assert outcome.code == 1
    assert re.fullmatch(ANSWER * 2, outcome.output.decode())
    error, hint = outcome.problem()
    used, available = (int(number) for number in re.findall(r"\d+", error))
    assert used > 200
    assert available == 128
    assert "--overflow shift" in hint
    # The message that did not fit is not part of the conversation.
    assert asked(own_home) == ["one", "two"]


def test_shift_leaves_out_the_oldest_turns_and_says_so(tiny_model: Path, abcli: Command, own_home: Path) -> None:
    flags = ("--grammar", 'root ::= "Q"', "-c", 160, "--overflow", "shift", "--session", "work", "--stats")
    script = "".join(f"message {number}\n" for number in range(12)).encode()
    outcome = abcli("chat", tiny_model, *flags, "-sys", "be brief", stdin=script)
    assert (outcome.code, outcome.text.split()) == (0, ["Q"] * 12)
    lines = outcome.errors.decode().splitlines()
    left_out = [int(number) for number in re.findall(r"left out are the oldest (\d+) turn", "\n".join(lines))]
    assert left_out
    assert left_out == sorted(left_out)
    # Turns go in groups, so that most answers compute only what is new.
    assert len(set(left_out)) < len(left_out)
    prompts = [re.findall(r"prompt (\d+) tokens(?: \((\d+) cached\))?", line) for line in lines if "tok/s" in line]
    assert all(int(total) <= 160 for ((total, _),) in prompts)
    # The system prompt and its frame stay at the beginning, whatever is left out.
    assert min(int(held) for ((_, held),) in prompts[1:]) >= len("<s>system\nbe brief")
    # The session on disk still has everything.
    assert messages(own_home)[0] == ("system", "be brief")
    assert len(asked(own_home)) == 12


def test_shift_cannot_help_a_message_that_is_too_long(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("chat", tiny_model, *CHATTER, "-c", 128, "--overflow", "shift", stdin=b"one\n" + b"x" * 200)
    assert outcome.code == 1
    error, hint = outcome.problem()
    assert error.endswith("but the context holds 128")
    assert hint == "shorten the message, or start with a larger --ctx-size"


def test_an_answer_that_fills_the_context_is_told(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("chat", tiny_model, "-c", 64, "--ignore-eos", stdin=b"one\n")
    assert outcome.code == 0
    assert outcome.errors == b"warning: the answer ends here because the context is full\n"


def test_an_empty_answer_is_told(tiny_model: Path, abcli: Command, own_home: Path) -> None:
    outcome = abcli("chat", tiny_model, "--session", "work", "-n", 0, stdin=b"one\n")
    assert (outcome.code, outcome.output) == (0, b"")
    assert outcome.errors == b"warning: the answer is empty, so the conversation is as before\n"
    assert asked(own_home) == []


def test_interrupting_a_script_ends_it(tiny_model: Path, spawn: Spawn, own_home: Path) -> None:
    process = spawn("chat", tiny_model, *ENDLESS, "--session", "work")
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"one\ntwo\n")
    process.stdin.flush()
    assert process.stdout.read(4) == b"abab"
    process.send_signal(signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    assert process.stderr.read() == b"error: interrupted\n"
    assert asked(own_home) == ["one"]
    assert messages(own_home)[1][1].startswith("abab")


def test_a_broken_pipe_keeps_the_session_whole(tiny_model: Path, spawn: Spawn, own_home: Path) -> None:
    process = spawn("chat", tiny_model, *ENDLESS, "--session", "work")
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdin.write(b"one\n")
    process.stdin.close()
    assert process.stdout.read(4) == b"abab"
    process.stdout.close()
    assert process.wait(PATIENCE) == 1
    assert process.stderr.read() == b""
    (question, answer) = messages(own_home)
    assert question == ("user", "one")
    assert answer[1].startswith("abab")
