"""Where the program begins: a shell that asks at Tab is answered before the commands are imported, which takes long."""

from __future__ import annotations

import os
import sys

from abcli.cli._completion import completion


def main() -> None:
    """The console script."""
    answer = completion(os.environ)
    if answer is None:
        from abcli.cli.main import call

        sys.exit(call())
    text, code = answer
    sys.stdout.write(f"{text}\n" if text else "")
    sys.exit(code)
