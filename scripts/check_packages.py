"""Check what `make dist` has built as those who install it would: in clean environments, away from the checkout.

The wheel made from the source archive has to be the one that the checkout makes; and after pip, pipx and uv have
installed the two, `abcli` has to fetch its default model by itself, and to answer. llama-cpp-python comes from the
wheel that `make setup` built.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from uv import find_uv_bin

from abcli.config import DEFAULT_MODEL_FILE
from abcli.version import __version__
from scripts.run_peers import llama_wheel, say

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
WHEEL = DIST / f"abcli-{__version__}-py3-none-any.whl"
ARCHIVE = DIST / f"abcli-{__version__}.tar.gz"
EXTRAS = {"llm": "llm", "plot": "matplotlib", "serve": "starlette"}
STEP_SECONDS = 300


class PackageError(Exception):
    """What is wrong with a package."""


def run(command: list[str], **environment: str) -> str:
    """Standard output of a command that has to succeed, run outside the checkout. Raises PackageError."""
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=tempfile.gettempdir(),
        env={**os.environ, **environment},
        timeout=STEP_SECONDS,
        check=False,
    )
    if done.returncode != 0:
        raise PackageError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def check_archive(scratch: Path) -> None:
    """The wheel in dist/ comes from the source archive; the checkout has to give the same. Raises PackageError."""
    run([sys.executable, "-m", "uv", "build", "--quiet", "--wheel", "--out-dir", str(scratch), str(ROOT)])
    ours, theirs = contents(scratch / WHEEL.name), contents(WHEEL)
    if not any(name.endswith("/share/man/man1/abcli.1") for name in theirs):
        raise PackageError("the wheel has no man pages")
    different = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    if different:
        raise PackageError(f"the archive and the checkout make different wheels: {', '.join(different)}")


def check_abcli(program: Path, home: Path) -> None:
    """The installed command tells its version, fetches the default model and answers with it. Raises PackageError."""
    # Who has a tool of uv's has uv.
    surroundings = {"ABCLI_HOME": str(home), "PATH": f"{Path(find_uv_bin()).parent}{os.pathsep}{os.environ['PATH']}"}
    version = run([str(program), "--version"], **surroundings).splitlines()[0]
    if version != f"abcli {__version__}":
        raise PackageError(f"{program} is {version}, not {__version__}")
    model = home / "models" / DEFAULT_MODEL_FILE
    question = [str(program), "run", "Say hello.", "--temp", "0", "-n", "8", "--json"]
    answer = json.loads(run(question, **surroundings))
    if not answer["text"].strip() or len(answer["bases"]) < 2:
        raise PackageError(f"{program} run gave no answer of several buckets: {answer}")
    fetched = run([str(program), "pull", "default"], **surroundings).strip()
    if fetched != str(model):
        raise PackageError(f"{program} has fetched {fetched}, not {model}")
    models = json.loads(run([str(program), "models", "--json"], **surroundings))
    if str(model) not in [found["path"] for found in models]:
        raise PackageError(f"{program} models does not show {model}")


def with_pip(scratch: Path, llama: Path) -> Path:
    """Install the wheel with its extras by pip; the command."""
    run([sys.executable, "-m", "venv", str(scratch)])
    python = str(scratch / "bin" / "python")
    wanted = f"abcli[{','.join(EXTRAS)}] @ {WHEEL.as_uri()}"
    run([python, "-m", "pip", "install", "--quiet", wanted, str(llama)])
    run([python, "-c", f"import {', '.join(EXTRAS.values())}"])
    return scratch / "bin" / "abcli"


def with_uv(scratch: Path, llama: Path) -> Path:
    """Install the wheel by `uv tool install`; the command."""
    folders = {"UV_TOOL_DIR": str(scratch / "tools"), "UV_TOOL_BIN_DIR": str(scratch / "bin")}
    command = [sys.executable, "-m", "uv", "tool", "install", "--quiet", "--python", sys.executable]
    run([*command, "--with", str(llama), str(WHEEL)], **folders)
    return scratch / "bin" / "abcli"


def with_pipx(scratch: Path, llama: Path) -> Path:
    """Install the source archive by pipx; the command."""
    folders = {"PIPX_HOME": str(scratch / "home"), "PIPX_BIN_DIR": str(scratch / "bin")}
    folders["PIPX_MAN_DIR"] = str(scratch / "man")
    command = [sys.executable, "-m", "uv", "tool", "run", "--quiet", "--python", sys.executable, "pipx>=1.8,<2"]
    found = f"--find-links {llama.parent} --constraint {ROOT / 'constraints.txt'}"
    run([*command, "install", "--quiet", f"--pip-args={found}", str(ARCHIVE)], **folders)
    return scratch / "bin" / "abcli"


def main() -> int:
    """Entry point; the exit code."""
    llama = llama_wheel()
    if llama is None:
        say("error: llama-cpp-python was not installed from a wheel that make setup built\nrun make setup")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        try:
            check_archive(scratch / "dist")
            for install in (with_uv, with_pipx, with_pip):
                start = time.monotonic()
                check_abcli(install(scratch / install.__name__, llama), scratch / install.__name__ / "abcli")
                say(f"installed {install.__name__.replace('_', ' ')}, its model too ({time.monotonic() - start:.0f} s)")
        except (PackageError, subprocess.TimeoutExpired) as error:
            say(f"error: {error}")
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
