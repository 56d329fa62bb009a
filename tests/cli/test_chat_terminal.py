"""`abcli chat` as a person at a terminal has it."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Command, command_line
from tests.cli.pseudo_terminal import CTRL_C, CTRL_D, CTRL_Z, UP, PseudoTerminal

Terminal = Callable[..., PseudoTerminal]
# A grammar makes random weights say something that can be recognised.
ENDLESS = ("--grammar", 'root ::= "abcdefgh" root')
CHATTER = ("--grammar", 'root ::= "answer " [a-z] [a-z] [a-z]')


def leave(chat: PseudoTerminal) -> str:
    """Press Ctrl-D; what the chat says at the end."""
    chat.press(CTRL_D)
    screen, code = chat.until_end()
    assert code == 0
    return screen


def sessions(home: Path) -> list[Path]:
    """The stored sessions."""
    return sorted((home / "sessions").glob("[!.]*.json"))


def said(path: Path) -> list[str]:
    """The messages of the user in a stored session."""
    messages = json.loads(path.read_text(encoding="utf-8"))["messages"]
    return [message["content"] for message in messages if message["role"] == "user"]


def test_a_first_conversation(tiny_model: Path, terminal: Terminal, own_home: Path) -> None:
    chat = terminal("chat", tiny_model, *CHATTER)
    banner = chat.until_prompt()
    assert "tiny.gguf: 6 buckets at RoPE bases 5000, " in banner
    assert "context of 4,096 tokens; about " in banner
    assert "/help lists the commands" in banner
    answer, statistics = chat.say("hello").splitlines()[-2:]
    assert re.fullmatch("answer [a-z]{3}", answer)
    assert re.fullmatch(
        r"prompt \d+ tokens, [\d.]+ tok/s \| answer \d+ tokens, [\d.]+ tok/s \| context \d+/4096"
        r" \| 6 buckets agree on \d+%",
        statistics,
    )
    (path,) = sessions(own_home)
    assert said(path) == ["hello"]
    assert f"continue with: abcli chat --session {path.stem}" in leave(chat)


def test_an_empty_chat_leaves_nothing_behind(tiny_model: Path, terminal: Terminal, own_home: Path) -> None:
    chat = terminal("chat", tiny_model)
    chat.until_prompt()
    assert chat.say("") == ""
    assert "temp = 0.5" in chat.say("/set temp 0.5")
    assert "the conversation is empty" in chat.say("/clear")
    assert "continue with" not in leave(chat)
    assert sessions(own_home) == []


def test_commands(tiny_model: Path, terminal: Terminal, tmp_path: Path) -> None:
    chat = terminal("chat", tiny_model, *CHATTER)
    chat.until_prompt()
    help_text = chat.say("/help")
    for name in ("/help", "/clear", "/undo", "/regen", "/read", "/set", "/show", "/save", "/load", "/exit", "Ctrl-C"):
        assert name in help_text
    assert "temp = 0.2" in chat.say("/set temp 0.2")
    assert "answer " in chat.say("hello")
    shown = chat.say("/show")
    assert "temp = 0.2" in shown
    assert "model    tiny.gguf" in shown
    assert "1 turn\n" in shown

    assert "answer " in chat.say("/regen")
    assert "1 turn\n" in chat.say("/show")
    assert "took back the last turn; 0 left" in chat.say("/undo")
    assert "error: there is nothing to undo" in chat.say("/undo")
    assert "error: there is no answer to regenerate" in chat.say("/regen")

    chat.say("first")
    chat.say("second")
    saved = tmp_path / "my chat.json"
    assert f"saved to {saved}" in chat.say(f"/save {saved}")
    assert said(saved) == ["first", "second"]
    assert "the conversation is empty" in chat.say("/clear")
    assert "0 turns" in chat.say("/show")
    assert "loaded 2 turns" in chat.say(f"/load {saved}")
    transcript = tmp_path / "chat.md"
    chat.say(f"/save {transcript}")
    assert "## User\n\nsecond" in transcript.read_text(encoding="utf-8")

    assert "error: there is no command /nope" in chat.say("/nope")
    assert "error: there is no setting 'nope'" in chat.say("/set nope 1")
    assert "error: " in chat.say("/set temp nan")
    assert "error: temp 'warm' is not a number" in chat.say("/set temp warm")
    assert "temp = 0.2" in chat.say("/show")
    for incomplete in ("/set", "/save", "/load", "/read"):
        assert f"error: {incomplete} needs" in chat.say(incomplete)
    assert "error: cannot read" in chat.say(f"/load {tmp_path / 'none.json'}")

    chat.begin("/bye")
    assert chat.until_end()[1] == 0


def test_files_are_read_before_the_message(
    tiny_model: Path, terminal: Terminal, own_home: Path, tmp_path: Path
) -> None:
    notes = tmp_path / "notes.txt"
    notes.write_text("the notes", encoding="utf-8")
    chat = terminal("chat", tiny_model, *CHATTER)
    chat.until_prompt()
    assert "read 9 characters" in chat.say(f"/read {notes}")
    assert "answer " in chat.say("what do they say?")
    assert "answer " in chat.say("and now?")
    assert said(sessions(own_home)[0]) == ["the notes\n\nwhat do they say?", "and now?"]

    chat.say(f"/read {notes}")
    assert "took back what was read" in chat.say("/undo")
    chat.say("last")
    assert said(sessions(own_home)[0])[-1] == "last"
    assert "error: there is no file" in chat.say("/read none.txt")
    leave(chat)


def test_messages_of_many_lines(tiny_model: Path, terminal: Terminal, own_home: Path) -> None:
    chat = terminal("chat", tiny_model, *CHATTER)
    chat.until_prompt()
    assert chat.say('"""') == ""
    assert chat.say("/first line") == ""
    assert chat.say("") == ""
    assert "answer " in chat.say('last line"""')
    assert "answer " in chat.say('"""/one line"""')
    assert said(sessions(own_home)[0]) == ["/first line\n\nlast line", "/one line"]
    # Ctrl-C gives up the block, not the chat.
    chat.say('"""')
    chat.press(CTRL_C)
    assert "leaves" in chat.until_prompt()
    assert "2 turns" in chat.say("/show")
    leave(chat)


def test_up_recalls_what_was_typed(tiny_model: Path, terminal: Terminal, own_home: Path) -> None:
    chat = terminal("chat", tiny_model, *CHATTER)
    chat.until_prompt()
    chat.say("remember me")
    chat.press(UP)
    chat.until("remember me")
    chat.say("!")
    leave(chat)
    # Another chat still knows it.
    chat = terminal("chat", tiny_model, *CHATTER)
    chat.until_prompt()
    chat.press(UP)
    chat.until("remember me!")
    chat.say("")
    leave(chat)
    assert [said(path) for path in sessions(own_home)] == [["remember me", "remember me!"], ["remember me!"]]


def test_ctrl_c_stops_the_answer_and_keeps_the_chat(tiny_model: Path, terminal: Terminal, own_home: Path) -> None:
    chat = terminal("chat", tiny_model, *ENDLESS)
    chat.until_prompt()
    chat.begin("hello")
    chat.until("abcdefgh")
    chat.press(CTRL_C)
    assert chat.until_prompt().endswith("\nstopped\n")
    # What was said so far is part of the conversation, and the chat goes on.
    assert "1 turn\n" in chat.say("/show")
    (path,) = sessions(own_home)
    assert json.loads(path.read_text(encoding="utf-8"))["messages"][-1]["content"].startswith("abcdefgh")
    chat.say("/set predict 3")
    assert "answer 3 tokens" in chat.say("again")

    chat.press(CTRL_C)
    assert "Ctrl-D or /exit leaves" in chat.until_prompt()
    chat.press("half a mess" + CTRL_C)
    chat.until_prompt()
    assert said(path) == ["hello", "again"]
    leave(chat)


def test_a_killed_chat_is_resumed(tiny_model: Path, terminal: Terminal, own_home: Path) -> None:
    chat = terminal("chat", tiny_model, *CHATTER, "--session", "work", "-sys", "be brief")
    chat.until_prompt()
    chat.say("first")
    chat.say("second")
    chat.kill_hard()

    chat = terminal("chat", tiny_model, *CHATTER, "--session", "work")
    assert "resumed after 2 turns" in chat.until_prompt()
    assert "system = be brief" in chat.say("/show")
    chat.say("third")
    assert said(own_home / "sessions" / "work.json") == ["first", "second", "third"]
    leave(chat)


def test_a_session_is_open_in_one_chat_only(tiny_model: Path, terminal: Terminal, own_home: Path) -> None:
    named = terminal("chat", tiny_model, *CHATTER, "--session", "work")
    named.until_prompt()
    screen, code = terminal("chat", tiny_model, "--session", "work").until_end()
    assert code == 1
    assert "error: session 'work' is open in another chat" in screen
    leave(named)

    # A session that got its name from the clock is as exclusive.
    unnamed = terminal("chat", tiny_model, *CHATTER)
    unnamed.until_prompt()
    unnamed.say("hello")
    (path,) = sessions(own_home)
    screen, code = terminal("chat", tiny_model, "--session", path.stem).until_end()
    assert code == 1
    assert "is open in another chat" in screen
    leave(unnamed)


def test_nothing_is_kept_without_saving(tiny_model: Path, terminal: Terminal, own_home: Path) -> None:
    chat = terminal("chat", tiny_model, *CHATTER, "--no-save")
    chat.until_prompt()
    chat.say("hello")
    assert "continue with" not in leave(chat)
    assert sessions(own_home) == []


def test_the_answer_alone_goes_into_a_file(tiny_model: Path, terminal: Terminal, tmp_path: Path) -> None:
    path = tmp_path / "answers.txt"
    chat = terminal("chat", tiny_model, *CHATTER, output=path)
    assert "6 buckets" in chat.until_prompt()
    chat.say("hello")
    leave(chat)
    assert re.fullmatch("answer [a-z]{3}\n", path.read_text(encoding="utf-8"))


def test_a_dumb_terminal_gets_no_escape_sequences(tiny_model: Path, terminal: Terminal, own_home: Path) -> None:
    chat = terminal("chat", tiny_model, *CHATTER, kind="dumb")
    shown = chat.raw_until("Ctrl-D leaves") + chat.raw_until("> ")
    chat.press("hello\r")
    shown += chat.raw_until("buckets agree") + chat.raw_until("> ")
    chat.press(CTRL_C)
    shown += chat.raw_until("/exit leaves") + chat.raw_until("> ")
    assert "\x1b" not in shown
    assert re.search("answer [a-z]{3}\r\n", shown)
    leave(chat)
    assert said(sessions(own_home)[0]) == ["hello"]


def test_ctrl_z_suspends_at_the_prompt(tiny_model: Path, terminal: Terminal, own_home: Path) -> None:
    shell = terminal(command=["bash", "--norc", "--noprofile", "-i"])
    shell.press(" ".join(map(str, command_line("chat", tiny_model, "-k", 1, "-n", 3))) + "\r")
    shell.until("Ctrl-D leaves")
    shell.until_prompt()
    shell.press("half")
    shell.until("half")
    shell.press(CTRL_Z)
    shell.until("Stopped")
    shell.press("echo sane | tr s S\r")
    shell.until("Sane")
    shell.press("fg\r")
    # The editor waits again, and shows what was typed.
    shell.until("half")
    shell.say(" a message")
    assert said(sessions(own_home)[0]) == ["half a message"]
    shell.press(CTRL_D)
    shell.until("continue with")


def test_what_is_typed_during_work_waits_for_the_prompt(terminal: Terminal) -> None:
    script = (
        "import sys, time\nfrom abcli.ui.terminal import Terminal\n"
        "with Terminal().working('loading'):\n    print('READY', flush=True)\n    time.sleep(1.5)\n"
        "print('END', flush=True)\nprint('got', input())\n"
    )
    busy = terminal(command=[sys.executable, "-c", script])
    busy.until("READY")
    busy.press("typed\r")
    assert "typed" not in busy.raw_until("END")
    busy.until("got typed")


@pytest.mark.parametrize("columns", [40, 200])
def test_answers_are_broken_at_words(tiny_model: Path, terminal: Terminal, columns: int) -> None:
    words = ("--grammar", 'root ::= "abcdefg " root', "-k", 1, "-t", 1, "-n", 202, "--no-stats")
    screen, code = terminal("run", tiny_model, "hello", *words, columns=columns).until_end()
    *lines, _last = [line for line in screen.splitlines() if "abcdefg" in line]
    assert code == 0
    # As many words as there is room for; the blank after the last one is not written.
    assert set(lines) == {" ".join(["abcdefg"] * ((columns + 1) // 8))}


def test_a_message_may_begin_with_a_path(tiny_model: Path, terminal: Terminal, own_home: Path) -> None:
    chat = terminal("chat", tiny_model, *CHATTER)
    chat.until_prompt()
    messages = ["/etc/hosts is what?", "/tmp is full", "/usr/bin", "/a-b.c?"]
    for message in messages:
        assert "answer " in chat.say(message)
    assert "there is no command /hlep" in chat.say("/hlep me")
    assert said(sessions(own_home)[0]) == messages
    leave(chat)


def test_the_real_model(real_model: Path, terminal: Terminal, abcli: Command) -> None:
    flags = ("--temp", 0, "-n", 16, "-k", 2, "-c", 512)
    expected = abcli("run", real_model, "What is a cat?", *flags).text.splitlines()
    chat = terminal("chat", real_model, *flags)
    assert "2 buckets" in chat.until_prompt()
    assert chat.say("What is a cat?").splitlines()[-1 - len(expected) : -1] == expected
    later = chat.say("And a dog?")
    prompt, cached = (int(number) for number in re.findall(r"prompt (\d+) tokens \((\d+) cached\)", later)[0])
    # The question, and what the template puts around it, are all that is new.
    assert prompt - cached < 20
    leave(chat)
