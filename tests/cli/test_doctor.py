"""`abcli doctor`: a screen of facts, whatever is broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from abcli import diagnosis
from abcli.cli.doctor import advice
from abcli.config import PROMPT_CACHE_LIMIT, prompt_cache_directory
from abcli.version import __version__
from tests.cli.conftest import Command

SCREEN = 24
SOUND: dict[str, Any] = {
    "llama_cpp": {"version": "llama.cpp 1", "devices": [{"name": "CPU"}], "hook_obstacle": ""},
    "memory": {"total": 16 << 30, "free": 8 << 30, "processors": 4, "load": 0.5},
    "default_model": "/models/model.gguf",
    "stored": {"prompts": {"size": 0}},
}
# What is said about slowness in any case.
ALWAYS = 2


def test_a_screen_of_facts(abcli: Command) -> None:
    prompt_cache_directory().mkdir(parents=True)
    (prompt_cache_directory() / "stored").write_bytes(b"x" * 5000)
    done = abcli("doctor")
    assert done.code == 0
    lines = done.text.splitlines()
    titles = [line.split()[0] for line in lines]
    assert titles[:3] == ["abcli", "llama.cpp", "device"]
    assert {"engine", "extras", "memory", "prompts", "try"} <= set(titles)
    assert __version__ in lines[0]
    assert len(lines) <= SCREEN


def test_the_same_as_json(abcli: Command) -> None:
    report = json.loads(abcli("doctor", "--json").text)
    assert report["abcli"] == __version__
    assert any(device["name"].startswith("CPU") for device in report["llama_cpp"]["devices"])
    assert report["llama_cpp"]["hook_obstacle"] == ""
    assert set(report["extras"]) >= {"plot", "socks", "zstd", "ray", "mcp"}
    assert report["extras"]["plot"]["matplotlib"]
    assert 0 < report["memory"]["free"] <= report["memory"]["total"]
    assert report["stored"]["prompts"] == {"path": str(prompt_cache_directory()), "size": 0, "files": 0}
    assert len(report["advice"]) >= ALWAYS


@pytest.mark.parametrize(
    ("module", "told"),
    [
        ("raise ImportError('libllama.so: no such file')", "libllama.so: no such file"),
        ("import os; os.abort()", "signal 6"),
    ],
)
def test_a_llama_cpp_that_does_not_load_is_a_fact(
    abcli: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, told: str
) -> None:
    (tmp_path / "llama_cpp").mkdir()
    (tmp_path / "llama_cpp" / "__init__.py").write_text(module)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = abcli("doctor")
    assert done.code == 0
    assert "does not load" in done.text
    assert told in done.text
    assert "make distclean setup" in done.text


def test_what_cannot_be_found_out_is_said(abcli: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("the disk is gone")

    for name in ("_native", "extras", "_memory", "_default_model", "_stored"):
        monkeypatch.setattr(diagnosis, name, broken)
    done = abcli("doctor")
    assert done.code == 0
    assert done.text.count("the disk is gone") == 4
    assert json.loads(abcli("doctor", "--json").text)["memory"] == {"problem": "OSError: the disk is gone"}


def test_nothing_wrong_needs_no_advice() -> None:
    assert len(list(advice(SOUND))) == ALWAYS


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"memory": SOUND["memory"] | {"free": 1 << 30}}, "1.0 GiB of memory"),
        ({"memory": SOUND["memory"] | {"load": 9.5}}, "load 9.5 on 4"),
        ({"default_model": {"problem": "not here"}}, "abcli pull default"),
        ({"stored": {"prompts": {"size": PROMPT_CACHE_LIMIT}}}, "abcli cache clear"),
        ({"stored": {"problem": "HF_HOME"}}, "HF_"),
        ({"llama_cpp": SOUND["llama_cpp"] | {"hook_obstacle": "none found"}}, "--engine contexts"),
    ],
)
def test_advice_for_what_is_wrong(changed: dict[str, Any], told: str) -> None:
    found = list(advice(SOUND | changed))
    assert len(found) == ALWAYS + 1
    assert told in found[0]


def test_a_gpu_without_a_build_for_it_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "ACCEL=cuda" in next(advice(SOUND))
    with_device = SOUND["llama_cpp"] | {"devices": [{"name": "CUDA0"}]}
    assert len(list(advice(SOUND | {"llama_cpp": with_device}))) == ALWAYS
