"""What is tested beside the tools of others is abcli as it is installed, not the checkout."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import abcli

pytestmark = pytest.mark.peers


def test_abcli_comes_from_its_wheel() -> None:
    assert Path(sys.prefix) in Path(abcli.__file__).parents
    assert importlib.metadata.version("abcli") == abcli.__version__


def test_processes_that_tests_start_have_the_wheel_too(real_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "abcli", "run", str(real_model), "Say hello.", "--json", "-n", "4", "-k", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["text"]
    where = [sys.executable, "-c", "import abcli; print(abcli.__file__)"]
    found = subprocess.run(where, capture_output=True, text=True, timeout=60, check=True, cwd=Path.cwd())
    assert Path(sys.prefix) in Path(found.stdout.strip()).parents
