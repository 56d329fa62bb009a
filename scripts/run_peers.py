"""Test abcli with the tools of others: install its wheel and them into .venv-peers, and run the tests marked peers.

They are many and large (900 MB), and some may not be had everywhere: such a tool is named and left out, and the tests
that need it are skipped. Runs with the Python of the environment that `make setup` makes, after `make dist`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-peers"
TOOLS = ROOT / "tests" / "peers" / "requirements.txt"
OVERRIDES = ROOT / "tests" / "peers" / "overrides.txt"
# Modules of other tests need what is not installed here.
TESTS = ("tests/peers", "tests/serve")
# The step may take 10 minutes: what installing leaves of them is for the tests.
INSTALL_SECONDS = 240
STEP_SECONDS = 590


def say(text: str) -> None:
    """Print a line for people."""
    print(text, file=sys.stderr, flush=True)


def requirements(text: str) -> list[str]:
    """The requirements of a requirements file, without its comments."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def own_wheels() -> list[str]:
    """What every test needs: abcli's wheel with the extras for other tools, and the llama-cpp-python installed here."""
    wheels = sorted((ROOT / "dist").glob("abcli-*.whl"))
    if len(wheels) != 1:
        sys.exit(f"error: one wheel of abcli should lie in {ROOT / 'dist'}, not {len(wheels)}\nrun make dist")
    # Without a wheel of this machine's it comes from the index, and is built once more.
    return [f"abcli[llm,serve] @ {wheels[0].as_uri()}", str(llama_wheel() or "llama-cpp-python")]


def llama_wheel() -> Path | None:
    """The wheel that the llama-cpp-python of this environment was installed from, if it is still there."""
    origin = importlib.metadata.distribution("llama-cpp-python").read_text("direct_url.json")
    path = Path(unquote(urlsplit(json.loads(origin or "{}").get("url", "")).path))
    return path if path.is_file() else None


def uv(*arguments: str) -> str | None:
    """Run uv; what it says when it fails, else None. Raises TimeoutExpired."""
    command = [sys.executable, "-m", "uv", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    return None if done.returncode == 0 else done.stderr.strip() or f"uv ended with status {done.returncode}"


def install(wanted: Sequence[str]) -> str | None:
    """Install requirements into the environment; what went wrong, else None. Raises TimeoutExpired."""
    return uv("pip", "install", "--python", str(ENVIRONMENT), "--overrides", str(OVERRIDES), *wanted)


def install_what_there_is(tools: Sequence[str]) -> None:
    """Install everything at once, or, where that fails, one after the other, and name what is left out."""
    own = own_wheels()
    if install([*own, *tools]) is None:
        return
    if problem := install(own):
        sys.exit(f"error: abcli's wheel cannot be installed:\n{problem}")
    for tool in tools:
        if problem := install([*own, tool]):
            say(f"left out: {tool}: {' '.join(problem.split())}")


def run_tests(arguments: Sequence[str], seconds: float) -> int:
    """The exit status of pytest in that environment. Raises TimeoutExpired, with all that the tests started ended."""
    # The tests come from the checkout, but abcli from its wheel: here, and in the processes that tests start.
    # What other packages warn about is theirs to see to.
    options = ["--import-mode=append", "-m", "peers", "-W", "default", *arguments]
    options += [folder for folder in TESTS if (ROOT / folder).is_dir()]
    command = [str(ENVIRONMENT / "bin" / "python"), str(ENVIRONMENT / "bin" / "pytest"), *options]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            return process.wait(timeout=seconds)
        except BaseException:
            # Servers that tests have started would go on.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise


def main(arguments: Sequence[str]) -> int:
    """Entry point; `arguments` are handed on to pytest. The exit code."""
    start = time.monotonic()
    if problem := uv("venv", "--clear", "--python", sys.executable, str(ENVIRONMENT)):
        sys.exit(f"error: {ENVIRONMENT} cannot be made:\n{problem}")
    try:
        install_what_there_is(requirements(TOOLS.read_text(encoding="utf-8")))
        return run_tests(arguments, STEP_SECONDS - (time.monotonic() - start))
    except subprocess.TimeoutExpired as late:
        say(f"error: not done after {late.timeout:.0f} seconds: {' '.join(late.cmd[:4])} ...")
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
