"""Where a chat's messages are typed: a line editor on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, InMemoryHistory
from prompt_toolkit.output import create_output
from prompt_toolkit.utils import is_dumb_terminal

from abcli.chat.files import decode_prompt
from abcli.errors import PromptError

BLOCK = '"""'


class LineReader(Protocol):
    """Gives lines one by one."""

    def line(self, *, continued: bool) -> str:
        """The next line; `continued` inside a block. Raises EOFError at the end, KeyboardInterrupt on Ctrl-C."""

    def answer(self, question: str) -> str:
        """What is typed to a question, which is not a message and not remembered. Raises as `line`."""


class EditorReader:
    """prompt_toolkit's line editor with history and completion of commands."""

    def __init__(self, history_file: Path, commands: Sequence[str]) -> None:
        self._session: PromptSession[str] = PromptSession(
            history=_history(history_file),
            completer=WordCompleter(list(commands), sentence=True),
            complete_while_typing=False,
            enable_suspend=True,
            # With standard output in a file or pipe, the prompt belongs on standard error.
            output=create_output(always_prefer_tty=True),
        )

    def line(self, *, continued: bool) -> str:
        """See `LineReader`."""
        return self._session.prompt(_prompt(continued))

    def answer(self, question: str) -> str:
        """See `LineReader`."""
        return PromptSession[str](history=InMemoryHistory(), output=self._session.output).prompt(question)


class StreamReader:
    """Lines of standard input: of a script, without a prompt, or of a terminal that can do no more than show them."""

    def __init__(self, *, prompt: bool = False) -> None:
        self._stream = sys.stdin.buffer
        self._prompt = prompt

    def line(self, *, continued: bool) -> str:
        """See `LineReader`; raises PromptError for a line that is not UTF-8."""
        return self.answer(_prompt(continued))

    def answer(self, question: str) -> str:
        """See `LineReader`; raises PromptError for a line that is not UTF-8."""
        if self._prompt:
            sys.stderr.write(question)
            sys.stderr.flush()
        data = self._stream.readline()
        if not data:
            raise EOFError
        return decode_prompt(data, "standard input").rstrip("\r\n")


def line_reader(history_file: Path, commands: Sequence[str]) -> LineReader:
    """The editor on a terminal that can move its cursor, else plain lines."""
    if not sys.stdin.isatty():
        return StreamReader()
    if is_dumb_terminal():
        return StreamReader(prompt=True)
    return EditorReader(history_file, commands)


def _prompt(continued: bool) -> str:
    return "... " if continued else "> "


class Entry(NamedTuple):
    """What was typed; a block is always a message, even if it looks like a command."""

    text: str
    is_block: bool


def read_message(line: Callable[[bool], str]) -> Entry:
    '''One message: a line, or everything between a line that begins with """ and one that ends with it.

    `line(continued)` gives the next line. A block that the input's end leaves open is taken as it is. Raises
    PromptError, after the whole block, if one of its lines cannot be read.
    '''
    first = line(False)
    if not first.lstrip().startswith(BLOCK):
        return Entry(first, is_block=False)
    rest = first.lstrip()[len(BLOCK) :]
    lines: list[str] = []
    failure: PromptError | None = None
    while not rest.rstrip().endswith(BLOCK):
        lines.append(rest)
        try:
            rest = line(True)
        except EOFError:
            break
        except PromptError as error:
            # The rest of the block must not be taken for messages of its own.
            failure, rest = failure or error, ""
    else:
        lines.append(rest.rstrip()[: -len(BLOCK)])
    if failure is not None:
        raise failure
    return Entry("\n".join(lines).strip("\n"), is_block=True)


def _history(path: Path) -> FileHistory | InMemoryHistory:
    """The history file, readable by its owner only; kept in memory where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)
        path.read_bytes()
    except OSError:
        return InMemoryHistory()
    return FileHistory(str(path))
