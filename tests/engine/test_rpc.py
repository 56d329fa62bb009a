"""The fused engine on a device with memory of its own: llama.cpp's RPC backend, served by another process.

It needs a build with RPC: `make setup ACCEL=rpc && make test ARGS=tests/engine/test_rpc.py`. Server and client are
processes of their own, since a device once registered would serve all models of the test process.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp.llama_cpp as llama
import pytest

from tests.support.tiny_gguf import write_tiny_model

START = "ggml_backend_rpc_start_server"
REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not hasattr(llama._lib, START), reason="this llama.cpp is built without RPC")

SERVER = """
import ctypes, sys
import llama_cpp.llama_cpp as llama
library = llama._lib
llama.llama_backend_init()
device = library.ggml_backend_dev_by_type
device.restype, device.argtypes = ctypes.c_void_p, [ctypes.c_int]
start = library.ggml_backend_rpc_start_server
start.restype = None
start.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.POINTER(ctypes.c_void_p)]
start(sys.argv[1].encode(), None, 2, 1, (ctypes.c_void_p * 1)(device(0)))
"""

CLIENT = """
import ctypes, json, sys
from dataclasses import replace
from pathlib import Path
import llama_cpp.llama_cpp as llama
import numpy as np
from abcli.config import BucketConfig, ContextConfig, ModelConfig
from abcli.engine.choose import verify_fused
from abcli.engine.make import make_engine
from abcli.gguf.checked import check_model
from abcli.native.llama import devices
from abcli.native.model import Model
from abcli.rope.bases import resolve_buckets

library = llama._lib
add = library.ggml_backend_rpc_add_server
add.restype, add.argtypes = ctypes.c_void_p, [ctypes.c_char_p]
register = library.ggml_backend_register
register.restype, register.argtypes = None, [ctypes.c_void_p]
register(add(sys.argv[1].encode()))
path, layers = Path(sys.argv[2]), int(sys.argv[3])


def logs(logits):
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def divergence(left, right):
    return float((np.exp(logs(left)) * (logs(left) - logs(right))).sum(axis=-1).max())


config = ContextConfig(context_size=256, slots=2, threads=2)
buckets = resolve_buckets(BucketConfig(bases=(5e3, 1e4, 2e4)), 1e4)
tokens = [index * 7 % 250 for index in range(120)]
result = {"devices": [device.name for device in devices()]}
with Model(check_model(ModelConfig(path, layers))) as model:
    for prefill in ("exact", "shared"):
        chosen = replace(config, prefill=prefill)
        reference, engine = (make_engine(kind, model, chosen, buckets) for kind in ("contexts", "fused"))
        with reference, engine:
            found = [divergence(reference.prefill(1, tokens), engine.prefill(1, tokens))]
            for token in range(10):
                found.append(divergence(reference.step({1: token})[1], engine.step({1: token})[1]))
            for each in (reference, engine):
                each.copy(1, 0)
                each.truncate(0, 60)
            both = [each.step({0: 3, 1: 4}) for each in (reference, engine)]
            found += [divergence(both[0][slot], both[1][slot]) for slot in (0, 1)]
            result[prefill] = {"note": str(engine.sharing), "divergence": max(found)}
            opened = engine._backend._context.devices.opened
            result["turning"] = engine.turning
            result["kinds"] = sorted("cpu" if device.is_cpu else "other" for device in opened)
    result["sound"] = verify_fused(model, replace(config, slots=1), buckets.bases).sound
print(json.dumps(result))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    endpoint = f"127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-c", SERVER, endpoint], stdout=subprocess.DEVNULL)
    try:
        for _ in range(600):
            assert process.poll() is None
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield endpoint
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("layers", "kinds"), [(-1, ["other"]), (4, ["cpu", "other"])], ids=["whole", "in part"])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma3"])
def test_fused_equals_contexts_on_another_device(
    server: str, tmp_path: Path, architecture: Any, layers: int, kinds: list[str]
) -> None:
    path = write_tiny_model(tmp_path / "model.gguf", architecture=architecture, layers=7)
    command = [sys.executable, "-c", CLIENT, server, str(path), str(layers)]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=600)
    assert answer.returncode == 0, answer.stderr[-3000:]
    result = json.loads(answer.stdout.splitlines()[-1])
    assert any(name.startswith("RPC") for name in result["devices"])
    assert result["kinds"] == kinds
    assert result["turning"] == "rows are turned inside llama.cpp's graph"
    assert result["sound"]
    for prefill in ("exact", "shared"):
        assert result[prefill]["note"].startswith(prefill)
        assert result[prefill]["divergence"] < 1e-4
