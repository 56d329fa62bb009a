"""The tests for devices, on one that every machine has: llama.cpp's RPC backend, served by another process.

It needs a build with RPC: `make setup ACCEL=rpc && make test ARGS=tests/engine/test_rpc.py`. Server and client are
processes of their own, since a device once registered would serve all models of the test process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import llama_cpp.llama_cpp as llama
import pytest

from tests.engine.test_device import SERVER

START = "ggml_backend_rpc_start_server"
REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not hasattr(llama._lib, START), reason="this llama.cpp is built without RPC")

PROGRAM = """
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


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    endpoint = f"127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, endpoint], stdout=subprocess.DEVNULL)
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


def test_what_concerns_devices_passes_there(server: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "device",
        "tests/engine/test_device.py",
    ]
    environment = os.environ | {SERVER: server}
    found = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, env=environment, timeout=600)
    assert found.returncode == 0, found.stdout[-5000:]
    assert ", 1 skipped" in found.stdout.splitlines()[-1]
