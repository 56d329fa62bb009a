"""Fixtures shared by all tests: an own home directory, the real model and a tiny random one."""

from __future__ import annotations

from pathlib import Path

import pytest

from abcli.config import DEFAULT_MODEL_FILE, ENV_HOME
from tests.support.tiny_gguf import write_tiny_model

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or writes the user's own sessions, history or trials."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv(ENV_HOME, str(home))
    return home


@pytest.fixture(scope="session")
def real_model() -> Path:
    """SmolLM2-135M-Instruct Q4_1, which `make test` fetches."""
    path = REPOSITORY / "models" / DEFAULT_MODEL_FILE
    if not path.is_file():
        pytest.skip("the real model is missing: run scripts/fetch_default_model.py")
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama-architecture model with random weights, 300 tokens and a ChatML template."""
    path = tmp_path_factory.mktemp("models") / "tiny.gguf"
    write_tiny_model(path)
    return path
