"""Chat sessions on disk: every save is atomic, a chat in use is locked, and nothing foreign is overwritten."""

from __future__ import annotations

import contextlib
import errno
import itertools
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from abcli.atomic import create_exclusively, write_atomically
from abcli.chat.messages import Message
from abcli.chat.session_format import (
    Session,
    check_name,
    decode_conversation,
    decode_session,
    encode_session,
    utc_now,
)
from abcli.config import MergeRule
from abcli.errors import SessionError, UsageError
from abcli.sampling import SamplingConfig
from abcli.strict_json import FormatError

__all__ = ["Session", "SessionStore", "SessionSummary", "export_session", "import_session"]

MAX_SESSION_BYTES = 256 * 1024 * 1024
TRANSCRIPT_SUFFIXES = (".md", ".txt")

_SUFFIX = ".json"
# A file without a suffix is JSON as well.
_EXPORT_SUFFIXES = (_SUFFIX, "", *TRANSCRIPT_SUFFIXES)


@dataclass(frozen=True)
class SessionSummary:
    """One line of a list of sessions; `problem` says why a session cannot be read (the rest is then empty)."""

    name: str
    path: Path
    updated: str = ""
    model: str = ""
    turns: int = 0
    problem: str = ""


class SessionStore:
    """The sessions in one directory, one JSON file each."""

    def __init__(self, directory: Path) -> None:
        """`directory` is made when the first session is."""
        self.directory = directory
        self._own: set[Path] = set()

    def path(self, name: str) -> Path:
        """Where the session is, or would be, stored. Raises UsageError for an impossible name."""
        return self.directory / (check_name(name) + _SUFFIX)

    def create(
        self,
        name: str | None = None,
        *,
        model: str = "",
        model_size: int = 0,
        bases: tuple[float, ...] = (),
        merge: MergeRule = "confidence",
        sampling: SamplingConfig | None = None,
    ) -> Session:
        """A new, empty session, already on disk; without a name it is called after the local time.

        Raises UsageError for an impossible name, SessionError if there is one of that name or it cannot be written.
        """
        started = datetime.now().astimezone().strftime("%Y%m%d-%H%M%S")
        unnamed = itertools.chain([started], (f"{started}-{count}" for count in itertools.count(2)))
        for candidate in [check_name(name)] if name is not None else unnamed:
            now = utc_now()
            session = Session(candidate, model, model_size, bases, merge, [], sampling or SamplingConfig(), now, now)
            path = self.path(candidate)
            data = _encoded(session, path)
            with _reporting("create", path):
                self._make_directory()
                # Two chats may start in the same second.
                with contextlib.suppress(FileExistsError):
                    create_exclusively(path, data)
                    self._own.add(path)
                    return session
        raise SessionError(f"there already is a session {name!r}", "continue it, or choose another name")

    def load(self, name: str) -> Session:
        """The stored session. Raises UsageError for an impossible name, SessionError if it cannot be read."""
        path = self.path(name)
        with _reporting("read", path):
            exists = path.exists()
        if not exists:
            raise SessionError(f"there is no session {name!r}", f"the sessions are in {self.directory}")
        # The file may have been renamed: its name is what counts.
        session = replace(_read(path), name=path.stem)
        self._own.add(path)
        return session

    def save(self, session: Session) -> Session:
        """Store `session` atomically; returns it with the time of this update.

        Overwrites only what this store has created, loaded or saved. Raises SessionError if it cannot be
        written, with the old file intact.
        """
        path = self.path(session.name)
        session = replace(session, updated=utc_now())
        data = _encoded(session, path)
        with _reporting("write", path):
            self._make_directory()
            if path in self._own:
                write_atomically(path, data)
                return session
            try:
                create_exclusively(path, data)
            except FileExistsError:
                raise SessionError(
                    f"{path} was not read by this chat and is not overwritten", "choose another name"
                ) from None
        self._own.add(path)
        return session

    def summaries(self) -> list[SessionSummary]:
        """Every stored session, the last updated first, unreadable ones last. Raises SessionError."""
        try:
            paths = sorted(path for path in self.directory.glob(f"[!.]*{_SUFFIX}"))
        except OSError as error:
            raise _unusable("list", self.directory, error) from error
        found = [_summary(path) for path in paths]
        return sorted(found, key=lambda summary: summary.updated, reverse=True)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Hold the session for this chat. Raises SessionError if another chat holds it."""
        path = self.path(name)
        lock = FileLock(path.with_name(f".{path.stem}.lock"), timeout=0, mode=0o600)
        with _reporting("lock", path):
            self._make_directory()
            try:
                lock.acquire()
            except Timeout:
                raise SessionError(
                    f"session {name!r} is open in another chat", "close that chat, or choose another session"
                ) from None
        try:
            yield
        finally:
            lock.release()

    def _make_directory(self) -> None:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)


def export_session(session: Session, path: Path) -> None:
    """Write `session` to a file of the user's choice: a transcript for .md and .txt, else JSON to import again.

    An existing file is replaced only if it is an exported session (JSON). Raises UsageError for a name that promises
    something else, SessionError if it cannot be written.
    """
    if path.suffix.lower() not in _EXPORT_SUFFIXES:
        raise UsageError(
            f"a conversation cannot be written as {path.name!r:.80}",
            "end the name in .json, or in .md or .txt to read",
        )
    as_transcript = path.suffix.lower() in TRANSCRIPT_SUFFIXES
    try:
        data = _transcript(session, path).encode("utf-8") if as_transcript else _encoded(session, path)
    except UnicodeEncodeError as error:
        raise SessionError(
            f"{path} would hold text that is not valid Unicode: {error.object[error.start]!r}", "undo that message"
        ) from None
    with _reporting("write", path):
        try:
            create_exclusively(path, data)
        except FileExistsError:
            if as_transcript or not _is_session(path):
                raise SessionError(f"{path} already exists", "choose another name, or remove it first") from None
            write_atomically(path, data)


def import_session(path: Path) -> Session:
    """The session in a file that `export_session` or a store wrote, or the messages of another tool.

    Raises SessionError with the path.
    """
    return _read(path, decode_conversation)


def _is_session(path: Path) -> bool:
    try:
        _read(path)
    except SessionError:
        return False
    return True


def _read(path: Path, decode: Callable[[bytes], Session] = decode_session) -> Session:
    with _reporting("read", path):
        # Opening a pipe or a device could wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise SessionError(f"{path} is not a file", "name a file that abcli has saved")
        with path.open("rb") as file:
            data = file.read(MAX_SESSION_BYTES + 1)
    if len(data) > MAX_SESSION_BYTES:
        raise SessionError(f"{path} is larger than {MAX_SESSION_BYTES:,} bytes", "name a file that abcli has saved")
    try:
        return decode(data)
    except FormatError as error:
        raise SessionError(f"{path} {error}", "name a file that this version of abcli has saved") from None


def _encoded(session: Session, path: Path) -> bytes:
    try:
        data = encode_session(session)
    except FormatError as error:
        raise SessionError(f"{path} {error}", "undo the message with that text") from None
    if len(data) > MAX_SESSION_BYTES:
        raise SessionError(f"{path} would be larger than {MAX_SESSION_BYTES:,} bytes", "start a new session")
    return data


def _summary(path: Path) -> SessionSummary:
    try:
        session = _read(path)
    except SessionError as error:
        return SessionSummary(path.stem, path, problem=error.message)
    turns = sum(message.role == "user" for message in session.messages)
    return SessionSummary(path.stem, path, session.updated, session.model, turns)


def _transcript(session: Session, path: Path) -> str:
    """The conversation for people to read, as Markdown or plain text."""
    markdown = path.suffix.lower() == ".md"
    title = f"# {session.name}\n\nModel: {session.model}, {session.updated}\n" if markdown else ""
    heading = "## {}\n\n{}\n" if markdown else "{}:\n{}\n"
    parts = [heading.format(message.role.capitalize(), _said(message)) for message in session.messages]
    return "\n".join([title, *parts] if title else parts)


def _said(message: Message) -> str:
    """What a message says, its calls of tools included."""
    calls = [f"{call.name}({call.arguments})" for call in message.tool_calls]
    return "\n".join([message.content, *calls] if message.content else calls)


@contextmanager
def _reporting(action: str, path: Path) -> Iterator[None]:
    """Turn errors of the operating system into SessionError; what is expected is handled inside."""
    try:
        yield
    except (OSError, NotImplementedError) as error:
        raise _unusable(action, path, error) from error


def _unusable(action: str, path: Path, error: Exception) -> SessionError:
    number = error.errno if isinstance(error, OSError) else None
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    hints = {
        errno.ENOENT: "check the name",
        errno.ENOSPC: "free some space; what was saved before is intact",
        errno.EDQUOT: "free some space; what was saved before is intact",
    }
    return SessionError(f"cannot {action} {path}: {reason}", hints.get(number or 0, "check its permissions"))
