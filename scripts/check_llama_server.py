"""Run llama.cpp's own tests of its server on `abcli serve`, and print how many pass and why others don't.

    python scripts/check_llama_server.py [PYTEST ARGUMENT ...]

They come from the source archive of the pinned llama-cpp-python, are kept per user, and run in an environment of their
own with what they ask for. Each test starts a server (scripts/llama_server.py) with a tiny model of random weights, so
that all takes a quarter of an hour or more. The exit status is 1 for a failure that is not explained here.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts.fetch_public_templates import TEMPLATES, directory, source_files
from scripts.run_peers import say, uv
from tests.support.tiny_gguf import write_tiny_model

ROOT = Path(__file__).resolve().parent.parent
TESTS = "tools/server/tests"
# Files whose subject this server has, too. Others: adapters, drafts, images, infilling, reranking, slot files, sleep,
# streams that are taken up again, a router, tools and MCP servers that llama-server runs itself.
FILES = ("basic", "chat_completion", "compat_anthropic", "compat_oai_responses", "completion", "ctx_shift")
FILES += ("ignore_eos", "metrics", "security", "template", "tokenize", "tool_call")

OWN_ENDPOINT = "asks llama-server's own /completion"
TEXT = "expects the words or the numbers of tokens of a certain model"
OTHER = "is about something that only llama-server has"
LEFT_OUT = {
    "test_chat_completion": TEXT,
    "test_chat_completion_cached_tokens": TEXT,
    "test_chat_completion_stream": TEXT,
    "test_chat_completion_with_openai_library": TEXT,
    "test_chat_template": TEXT,
    "test_completion_stream_with_openai_library*": TEXT,
    "test_completion_with_openai_library": TEXT,
    "test_responses_*with_openai_library": TEXT,
    "test_anthropic_thinking_with_reasoning_model": TEXT,
    "test_anthropic_vision_base64_with_multimodal_model": OTHER,
    "test_cors_proxy_only_forwards_explicit_proxy_headers": OTHER,
    "test_cors_origins_defaults_to_localhost_with_tools_enabled": OTHER,
    "test_load_split_model": OTHER,
    "test_local_media_file": OTHER,
    "test_metrics_embedding_prompt_is_counted": OTHER,
}
# Tests that fail, and why.
STRANGERS = "pages of strangers are refused, where llama-server answers them without a header, or lets them ask"
RANDOM = "a model of random weights ends its answer early, or writes halves of characters"
EXPLAINED = {
    "test_server_multiple_addresses": "a server has one address",
    "test_no_ui": "the page cannot be switched off",
    "test_server_model_aliases_and_tags": "models have no tags",
    "test_chat_template_*": "wants the prompt in the answer (__verbose)",
    "test_verbose_debug": "wants the prompt in the answer (__verbose)",
    "test_apply_chat_template": "there is no built-in template of that name (command-r)",
    "test_completion_with_response_format": "wants a list of a schema that allows everything else, too",
    "test_logprobs*": RANDOM,
    "test_chat_completions_multiple_choices": RANDOM,
    "test_ctx_shift_disabled_stream": RANDOM,
    "test_anthropic_vision_format_accepted": "wants 500 for an image; it is 400 here",
    "test_anthropic_tool_result_with_image": "wants 500 for an image; it is 400 here",
    "test_anthropic_empty_messages": "a conversation without a message is refused",
    "test_responses_stream_with_llama_telemetry": "wants response.completed for an answer that its limit cut off",
    "test_access_static_assets_without_api_key": "the page is one file",
    "test_cors_options": STRANGERS,
    "test_cors_origins_localhost_rejects": STRANGERS,
    "test_cors_origins_localhost_reflects": "looks for a header by its capitals, which HTTP does not tell apart",
}

_CONFTEST = '''"""No model is fetched."""
import pytest


@pytest.fixture(scope="session", autouse=True)
def load_server_presets():
    pass
'''
_ASKS_OWN = re.compile(r'"POST",\s*"/completions?"')


def fetch(target: Path) -> None:
    """Put the tests and the templates that they read into the directory `target`, which appears only when all is."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        found = Path(scratch, "llama.cpp")
        for path, data in source_files(target.name, TESTS, TEMPLATES):
            (found / path).parent.mkdir(parents=True, exist_ok=True)
            (found / path).write_bytes(data)
        (found / TESTS / "unit" / "conftest.py").write_text(_CONFTEST, encoding="utf-8")
        found.rename(target)


def reason_of(function: str, source: str, table: Mapping[str, str]) -> str:
    """Why a test is left out or known to fail, empty if it is not."""
    if table is LEFT_OUT and _ASKS_OWN.search(source):
        return OWN_ENDPOINT
    return next((reason for pattern, reason in table.items() if fnmatch(function, pattern)), "")


def chosen(unit: Path) -> tuple[list[str], Counter[str]]:
    """The tests to run, and how many are left out for which reason."""
    found: list[str] = []
    left_out: Counter[str] = Counter()
    for path in [unit / f"test_{name}.py" for name in FILES]:
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                reason = reason_of(node.name, ast.get_source_segment(text, node) or "", LEFT_OUT)
                if reason:
                    left_out[reason] += 1
                else:
                    found.append(f"unit/{path.name}::{node.name}")
    return found, left_out


def run(tests: Path, scratch: Path, selection: Sequence[str], arguments: Sequence[str]) -> Path:
    """Run the tests; the path of their report."""
    python = scratch / "environment" / "bin" / "python"
    for command in (["venv", str(python.parent.parent)], ["pip", "install", "--python", str(python)]):
        command += ["-r", str(tests / "requirements.txt")] if "install" in command else []
        if problem := uv(*command):
            sys.exit(f"error: what the tests need cannot be installed:\n{problem}")
    starter = scratch / "llama-server"
    starter.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {shlex.quote(str(ROOT / "scripts/llama_server.py"))} "$@"\n',
        encoding="utf-8",
    )
    starter.chmod(0o755)
    model = write_tiny_model(scratch / "tiny.gguf", tokenizer="llama", context_length=16384)
    environment = {
        **os.environ,
        "LLAMA_SERVER_BIN_PATH": str(starter),
        "ABCLI_MODEL": str(model),
        "ABCLI_SERVE_FLAGS": "--threads 1",
        "ABCLI_HOME": str(scratch / "home"),
    }
    report = scratch / "report.xml"
    command = [str(python), "-m", "pytest", "-q", "-m", "not slow", "--tb=short", f"--junitxml={report}"]
    subprocess.run([*command, *arguments, *selection], cwd=tests, env=environment, check=False)
    return report


def told(report: Path) -> tuple[int, dict[str, str]]:
    """From pytest's report: how many tests passed, and the message of each that did not."""
    passed, failed = 0, {}
    for case in ElementTree.parse(report).iter("testcase"):
        problem = next((item for item in case if item.tag in ("failure", "error")), None)
        if problem is not None:
            failed[case.get("name", "")] = problem.get("message", "")
        elif not any(item.tag == "skipped" for item in case):
            passed += 1
    return passed, failed


def main(arguments: Sequence[str]) -> int:
    """Entry point; `arguments` go on to pytest. The exit code."""
    kept = directory("server-tests")
    if not kept.is_dir():
        try:
            fetch(kept)
        except (OSError, subprocess.CalledProcessError, StopIteration) as error:
            sys.exit(f"error: llama.cpp's tests could not be fetched: {error}")
    selection, left_out = chosen(kept / TESTS / "unit")
    with tempfile.TemporaryDirectory() as scratch:
        passed, failed = told(run(kept / TESTS, Path(scratch), selection, arguments))
    say(f"passed: {passed} of {passed + len(failed)}")
    reasons = {name: reason_of(name.partition("[")[0], "", EXPLAINED) for name in failed}
    for reason, count in Counter(reasons.values()).items():
        say(f"failed, {count}: {reason or 'NOT EXPLAINED'}")
    for name in (name for name, reason in reasons.items() if not reason):
        say(f"  {name}: {' '.join(failed[name].split())[:300]}")
    for reason, count in left_out.items():
        say(f"left out, {count} functions: {reason}")
    return int("" in reasons.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
