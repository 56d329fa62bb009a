"""Runs a command as a shell would, in a process group of its own, so that Ctrl-C reaches it and not who runs this.

`make chat` needs it: make ends with an error once it has seen Ctrl-C, even if what it runs goes on. Ctrl-Z stops both.
Without a terminal the command simply takes the place of this process.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType

_TERMINAL = 0
_INTERRUPTED = 130


def run(command: list[str]) -> int:
    """Run `command`; its exit code, 0 if it was interrupted: whoever presses Ctrl-C has met no error."""
    if not os.isatty(_TERMINAL) or os.tcgetpgrp(_TERMINAL) != os.getpgrp():
        os.execvp(command[0], command)
    # Without this, handing the terminal over from the background would stop this process.
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(_TERMINAL, os.getpid())
        signal.signal(signal.SIGTTOU, signal.SIG_DFL)
        os.execvp(command[0], command)

    def pass_on(number: int, _frame: FrameType | None) -> None:
        os.killpg(child, number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, pass_on)
    status = _wait(child)
    if os.tcgetpgrp(_TERMINAL) == child:
        os.tcsetpgrp(_TERMINAL, os.getpgrp())
    code = os.waitstatus_to_exitcode(status)
    code = 128 - code if code < 0 else code
    return 0 if code == _INTERRUPTED else code


def _wait(child: int) -> int:
    """The status with which the child ends; while it is stopped, so is the group of this process."""
    while True:
        _, status = os.waitpid(child, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            return status
        if os.tcgetpgrp(_TERMINAL) == child:
            os.tcsetpgrp(_TERMINAL, os.getpgrp())
        os.killpg(os.getpgrp(), signal.SIGTSTP)
        # `fg` has given the terminal to this group, `bg` has not.
        if os.tcgetpgrp(_TERMINAL) == os.getpgrp():
            os.tcsetpgrp(_TERMINAL, child)
        os.killpg(child, signal.SIGCONT)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
