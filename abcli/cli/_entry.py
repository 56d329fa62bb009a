"""Where the program begins: a shell that asks at Tab is answered before the commands are imported, which takes long."""

from __future__ import annotations

import os
import signal
import sys


def main() -> None:
    """The console script."""
    # While modules are imported, Ctrl-C ends this program as it ends others: without a traceback.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from abcli.cli._completion import completion

    answer = completion(os.environ)
    if answer is None:
        from abcli.cli.main import call

        if interruptible:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.exit(call())
    text, code = answer
    sys.stdout.write(f"{text}\n" if text else "")
    sys.exit(code)
