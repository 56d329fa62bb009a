"""`abcli pull`, and models of the hub wherever a model is named: what people see, in processes of their own too."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from abcli.cli._options import ModelOptions
from abcli.errors import UsageError
from abcli.hub.aliases import set_alias
from tests.cli.conftest import PATIENCE, Command, command_line
from tests.support.hub import TOKEN, Fault, HubStandIn

NAME = "user/tiny-GGUF"
FILE = "tiny-Q4_K_M.gguf"


@pytest.fixture
def commit(hub: HubStandIn, cache: Path, tiny_model: Path) -> str:
    """A repository with the tiny model; its commit."""
    return hub.add(NAME, {FILE: tiny_model.read_bytes(), "README.md": b""})


def link(cache: Path, commit: str) -> Path:
    return cache / "models--user--tiny-GGUF" / "snapshots" / commit / FILE


@pytest.mark.parametrize("name", [NAME, f"{NAME}:q4_k_m", f"hf:{NAME}", f"{NAME}/{FILE}", f"https://hf.co/{NAME}"])
def test_pull_prints_the_path(abcli: Command, cache: Path, commit: str, tiny_model: Path, name: str) -> None:
    outcome = abcli("pull", name)
    assert (outcome.code, outcome.text) == (0, str(link(cache, commit)))
    line, *rest = outcome.errors.decode().splitlines()
    assert rest == []
    assert line == (f"fetching {FILE} from {NAME}@{commit[:12]} ({tiny_model.stat().st_size / 1000:.1f} kB)")
    # Nothing is said when nothing is done.
    again = abcli("pull", name)
    assert (again.code, again.output, again.errors) == (0, outcome.output, b"")


def test_quiet_prints_the_path_alone(abcli: Command, cache: Path, commit: str) -> None:
    outcome = abcli("pull", NAME, "--quiet")
    assert (outcome.code, outcome.text, outcome.errors) == (0, str(link(cache, commit)), b"")


def test_a_revision_is_pinned(abcli: Command, hub: HubStandIn, cache: Path, commit: str) -> None:
    hub.add(NAME, {FILE: b"GGUF" + bytes(100)})
    outcome = abcli("pull", NAME, "--revision", commit)
    assert outcome.text == str(link(cache, commit))
    (model,) = [one for one in json.loads(abcli("models", "--json").text) if one["source"]["kind"] == "hub"]
    assert model["source"] == {"kind": "hub", "repository": NAME, "file": FILE, "commit": commit, "refs": []}
    assert abcli("pull", f"{NAME}@{commit}", "--revision", "main").code == 2


def test_what_cannot_be_pulled(abcli: Command, cache: Path, tiny_model: Path, hub: HubStandIn) -> None:
    for name, code in ((str(tiny_model), 2), ("missing.gguf", 1), ("hf:nonsense", 2), ("user/none", 1), ("", 1)):
        outcome = abcli("pull", name)
        assert (outcome.code, outcome.output) == (code, b"")
        outcome.problem()
    hub.api_status = 500
    assert "500" in abcli("pull", NAME).problem()[0]


@pytest.mark.parametrize(
    "words",
    [
        [f"hf:{NAME}:Q4_K_M", "a prompt"],
        ["-hf", NAME, "a prompt"],
        ["--hf-repo", f"{NAME}:q4_k_m", "a prompt"],
        ["-m", f"{NAME}", "-p", "a prompt"],
        [NAME, "-p", "a prompt"],
        ["mine", "a prompt"],
    ],
)
def test_a_model_of_the_hub_just_works(
    abcli: Command, hub: HubStandIn, cache: Path, commit: str, words: list[str]
) -> None:
    set_alias("mine", f"hf:{NAME}")
    options = ["--buckets", "2", "-n", "3", "--temp", "0", "-c", "128", "--json", "--no-stats"]
    outcome = abcli("run", *words, *options)
    assert outcome.code == 0, outcome.errors
    assert json.loads(outcome.text)["model"] == str(link(cache, commit))
    assert outcome.errors.decode().startswith(f"fetching {FILE} from {NAME}")
    hub.requests.clear()
    again = abcli("run", *words, *options)
    assert (again.code, again.errors) == (0, b"")
    assert hub.requests == []


def test_two_models_are_too_many(abcli: Command) -> None:
    with pytest.raises(UsageError):
        ModelOptions(model="a.gguf", hf_repo=NAME)
    assert ModelOptions(hf_repo=NAME).model == ModelOptions(hf_repo=f"hf:{NAME}").model == f"hf:{NAME}"
    for words in (["-hf", NAME, "-m", "a.gguf", "prompt"], ["a.gguf", "prompt", "-hf", NAME]):
        outcome = abcli("run", *words)
        assert outcome.code == 2
        assert "two models" in outcome.problem()[0]


def test_commands_that_only_look_do_not_fetch(abcli: Command, hub: HubStandIn, cache: Path, commit: str) -> None:
    outcome = abcli("waves", NAME)
    assert outcome.code == 1
    assert f"abcli pull {NAME}" in outcome.problem()[1]
    assert hub.requests == []


def start(hub: HubStandIn, home: Path, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **hub.environment(home), **variables}
    pipe = subprocess.PIPE
    return subprocess.Popen(command_line(*arguments), env=environment, stdin=pipe, stdout=pipe, stderr=pipe)


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str, str]:
    output, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, output.decode(), errors.decode()


def test_a_killed_pull_goes_on_where_it_was(hub: HubStandIn, tmp_path: Path, tiny_model: Path) -> None:
    data = tiny_model.read_bytes()
    commit = hub.add(NAME, {FILE: data})
    hub.faults.append(Fault(hang_after=50_000))
    cache = tmp_path / "hub"
    process = start(hub, tmp_path, "pull", NAME)
    blobs = cache / "models--user--tiny-GGUF" / "blobs"
    end = time.monotonic() + PATIENCE
    # It has all that the server sends once the first bytes are in the file: what the server sent came in few pieces.
    while not any(path.stat().st_size == 50_000 for path in blobs.glob("*.incomplete")):
        assert process.poll() is None, finish(process)
        assert time.monotonic() < end
        time.sleep(0.02)
    process.kill()
    finish(process)
    hub.release.set()
    assert [path.name.endswith(".incomplete") for path in blobs.iterdir()] == [True]

    hub.requests.clear()
    code, output, errors = finish(start(hub, tmp_path, "pull", NAME))
    assert (code, output) == (0, f"{link(cache, commit)}\n")
    assert "50.0 kB of it are already here" in errors
    assert [request.headers.get("range") for request in hub.content_requests()] == ["bytes=50000-"]
    assert link(cache, commit).read_bytes() == data
    assert [path.name.endswith(".incomplete") for path in blobs.iterdir()] == [False]

    # The same process settings, offline: what is here works without a request, what is not is one clear line.
    hub.requests.clear()
    code, output, _errors = finish(start(hub, tmp_path, "pull", NAME, HF_HUB_OFFLINE="1"))
    assert (code, output) == (0, f"{link(cache, commit)}\n")
    code, output, errors = finish(start(hub, tmp_path, "run", "hf:user/other", "hello", HF_HUB_OFFLINE="1"))
    assert (code, output) == (1, "")
    assert len(errors.splitlines()) == 2
    assert "user/other is not in" in errors
    assert hub.requests == []


@pytest.mark.parametrize("trouble", ["none", "gated", "401", "429", "cut"])
def test_the_token_is_never_shown(
    abcli: Command,
    hub: HubStandIn,
    cache: Path,
    commit: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trouble: str,
) -> None:
    token = TOKEN if trouble == "none" else f"{TOKEN}x"
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setenv("ABCLI_DEBUG", "1")
    hub.repositories[NAME].gated = trouble in ("none", "gated")
    hub.api_status = int(trouble) if trouble.isdigit() else 0
    if trouble == "cut":
        hub.faults.extend([Fault(cut_after=10), *[Fault(cut_after=0)] * 4])
    outcome = abcli("pull", NAME)
    assert outcome.code == (0 if trouble == "none" else 1)
    assert any(request.headers.get("authorization") == f"Bearer {token}" for request in hub.requests)
    assert TOKEN.encode() not in outcome.output + outcome.errors
    for path in tmp_path.rglob("*"):
        assert TOKEN.encode() not in (path.read_bytes() if path.is_file() else b"")


def test_a_terminal_sees_a_bar(
    hub: HubStandIn, cache: Path, commit: str, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    from abcli.hub.names import HubName
    from abcli.ui.download import fetch_shown
    from abcli.ui.terminal import Terminal

    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    screen = Screen()
    assert fetch_shown(Terminal(io.StringIO(), screen), HubName(NAME)) == link(cache, commit)
    shown = screen.getvalue()
    assert f"fetching {FILE}" in shown
    size = f"{tiny_model.stat().st_size / 1000:.1f}"
    assert f"{size}/{size} kB" in shown
