"""Where a chat's messages are typed: a line editor on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, InMemoryHistory

from abcli.chat.files import decode_prompt

BLOCK = '"""'


class LineReader(Protocol):
    """Gives lines one by one."""

    def line(self, *, continued: bool) -> str:
        """The next line; `continued` inside a block. Raises EOFError at the end, KeyboardInterrupt on Ctrl-C."""


class EditorReader:
    """prompt_toolkit's line editor with history and completion of commands."""

    def __init__(self, history_file: Path, commands: Sequence[str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(history_file),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
        )

    def line(self, *, continued: bool) -> str:
        """See `LineReader`."""
        return self._session.prompt("... " if continued else "> ")


class StreamReader:
    """Lines of standard input that is not a terminal; no prompt is shown."""

    def __init__(self) -> None:
        self._stream = sys.stdin.buffer

    def line(self, *, continued: bool) -> str:
        """See `LineReader`; raises PromptError for a line that is not UTF-8."""
        data = self._stream.readline()
        if not data:
            raise EOFError
        return decode_prompt(data, "standard input").rstrip("\r\n")


def read_message(line: Callable[[bool], str]) -> str:
    '''One message: a line, or everything between a line that begins with """ and one that ends with it.

    `line(continued)` gives the next line. A block that the input's end leaves open is taken as it is.
    '''
    first = line(False)
    if not first.lstrip().startswith(BLOCK):
        return first
    rest = first.lstrip()[len(BLOCK) :]
    lines: list[str] = []
    while not rest.rstrip().endswith(BLOCK):
        lines.append(rest)
        try:
            rest = line(True)
        except EOFError:
            return "\n".join(lines).strip("\n")
    lines.append(rest.rstrip()[: -len(BLOCK)])
    return "\n".join(lines).strip("\n")


def _history(path: Path) -> FileHistory | InMemoryHistory:
    """The history file, readable by its owner only; kept in memory where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        path.read_bytes()
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
