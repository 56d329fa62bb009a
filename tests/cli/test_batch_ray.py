"""`abcli batch --ray` on a real cluster of two workers, which are killed, and so is the one who gives them work."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.cli.conftest import PATIENCE, Command
from tests.cli.test_batch import BATCH, Spawn, count_lines, finished, results_of, wait_for, write_prompts

LINES = 100
# With a temperature: whoever answers a line must draw the same. Without flash attention and 16-bit caches, in whose
# last digits it shows which prompts are computed together.
EXACT = ("--engine", "contexts", "-fa", "off", "-ctk", "f32", "-ctv", "f32")
OPTIONS = ("-n", 48, "-k", 2, "-s", 5, "-c", 256, "--slots", 2, "--ignore-eos", *EXACT)
# On loopback only, for nobody without the token, and without a message to Ray's makers.
ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture(scope="module")
def short_directory() -> Iterator[Path]:
    """For Ray's sockets, whose paths must be short: pytest's own directories are too deep."""
    directory = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster(short_directory: Path) -> Iterator[tuple[str, psutil.Process]]:
    """The address of a cluster of two machines with one processor each, and the process that has started it."""
    pytest.importorskip("ray", reason="there is no Ray for this machine")
    script = Path(__file__).parents[1] / "support" / "ray_cluster.py"
    pipe = subprocess.PIPE
    environment = {**os.environ, **ENVIRONMENT, "RAY_TMPDIR": str(short_directory)}
    started = subprocess.Popen([sys.executable, str(script)], stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
    assert started.stdout is not None
    address = started.stdout.readline().decode().strip()
    assert address, started.communicate()[1].decode()
    yield address, psutil.Process(started.pid)
    family = psutil.Process(started.pid).children(recursive=True)
    started.communicate(timeout=PATIENCE)
    for process in family:
        if process.is_running():
            process.kill()


@pytest.fixture(autouse=True)
def _on_loopback(monkeypatch: pytest.MonkeyPatch, short_directory: Path) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_TMPDIR", str(short_directory))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prompts(tmp_path_factory.mktemp("input") / "prompts.txt", LINES)


def workers_of(owner: psutil.Process, doing: str = "") -> list[psutil.Process]:
    """The processes in which models are; Ray shows which method they are in."""
    found = []
    for process in owner.children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if words and words[0].startswith(f"ray::Worker{doing}"):
            found.append(process)
    return found


def lines_on_error(process: subprocess.Popen[bytes]) -> list[str]:
    _, errors = process.communicate(timeout=PATIENCE)
    return errors.decode().splitlines()


def test_deaths_of_workers_and_of_the_driver_lose_and_double_nothing(
    tiny_model: Path,
    prompts: Path,
    abcli: Command,
    spawn: Spawn,
    cluster: tuple[str, psutil.Process],
    tmp_path: Path,
) -> None:
    address, owner = cluster
    whole, output = tmp_path / "whole.jsonl", tmp_path / "answers.jsonl"
    finished(abcli(*BATCH, tiny_model, prompts, "-o", whole, *OPTIONS))
    command = (*BATCH, tiny_model, prompts, "-o", output, *OPTIONS, f"--ray={address}")

    # The driver is killed while both workers are busy; they go with it.
    driver = spawn(*command)
    wait_for(lambda: count_lines(output) >= 10 or driver.poll() is not None, "result")
    driver.kill()
    driver.wait()
    before = count_lines(output)
    assert 10 <= before < LINES
    wait_for(lambda: not workers_of(owner), "end of the workers")

    # One of two workers is killed while it has prompts.
    driver = spawn(*command)
    wait_for(lambda: count_lines(output) > before or driver.poll() is not None, "result")
    busy: list[psutil.Process] = []
    wait_for(lambda: busy.extend(workers_of(owner, ".exchange")) or bool(busy), "worker")
    busy[0].kill()
    told = lines_on_error(driver)
    assert driver.returncode == 0, told
    assert told[0].startswith(f"continuing {output}, which has ")
    (death,) = [line for line in told if "died and is replaced" in line]
    assert "(its process was killed or has crashed)" in death
    assert "given out again" in death
    assert told[-1].startswith(f"{LINES - before:,} answers, 0 errors, ")
    # Nothing of Ray's own, which would be further lines.
    assert len(told) <= 6, told
    assert results_of(output) == results_of(whole)


def test_an_interrupt_finishes_what_the_workers_have_begun(
    tiny_model: Path, prompts: Path, spawn: Spawn, cluster: tuple[str, psutil.Process], tmp_path: Path
) -> None:
    output = tmp_path / "answers.jsonl"
    command = (*BATCH, tiny_model, prompts, "-o", output, *OPTIONS, f"--ray={cluster[0]}", "--ray-workers", 1)
    driver = spawn(*command)
    wait_for(lambda: count_lines(output) >= 3 or driver.poll() is not None, "result")
    driver.send_signal(signal.SIGINT)
    told = lines_on_error(driver)
    assert driver.returncode == 130, told
    assert "finishing what is begun; once more stops at once" in told
    assert told[-3].startswith("to continue: abcli batch")
    assert f"--ray={cluster[0]}" in told[-3]
    assert 3 <= len(results_of(output)) < LINES


def test_a_worker_with_other_versions_is_refused(
    tiny_model: Path, prompts: Path, cluster: tuple[str, psutil.Process], tmp_path: Path
) -> None:
    script = (
        "import abcli.batch.cluster.ray_pool as pool\n"
        "pool.describe_versions = lambda: {'abcli': '0.0.1', 'llama-cpp-python': '0.0.2'}\n"
        "from abcli.cli._entry import main\n"
        "main()\n"
    )
    words = [*BATCH, tiny_model, prompts, "-o", tmp_path / "out", *OPTIONS, f"--ray={cluster[0]}"]
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)], capture_output=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 1
    error, hint = done.stderr.decode().splitlines()
    assert 'other versions than this machine (here -> there): abcli: "0.0.1" -> "' in error
    assert hint == "hint: install the same on every machine"


def test_without_an_address_it_makes_a_cluster_of_its_own(
    tiny_model: Path, abcli: Command, process: Command, tmp_path: Path, short_directory: Path
) -> None:
    """Standard output has the results alone, in order, and nothing is left behind."""
    pytest.importorskip("ray", reason="there is no Ray for this machine")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\ntwo\n\nthree\none\n")
    arguments = (*BATCH, tiny_model, "-", "-o", "-", "--ordered", "-n", 4, "-k", 1, "-s", 3, "-c", 256)
    here = abcli(*arguments, stdin=prompts.read_bytes())
    there = process(*arguments, "--ray", stdin=prompts.read_bytes())
    told = finished(there)
    assert there.output == here.output
    assert told[0].startswith("worker 1 of 1, on ")
    assert len(told) == 2, told
    assert list(short_directory.glob("abcli-*")) == []


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


WRONG = {
    "no address": (("--ray=nowhere",), "'nowhere' is no address of a Ray cluster"),
    "a client's address": (("--ray=ray://127.0.0.1:10001",), "is no address of a Ray cluster"),
    "nobody there": (("--ray=127.0.0.1:{port}",), "nothing answers at 127.0.0.1:{port}: "),
    "workers without a cluster": (("--ray-workers", "2"), "--ray-workers 2 is of no use without --ray"),
    "no workers": (("--ray", "--ray-workers", "0"), "--ray-workers 0 is impossible"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(tiny_model: Path, prompts: Path, abcli: Command, tmp_path: Path, case: str) -> None:
    words, expected = WRONG[case]
    port = str(free_port())
    outcome = abcli(
        *BATCH, tiny_model, prompts, "-o", tmp_path / "out", *(word.replace("{port}", port) for word in words)
    )
    assert outcome.code in (1, 2)
    assert expected.replace("{port}", port) in outcome.problem()[0]


def test_the_address_may_come_from_the_environment(
    tiny_model: Path, prompts: Path, abcli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    outcome = abcli(*BATCH, tiny_model, prompts, "-o", tmp_path / "out", "--ray")
    assert f"nothing answers at {address}" in outcome.problem()[0]


def test_without_ray_it_says_how_to_get_it(
    tiny_model: Path, prompts: Path, abcli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = abcli(*BATCH, tiny_model, prompts, "-o", tmp_path / "out", "--ray")
    error, hint = outcome.problem()
    assert outcome.code == 2
    assert error == "--ray needs Ray, which is not installed"
    assert hint == "pip install 'abcli[ray]'"
