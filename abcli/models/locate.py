"""Where the model is that a user names."""

from __future__ import annotations

from pathlib import Path

from abcli.config import DEFAULT_MODEL_FILE, home
from abcli.errors import ModelFileError

DEFAULT_NAME = "default"


def default_model_paths() -> tuple[Path, ...]:
    """Where the default model may lie: the working directory's `models/`, the checkout's, abcli's own."""
    checkout = Path(__file__).resolve().parents[2] / "models"
    return tuple(folder / DEFAULT_MODEL_FILE for folder in (Path("models"), checkout, home() / "models"))


def locate_model(name: str | None) -> Path:
    """The path of the model called `name`; None or "default" is the default model.

    Raises ModelFileError if the default model was never fetched. A path is returned as it is, unchecked.
    """
    if name is not None and name != DEFAULT_NAME:
        return Path(name).expanduser()
    for path in default_model_paths():
        if path.is_file():
            return path
    raise ModelFileError(
        f"the default model {DEFAULT_MODEL_FILE} is not here",
        "name a GGUF file, or run `make chat` in abcli's repository, which fetches the default model",
    )


def looks_like_model(word: str) -> bool:
    """Whether a command-line word is a model rather than a prompt: "default", *.gguf, or an existing file."""
    if word == DEFAULT_NAME or word.lower().endswith(".gguf"):
        return True
    try:
        return Path(word).expanduser().is_file()
    except (OSError, ValueError, RuntimeError):
        return False  # too long for a path, a NUL byte, or no such user after ~
