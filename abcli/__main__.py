"""`python -m abcli`."""

from __future__ import annotations

from abcli.cli._entry import main

if __name__ == "__main__":
    main()
