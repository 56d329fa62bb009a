"""The examples of docs/python.md, run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from abcli.config import DEFAULT_MODEL_FILE

ROOT = Path(__file__).resolve().parent.parent
PYTHON = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.M | re.S)
# What needs libraries of others; tests/peers runs it beside them.
FRAMES = {name: example for example in PYTHON for name in ("pandas", "polars") if example.startswith(f"# {name}\n")}
EXAMPLES = [example for example in PYTHON if example not in FRAMES.values()]


def run_example(example: str, folder: Path = ROOT) -> str:
    """What a program prints, run in a folder; it has to succeed."""
    done = subprocess.run([sys.executable, "-c", example], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_there_are_examples() -> None:
    assert (len(EXAMPLES), len(FRAMES)) == (8, 2)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_of_the_documentation_runs(example: str, tiny_model: Path, tmp_path: Path) -> None:
    """With a small model in the place of the default one."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / DEFAULT_MODEL_FILE).symlink_to(tiny_model)
    assert run_example(example, tmp_path)
