"""Sessions survive crashes, full disks and other chats; foreign files survive sessions."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import stat
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli import atomic
from abcli.chat import session
from abcli.chat.messages import Message, ToolCall
from abcli.chat.session import Session, SessionStore, export_session, import_session
from abcli.chat.session_format import decode_session, encode_session
from abcli.errors import SessionError, UsageError
from abcli.sampling import SamplingConfig
from abcli.strict_json import FormatError
from tests.chat.strategies import MESSAGES

TALK = [Message("system", "Be brief."), Message("user", 'H\u00e9llo\n"there"'), Message("assistant", "\U0001f600")]
SAMPLING = SamplingConfig(temperature=0, dry_breakers=("x",), logit_bias=((5, float("-inf")), (7, 1.5)), grammar="root")
DETAILS: dict[str, Any] = {"model": "tiny.gguf", "model_size": 123, "bases": (1e4, 12.5), "merge": "mean"}


@pytest.fixture
def store(tmp_path: Path) -> SessionStore:
    return SessionStore(tmp_path / "home" / "sessions")


def test_a_session_comes_back_as_it_was(store: SessionStore) -> None:
    started = store.create("talk", **DETAILS, sampling=SAMPLING)
    saved = store.save(dataclasses.replace(started, messages=TALK))
    loaded = SessionStore(store.directory).load("talk")
    assert loaded == saved
    assert loaded.messages == TALK
    assert loaded.sampling == SAMPLING
    assert (loaded.model, loaded.model_size, loaded.bases, loaded.merge) == ("tiny.gguf", 123, (1e4, 12.5), "mean")
    assert loaded.created == started.created
    assert datetime.fromisoformat(loaded.updated).utcoffset() is not None


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.floats(allow_nan=False)


@settings(deadline=None)
@given(
    messages=st.lists(MESSAGES),
    sampling=st.builds(
        SamplingConfig,
        temperature=NUMBERS,
        seed=st.integers(-(2**63) + 1, 2**63 - 1),
        dry_breakers=st.lists(TEXTS).map(tuple),
        logit_bias=st.lists(st.tuples(st.integers(0, 2**31), NUMBERS)).map(tuple),
    ),
)
def test_any_session_survives_its_file_form(messages: list[Message], sampling: SamplingConfig) -> None:
    original = Session("x", messages=messages, sampling=sampling)
    assert decode_session(encode_session(original)) == original


@given(data=st.binary() | TEXTS.map(lambda text: f'{{"format": "abcli-session", "version": 1, {text}'.encode()))
def test_no_bytes_break_the_reader(data: bytes) -> None:
    with pytest.raises(FormatError):
        decode_session(data)


def test_unnamed_sessions_are_called_after_the_time_and_never_the_same(store: SessionStore) -> None:
    names = [store.create().name for _ in range(5)]
    assert len(set(names)) == 5
    assert all(re.fullmatch(r"\d{8}-\d{6}(-\d+)?", name) for name in names)


def test_a_name_is_taken_once(store: SessionStore) -> None:
    store.save(dataclasses.replace(store.create("talk"), messages=TALK))
    with pytest.raises(SessionError, match="already is a session 'talk'"):
        store.create("talk")
    assert store.load("talk").messages == TALK


@pytest.mark.parametrize(
    "name", ["", ".hidden", "..", "a/b", "a\\b", " a", "a ", "x" * 101, "\u4e2d" * 81, "a\n", "a\0", "a:b"]
)
def test_impossible_names_are_refused(store: SessionStore, name: str) -> None:
    for use in (store.create, store.load, store.path):
        with pytest.raises(UsageError, match="cannot be the name"):
            use(name)
    with pytest.raises(UsageError), store.lock(name):
        pass
    assert not store.directory.exists()


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "A-b_c.d",
        "x" * 100,
        "20261121-081500",
        "-",
        "my chat",
        "caf\u00e9",
        "\u4e2d\u6587",
        "\u0928\u092e\u0938\u094d\u0924\u0947",
    ],
)
def test_possible_names_are_accepted(store: SessionStore, name: str) -> None:
    assert store.create(name).name == name
    assert [summary.name for summary in store.summaries()] == [name]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such permissions")
def test_only_the_user_can_read_a_session(store: SessionStore) -> None:
    session = store.create("talk")
    assert stat.S_IMODE(store.path("talk").stat().st_mode) == 0o600
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    store.save(session)
    assert stat.S_IMODE(store.path("talk").stat().st_mode) == 0o600


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_failed_save_keeps_the_old_file(store: SessionStore, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    session = store.create("talk")
    before = store.path("talk").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", failing(number))
        with pytest.raises(SessionError, match=re.escape(os.strerror(number))) as raised:
            store.save(dataclasses.replace(session, messages=TALK))
        assert str(store.path("talk")) in raised.value.message
        with pytest.raises(SessionError):
            store.create("other")
        with pytest.raises(SessionError):
            export_session(session, store.directory / "export.json")
    assert store.path("talk").read_bytes() == before
    assert [path.name for path in store.directory.iterdir()] == ["talk.json"]
    store.save(dataclasses.replace(session, messages=TALK))
    assert store.load("talk").messages == TALK


def changed(**values: object) -> bytes:
    """A stored session with some keys replaced; None removes one."""
    whole = json.loads(encode_session(Session("talk", messages=TALK))) | values
    return json.dumps({key: value for key, value in whole.items() if value is not None}).encode()


DAMAGED = {
    "empty": b"",
    "truncated": encode_session(Session("talk", messages=TALK))[:-20],
    "not JSON": b"hello",
    "not UTF-8": b'{"format": "\xff"}',
    "another format": b'{"format": "other", "version": 1}',
    "a list": b"[]",
    "deep": b"[" * 200_000,
    "huge number": changed(model_size=0).replace(b'"model_size": 0', b'"model_size": ' + b"9" * 10_000),
    "base of another type": changed(bases=[True]),
    "nan": changed(bases=[float("nan")]),
    "newer version": changed(version=2),
    "version of another type": changed(version=True),
    "no messages": changed(messages=None),
    "messages of another type": changed(messages={}),
    "message of another type": changed(messages=["hi"]),
    "role": changed(messages=[{"role": "robot", "content": ""}]),
    "unhashable role": changed(messages=[{"role": [], "content": ""}]),
    "content": changed(messages=[{"role": "user", "content": 1}]),
    "half a character": changed(messages=[{"role": "user", "content": "\ud800"}]),
    "name": changed(name="../up"),
    "merge": changed(merge="vote"),
    "time": changed(created="yesterday"),
    "sampling": changed(sampling=[]),
    "unknown setting": changed(sampling={"heat": 1}),
    "setting of another type": changed(sampling={"top_k": 1.5}),
    "text setting": changed(sampling={"grammar": 1}),
    "breakers": changed(sampling={"dry_breakers": "ab"}),
    "bias": changed(sampling={"logit_bias": [[1]]}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_session_is_an_error_and_is_not_overwritten(store: SessionStore, case: str) -> None:
    store.create("other")
    path = store.path("talk")
    path.write_bytes(DAMAGED[case])
    for read in (lambda: store.load("talk"), lambda: import_session(path)):
        with pytest.raises(SessionError) as raised:
            read()
        assert str(path) in raised.value.message
        assert "\n" not in raised.value.message
    with pytest.raises(SessionError):
        store.create("talk")
    with pytest.raises(SessionError, match="not overwritten"):
        store.save(Session("talk"))
    with pytest.raises(SessionError, match="already exists"):
        export_session(Session("talk"), path)
    assert path.read_bytes() == DAMAGED[case]


def test_a_huge_file_is_not_read(store: SessionStore, monkeypatch: pytest.MonkeyPatch) -> None:
    started = store.create("talk")
    monkeypatch.setattr(session, "MAX_SESSION_BYTES", 100)
    with pytest.raises(SessionError, match="larger than 100 bytes"):
        store.load("talk")
    with pytest.raises(SessionError, match="would be larger"):
        store.save(started)


def test_what_is_no_file_is_not_read(store: SessionStore, tmp_path: Path) -> None:
    with pytest.raises(SessionError, match="is not a file"):
        import_session(tmp_path)
    with pytest.raises(SessionError, match="cannot read"):
        import_session(tmp_path / "missing.json")
    with pytest.raises(SessionError, match="no session 'talk'"):
        store.load("talk")
    (tmp_path / "home").write_text("in the way")
    with pytest.raises(SessionError, match="cannot create"):
        store.create()
    assert store.summaries() == []


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(SessionError, match="is not a file"):
        import_session(tmp_path / "pipe.json")


def test_text_that_cannot_be_written_is_an_error(store: SessionStore, tmp_path: Path) -> None:
    started = store.create("talk")
    broken = dataclasses.replace(started, messages=[Message("user", "a\udc80")])
    with pytest.raises(SessionError, match="not valid Unicode"):
        store.save(broken)
    for suffix in (".json", ".md"):
        with pytest.raises(SessionError, match="not valid Unicode"):
            export_session(broken, tmp_path / f"talk{suffix}")
    assert store.load("talk").messages == []


def test_a_session_open_elsewhere_is_refused(store: SessionStore) -> None:
    code = (
        "import sys, pathlib; from abcli.chat.session import SessionStore\n"
        "with SessionStore(pathlib.Path(sys.argv[1])).lock('talk'):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(store.directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == b"held"
        with pytest.raises(SessionError, match="session 'talk' is open in another chat"), store.lock("talk"):
            pass
        with store.lock("another"):
            pass
        other.communicate(b"")
    with store.lock("talk"):
        store.create("talk")
    with store.lock("talk"):
        assert [summary.name for summary in store.summaries()] == ["talk"]


def test_a_lock_is_released_by_an_error(store: SessionStore) -> None:
    with pytest.raises(ZeroDivisionError), store.lock("talk"):
        raise ZeroDivisionError
    with store.lock("talk"):
        pass


def test_the_list_shows_the_newest_first_and_what_is_wrong(store: SessionStore) -> None:
    assert store.summaries() == []
    old = store.create("old", model="m.gguf")
    store.path("old").write_bytes(
        encode_session(dataclasses.replace(old, messages=TALK, updated="2020-01-01T00:00:00+00:00"))
    )
    store.create("new")
    store.path("bad").write_text("{")
    listed = store.summaries()
    assert [summary.name for summary in listed] == ["new", "old", "bad"]
    assert (listed[1].turns, listed[1].model, listed[1].problem) == (1, "m.gguf", "")
    assert str(store.path("bad")) in listed[2].problem


def test_a_renamed_file_is_another_session(store: SessionStore) -> None:
    store.save(dataclasses.replace(store.create("talk"), messages=TALK))
    store.path("talk").rename(store.path("renamed"))
    assert store.load("renamed").name == "renamed"


def test_a_session_is_exported_and_imported(store: SessionStore, tmp_path: Path) -> None:
    saved = store.save(dataclasses.replace(store.create("talk", **DETAILS), messages=TALK))
    file = tmp_path / "mine"
    export_session(saved, file)
    assert import_session(file) == saved
    longer = dataclasses.replace(saved, messages=TALK * 2)
    export_session(longer, file)
    assert import_session(file) == longer


def test_a_chat_without_a_name_is_exported_and_imported(tmp_path: Path) -> None:
    for number, messages in enumerate(([], TALK)):
        file = tmp_path / f"{number}.json"
        export_session(Session("", messages=messages), file)
        assert import_session(file).messages == messages


def test_messages_of_other_tools_are_imported(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    plain = [{"role": "developer", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "u"}]}]
    answer = {"role": "assistant", "content": "a", "reasoning_content": "t", "refusal": None}
    for values in ([*plain, answer], {"model": "gpt", "messages": [*plain, answer]}):
        file.write_bytes("\ufeff".encode() + json.dumps(values).encode())
        messages = import_session(file).messages
        assert messages == [Message("system", "s"), Message("user", "u"), Message("assistant", "a", "t")]
    file.write_text(json.dumps([*plain, {"role": "user", "content": 5}]))
    with pytest.raises(SessionError, match="the content of message 3 is 5"):
        import_session(file)


def test_a_thought_is_kept_apart_from_its_answer(store: SessionStore) -> None:
    answered = [Message("user", "2+2?"), Message("assistant", "4", "easy")]
    store.save(dataclasses.replace(store.create("talk"), messages=answered))
    stored = json.loads(store.path("talk").read_text())["messages"]
    assert stored[1] == {"role": "assistant", "content": "4", "reasoning_content": "easy"}
    assert store.load("talk").messages == answered


def test_one_name_in_two_spellings_is_one_session(store: SessionStore) -> None:
    store.create("cafe\u0301")
    assert store.load("caf\u00e9").name == "caf\u00e9"
    with pytest.raises(SessionError, match="already is a session"):
        store.create("caf\u00e9")


@pytest.mark.parametrize("name", ["x.pdf", "x.JPG", "a.json.gz"])
def test_a_name_that_promises_something_else_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be written as") as raised:
        export_session(Session("talk", messages=TALK), tmp_path / name)
    assert ".json" in raised.value.hint
    assert not (tmp_path / name).exists()


def test_a_transcript_can_be_read_by_people(tmp_path: Path) -> None:
    talk = Session("talk", model="m.gguf", messages=TALK, updated="2026-11-21T08:15:00+00:00")
    export_session(talk, tmp_path / "talk.md")
    assert (tmp_path / "talk.md").read_text(encoding="utf-8") == (
        "# talk\n\nModel: m.gguf, 2026-11-21T08:15:00+00:00\n\n## System\n\nBe brief.\n\n"
        '## User\n\nH\u00e9llo\n"there"\n\n## Assistant\n\n\U0001f600\n'
    )
    export_session(talk, tmp_path / "talk.TXT")
    assert (tmp_path / "talk.TXT").read_text(encoding="utf-8") == (
        'System:\nBe brief.\n\nUser:\nH\u00e9llo\n"there"\n\nAssistant:\n\U0001f600\n'
    )


def test_calls_are_exported_for_people(tmp_path: Path) -> None:
    call = Message("assistant", "", tool_calls=(ToolCall("look", '{"a": 1}', "1"),))
    talk = Session("talk", messages=[Message("user", "Look."), call, Message("tool", "3", tool_call_id="1")])
    export_session(talk, tmp_path / "talk.md")
    assert 'look({"a": 1})\n\n## Tool\n\n3' in (tmp_path / "talk.md").read_text(encoding="utf-8")


def test_an_export_overwrites_nothing_but_an_exported_session(tmp_path: Path) -> None:
    for name in ("notes.md", "notes.json", "notes"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(SessionError, match="already exists"):
            export_session(Session("talk"), tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"
    with pytest.raises(SessionError, match="cannot write"):
        export_session(Session("talk"), tmp_path / "missing" / "talk.json")
