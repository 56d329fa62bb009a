"""A person at a terminal: types lines and keys, and reads what appears."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence

import pexpect

# What the line editor switches on when it waits for a line, and off when it has one.
_WAITING = "\x1b\\[\\?2004h"
_ACCEPTED = "\x1b\\[\\?2004l"
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

CTRL_C = "\x03"
CTRL_D = "\x04"
CTRL_Z = "\x1a"
UP = "\x1b[A"
ENTER = "\r"


class PseudoTerminal:
    """One command on a terminal of 40 lines."""

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], patience: float, columns: int = 120
    ) -> None:
        """`patience` is the longest wait for anything, in seconds."""
        with warnings.catch_warnings():
            # From Python 3.12 on, forking warns about threads, which the child does not use before it execs.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._child = pexpect.spawn(
                command[0],
                list(command[1:]),
                env=dict(environment),
                dimensions=(40, columns),
                encoding="utf-8",
                codec_errors="replace",
                timeout=patience,
            )

    def until_prompt(self) -> str:
        """Wait for the next prompt; what appeared before it."""
        self._child.expect(_WAITING)
        before = self._child.before
        # The prompt itself, as the editor draws it: ">", a blank, and the cursor is shown.
        self._child.expect("(>|\\.\\.\\.).*?\x1b\\[\\?25h")
        return _plain(before)

    def until(self, text: str) -> str:
        """Wait for `text`; what appeared before it."""
        self._child.expect_exact(text)
        return _plain(self._child.before)

    def raw_until(self, text: str) -> str:
        """Wait for `text`; what appeared before it, with every escape sequence."""
        self._child.expect_exact(text)
        return str(self._child.before)

    def press(self, keys: str) -> None:
        """Type `keys` without Enter."""
        self._child.send(keys)

    def begin(self, line: str) -> None:
        """Type a line and Enter; returns as soon as the line is accepted."""
        self._child.send(line + ENTER)
        self._child.expect(_ACCEPTED)

    def say(self, line: str) -> str:
        """Type a line and Enter; what appears until the next prompt."""
        self.begin(line)
        return self.until_prompt()

    def until_end(self) -> tuple[str, int | None]:
        """Wait for the end of the process; what appeared before it, and the exit code."""
        self._child.expect(pexpect.EOF)
        before = _plain(self._child.before)
        self._child.close()
        return before, self._child.exitstatus

    def kill(self) -> None:
        """End the process by SIGKILL, if it still runs."""
        self._child.close(force=True)

    def kill_hard(self) -> None:
        """SIGKILL at once, without the hang-up that closing the terminal would send first."""
        self._child.kill(9)
        self._child.wait()


def _plain(text: str) -> str:
    return _ESCAPES.sub("", text).replace("\r", "")
