"""Fixtures shared by all tests: an own home directory, the real model and a tiny random one."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from abcli.config import DEFAULT_MODEL_FILE, ENV_HOME
from tests.support.hub import HubStandIn, pointed_at, running_hub
from tests.support.tiny_gguf import write_tiny_model

REPOSITORY = Path(__file__).resolve().parents[1]

# huggingface_hub reads them when it is imported. No test asks the internet's hub or sees the user's models; what
# needs a hub uses tests/support/hub.py.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HOME"] = str(Path(tempfile.gettempdir()) / "abcli-tests-have-no-hub")
os.environ.pop("HF_TOKEN", None)

# What is to be computed on the CPU is computed there, also by a llama.cpp that would hand long prompts to a device.
os.environ["GGML_OP_OFFLOAD_MIN_BATCH"] = "1000000"

# Where bytecode may not be written, every process that a test starts compiles all modules anew: a quarter of its time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Threads of llama.cpp that wait for each other sleep: on a busy machine those that spin take many times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# A busy machine is no fault of an example.
settings.register_profile("abcli", deadline=None)
settings.load_profile("abcli")

# A shell ignores Ctrl-C for what it runs in the background, and so would everything that the tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_unconfigure() -> None:
    """Close what llama-cpp-python leaves open, of which the interpreter would complain at its end."""
    if bindings := sys.modules.get("llama_cpp._utils"):
        bindings.outnull_file.close()
        bindings.errnull_file.close()


# What is found out about a model once, in directories below the home: whether it loads, which engine is the faster.
FINDINGS = ("trials", "engines")


@pytest.fixture(scope="session", autouse=True)
def common_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The home of what is opened for several tests: none touches the user's own files."""
    home = tmp_path_factory.mktemp("home")
    for name in FINDINGS:
        (home / name).mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENV_HOME, str(home))
        yield home


@pytest.fixture(autouse=True)
def own_home(common_home: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home of one test; what is found out about a model is found out once for all tests."""
    home = tmp_path_factory.mktemp("home")
    for name in FINDINGS:
        (home / name).symlink_to(common_home / name)
    monkeypatch.setenv(ENV_HOME, str(home))
    return home


@pytest.fixture
def nothing_found_out(own_home: Path) -> None:
    """For tests of finding it out."""
    for name in FINDINGS:
        (own_home / name).unlink()


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


@pytest.fixture
def hub() -> Iterator[HubStandIn]:
    """A hub on loopback, with nothing on it."""
    with running_hub() as standing_in:
        yield standing_in


@pytest.fixture
def cache(hub: HubStandIn, tmp_path: Path) -> Iterator[Path]:
    """The hub's cache that this process uses, with the stand-in behind it."""
    with pointed_at(hub, tmp_path) as directory:
        yield directory
