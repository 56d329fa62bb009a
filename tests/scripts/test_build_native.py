"""The build script without a build: keys, options, cache, errors."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from packaging.requirements import Requirement

from scripts import build_native as script


def make_wheel(path: Path, *libraries: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for library in ("libllama.so", *libraries):
            archive.writestr(f"llama_cpp/lib/{library}", "")
        archive.writestr("include/ggml-cuda.h", "")
    return path


class FakePip:
    """Stands in for every logged command: fetching makes an archive, building makes a wheel."""

    def __init__(self) -> None:
        self.commands: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []
        self.fails = ""
        self.output = ""
        self.libraries: tuple[str, ...] = ()
        self.interrupt = False

    def __call__(self, command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
        step = command[4]
        self.commands.append(list(command))
        self.environments.append(environment)
        if step == "wheel" and self.interrupt:
            raise KeyboardInterrupt
        if step == self.fails:
            log.write_text(self.output)
            return 1
        if step == "download":
            directory = Path(command[command.index("--dest") + 1])
            directory.mkdir()
            with tarfile.open(directory / "source.tar.gz", "w"):
                pass
        if step == "wheel":
            make_wheel(Path(command[command.index("--wheel-dir") + 1]) / "llama.whl", *self.libraries)
        return 0

    def steps(self) -> list[str]:
        return [command[4] for command in self.commands]


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(script, "run_logged", fake)
    monkeypatch.setattr(script, "require_tools", lambda accelerators, environment: {})
    return fake


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, on a machine where nothing is installed and whatever is installed works."""
    monkeypatch.setattr(script, "cache_directory", lambda environment, system: tmp_path / "wheels")
    monkeypatch.setattr(script, "installed_key", lambda: None)
    monkeypatch.setattr(script, "verify", lambda version, directory: None)
    monkeypatch.setattr(script.platform, "system", lambda: "Linux")
    monkeypatch.delenv("CMAKE_ARGS", raising=False)
    return tmp_path / "wheels"


def test_the_pin_is_within_the_requirement() -> None:
    text = (script.ROOT / "pyproject.toml").read_text()
    line = next(line for line in text.splitlines() if f'"{script.PACKAGE}' in line)
    requirement = Requirement(line.strip().strip('",'))
    assert requirement.specifier.contains(script.pinned_version(script.CONSTRAINTS))


@pytest.mark.parametrize("text", ["", "numpy==2\n", "llama-cpp-python>=0.3\n"])
def test_a_missing_pin_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "constraints.txt").write_text(text)
    with pytest.raises(script.SetupError, match="pins no version"):
        script.pinned_version(tmp_path / "constraints.txt")


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("cpu", ()),
        ("cuda", ("cuda",)),
        ("rpc, CUDA,rpc,", ("cuda", "rpc")),
        ("cpu,rpc", ("rpc",)),
    ],
)
def test_accelerators_are_read(text: str, names: tuple[str, ...]) -> None:
    assert script.parse_accelerators(text, "Linux") == names


def test_an_unknown_accelerator_is_named_with_the_known_ones() -> None:
    with pytest.raises(script.SetupError, match="'cdua'") as caught:
        script.parse_accelerators("cdua,rpc", "Linux")
    assert "cuda" in caught.value.hint


def test_metal_is_for_macos_where_it_is_always_there() -> None:
    assert script.parse_accelerators("metal", "Darwin") == script.parse_accelerators("", "Darwin") == ()
    with pytest.raises(script.SetupError, match="macOS only"):
        script.parse_accelerators("metal", "Linux")


@pytest.mark.parametrize("name", sorted(set(script.ACCELERATORS) - {"metal"}))
def test_each_accelerator_switches_its_backend_on(name: str) -> None:
    assert f"-DGGML_{name.upper()}=ON" in script.cmake_arguments((name,), "Linux", "")


def test_blas_needs_a_vendor_outside_macos() -> None:
    assert "-DGGML_BLAS_VENDOR=OpenBLAS" in script.cmake_arguments(("blas",), "Linux", "")
    assert "-DGGML_BLAS_VENDOR=OpenBLAS" not in script.cmake_arguments(("blas",), "Darwin", "")


def test_the_users_options_come_last() -> None:
    arguments = script.cmake_arguments(("cuda",), "Linux", "-DGGML_NATIVE=OFF -DX=1")
    assert arguments == ["-DGGML_NATIVE=ON", "-DGGML_CUDA=ON", "-DGGML_NATIVE=OFF", "-DX=1"]


def test_the_key_changes_with_everything_that_changes_the_wheel() -> None:
    keys = {
        script.wheel_key("0.3.36", (), ["-DA", "avx2"]),
        script.wheel_key("0.3.37", (), ["-DA", "avx2"]),
        script.wheel_key("0.3.36", ("rpc",), ["-DA", "avx2"]),
        script.wheel_key("0.3.36", (), ["-DB", "avx2"]),
        script.wheel_key("0.3.36", (), ["-DA", "avx2 avx512f"]),
    }
    assert len(keys) == 5
    assert script.wheel_key("0.3.36", (), ["-DA"]) == script.wheel_key("0.3.36", (), ["-DA"])


@pytest.mark.parametrize("changed", ["processor", "gpu", "compiler"])
def test_the_key_of_a_machine_changes_with_its_parts(monkeypatch: pytest.MonkeyPatch, changed: str) -> None:
    before = script.machine_key("0.3.36", ("cuda",), [])
    if changed == "processor":
        monkeypatch.setattr(script, "processor_features", lambda system: "another")
    elif changed == "gpu":
        monkeypatch.setattr(script, "graphics_features", lambda accelerators: "9.0")
    else:
        monkeypatch.setenv("CXX", "another-compiler")
    assert script.machine_key("0.3.36", ("cuda",), []) != before


def test_features_are_read_whatever_their_order(tmp_path: Path) -> None:
    one, two, other = tmp_path / "one", tmp_path / "two", tmp_path / "other"
    one.write_text("processor\t: 0\ncpu MHz\t: 2000\nflags\t\t: avx fma\n")
    two.write_text("processor\t: 0\ncpu MHz\t: 3000\nflags\t\t: fma avx\n\nprocessor\t: 1\nflags\t\t: avx fma\n")
    other.write_text("CPU implementer\t: 0x41\nFeatures\t: fp asimd\nCPU part\t: 0xd0c\n")
    assert script.processor_features("Linux", one) == script.processor_features("Linux", two) == "avx fma"
    assert script.processor_features("Linux", other) == "0x41 0xd0c asimd fp"
    script.processor_features("Linux", tmp_path / "missing")


def test_the_cache_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert script.cache_directory({}, "Linux") == tmp_path / ".cache/abcli/wheels"
    assert script.cache_directory({"XDG_CACHE_HOME": "/c"}, "Linux") == Path("/c/abcli/wheels")
    assert script.cache_directory({"XDG_CACHE_HOME": "relative"}, "Linux") == tmp_path / ".cache/abcli/wheels"
    assert script.cache_directory({}, "Darwin") == tmp_path / "Library/Caches/abcli/wheels"


def test_a_first_set_up_builds_and_a_second_installs_from_the_cache(cache: Path, pip: FakePip) -> None:
    pip.libraries = ("libggml-rpc.so",)
    script.set_up("rpc")
    assert pip.steps() == ["download", "wheel", "install", "install"]
    pip.commands.clear()
    script.set_up("rpc")
    assert pip.steps() == ["install", "install"]
    assert [path.suffix for path in cache.iterdir() if path.name.startswith(".")] == []


def test_other_accelerators_are_another_wheel(cache: Path, pip: FakePip) -> None:
    script.set_up("")
    pip.commands.clear()
    pip.libraries = ("libggml-rpc.so",)
    script.set_up("rpc")
    assert "wheel" in pip.steps()
    assert len(list(cache.glob("*/*.whl"))) == 2


def test_the_build_gets_its_options_and_no_cached_wheel(cache: Path, pip: FakePip) -> None:
    script.set_up("")
    build, environment = pip.commands[1], pip.environments[1]
    assert "--no-cache-dir" in build
    assert environment["CMAKE_ARGS"] == "-DGGML_NATIVE=ON"
    assert int(environment["CMAKE_BUILD_PARALLEL_LEVEL"]) >= 1
    assert "--no-cache-dir" not in pip.commands[0]


def test_nothing_is_done_when_the_right_wheel_is_installed(
    cache: Path, pip: FakePip, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = script.machine_key(script.pinned_version(script.CONSTRAINTS), (), ["-DGGML_NATIVE=ON"])
    monkeypatch.setattr(script, "installed_key", lambda: key)
    script.set_up("")
    assert pip.commands == []
    script.set_up("cpu")
    assert pip.commands == []


def test_the_installed_key_is_the_directory_pip_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    def distribution(record: str | None) -> None:
        found = SimpleNamespace(read_text=lambda name: record)
        monkeypatch.setattr(script.importlib.metadata, "distribution", lambda name: found)

    distribution(json.dumps({"url": "file:///home/a%20b/wheels/the-key/llama.whl"}))
    assert script.installed_key() == "the-key"
    for record in (None, "", "not json", "{}"):
        distribution(record)
        assert script.installed_key() is None


def test_a_damaged_wheel_is_built_again(cache: Path, pip: FakePip) -> None:
    script.set_up("")
    wheel = next(cache.glob("*/*.whl"))
    wheel.write_bytes(wheel.read_bytes()[:40])
    pip.commands.clear()
    script.set_up("")
    assert "wheel" in pip.steps()
    assert zipfile.is_zipfile(wheel)


def test_an_interrupted_build_leaves_no_wheel(cache: Path, pip: FakePip, capsys: pytest.CaptureFixture[str]) -> None:
    pip.interrupt = True
    assert script.main([]) == 130
    assert [path for path in cache.iterdir() if path.is_dir()] == []
    assert "Traceback" not in capsys.readouterr().err


def test_what_a_killed_build_left_is_removed(cache: Path, pip: FakePip) -> None:
    key = script.machine_key(script.pinned_version(script.CONSTRAINTS), (), ["-DGGML_NATIVE=ON"])
    left = cache / f".{key}.abc" / "wheel"
    make_wheel(left / "half.whl")
    script.set_up("")
    assert not left.exists()


def test_a_wheel_without_the_backend_is_refused(cache: Path, pip: FakePip) -> None:
    with pytest.raises(script.SetupError, match="left cuda out"):
        script.set_up("cuda")
    assert list(cache.glob("*/*.whl")) == []


@pytest.mark.parametrize(
    ("step", "output", "hint"),
    [
        ("wheel", "x\nNo space left on device\n", "free some space"),
        ("wheel", "c++: fatal error: Killed signal terminated program cc1plus\n", "PARALLEL_LEVEL=1"),
        ("wheel", "CMake Error: No CMAKE_CXX_COMPILER could be found.\n", "build-essential"),
        ("wheel", 'CMake Error:\n  set to "native", but no GPU was detected.\n', "CMAKE_CUDA_ARCHITECTURES"),
        ("download", "ERROR: No matching distribution found for llama-cpp-python\n", "network"),
        ("wheel", "-- The C compiler identification is GNU 12\nfile.cpp:1:1: error: what\n", "see the log"),
        ("install", "ERROR: something\n", "see the log"),
    ],
)
def test_a_failed_step_is_explained(
    cache: Path, pip: FakePip, capsys: pytest.CaptureFixture[str], step: str, output: str, hint: str
) -> None:
    pip.fails, pip.output = step, output
    assert script.main([]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-2].startswith("error: ")
    assert str(cache) in lines[-2]
    assert hint in lines[-1]


def test_a_failed_build_names_what_the_accelerator_needs(cache: Path, pip: FakePip) -> None:
    pip.fails, pip.output = "wheel", "CMake Error: Could NOT find Vulkan\n"
    with pytest.raises(script.SetupError) as caught:
        script.set_up("vulkan")
    assert "glslc" in caught.value.hint


def test_the_decisive_lines_are_shown() -> None:
    noise = [f"-- step {number}" for number in range(100)]
    log = "\n".join([*noise, "a.cpp:3:1: error: no such thing", "note: see pip", "", *noise])
    lines = script.relevant_lines(log)
    assert lines[:2] == ["-- step 99", "a.cpp:3:1: error: no such thing"]
    assert len(lines) == script.LOG_LINES
    assert "note: see pip" not in lines
    assert script.relevant_lines("\n".join(noise)) == noise[-script.LOG_LINES :]


def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.raises(script.SetupError, match="no C compiler"):
        script.require_tools((), {})
    monkeypatch.setattr(script.shutil, "which", lambda name: name if name in ("cc", "c++") else None)
    monkeypatch.setattr(script.platform, "system", lambda: "Linux")
    assert script.require_tools((), {}) == {}
    with pytest.raises(script.SetupError, match="looked for mine"):
        script.require_tools((), {"CXX": "mine -flag"})
    with pytest.raises(script.SetupError, match="icx"):
        script.require_tools(("sycl",), {})


def test_cuda_is_looked_for_before_a_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script.shutil, "which", lambda name: name if name in ("cc", "c++") else None)
    monkeypatch.setattr(script.platform, "system", lambda: "Linux")
    monkeypatch.setattr(script.Path, "exists", lambda path: False)
    with pytest.raises(script.SetupError, match="nvcc"):
        script.require_tools(("cuda",), {})
    assert script.require_tools(("cuda",), {"CUDACXX": "/opt/nvcc"}) == {}
    monkeypatch.setattr(script.Path, "exists", lambda path: True)
    assert "CUDACXX" in script.require_tools(("cuda",), {})


def test_output_goes_to_the_log(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"]
    assert script.run_logged(command, os.environ, tmp_path / "log") == 3
    assert set((tmp_path / "log").read_text().split()) == {"out", "err"}


def test_a_termination_ends_the_whole_build(tmp_path: Path) -> None:
    """A terminated script takes the grandchildren along: the compilers of a build."""
    pid_file = tmp_path / "pid"
    child = f"sleep 60 & echo $! > {pid_file}.new && mv {pid_file}.new {pid_file}; wait"
    program = (
        "import os, pathlib, signal, sys\n"
        "from scripts import build_native as script\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"script.run_logged(['sh', '-c', {child!r}], os.environ, pathlib.Path({str(tmp_path / 'log')!r}))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=script.ROOT) as process:
        wait_until(pid_file.exists)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 143
    grandchild = int(pid_file.read_text())
    wait_until(lambda: not is_running(grandchild))


def test_a_second_builder_waits_for_the_first(tmp_path: Path) -> None:
    order: list[str] = []
    entered = threading.Event()

    def second() -> None:
        entered.set()
        with script.only_one(tmp_path / "lock"):
            order.append("second")

    with script.only_one(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        time.sleep(0.1)
        order.append("first")
    thread.join(timeout=20)
    assert order == ["first", "second"]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise ImportError('libcuda.so.1: cannot open')", "libcuda"),
        ("import os; os.kill(os.getpid(), 4)", "status -4"),
        ("__version__ = '0.0.1'\ndef llama_backend_init(): pass", r"version 0\.0\.1"),
    ],
)
def test_a_package_that_does_not_work_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    (tmp_path / "llama_cpp.py").write_text(program)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(script.SetupError, match=message) as caught:
        script.verify("0.3.36", tmp_path / "key")
    assert "key" in caught.value.hint


def test_a_cache_that_cannot_be_made_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(script, "cache_directory", lambda environment, system: tmp_path / "file" / "wheels")
    monkeypatch.setattr(script, "installed_key", lambda: None)
    assert script.main([]) == 1
    assert "XDG_CACHE_HOME" in capsys.readouterr().err


def is_running(pid: int) -> bool:
    """Whether a process lives; one that waits to be collected by its parent does not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
