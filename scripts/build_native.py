"""Build llama-cpp-python once for this machine, keep the wheel, and install it into this environment.

The wheel is kept per user under a key made of everything that changes its contents, so that a second
checkout, or a second `make setup`, installs it in seconds. Runs with the Python of the environment that
the wheel goes into; needs the standard library only.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.parse
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "llama-cpp-python"
ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
LOG_LINES = 20
LOG_LINE_WIDTH = 200


class SetupError(Exception):
    """What is wrong (`message`) and what to do about it (`hint`)."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


@dataclass(frozen=True)
class Accelerator:
    """The CMake options of one llama.cpp backend, its library's name and what it needs on the machine."""

    options: tuple[str, ...]
    library: str
    needs: str


ACCELERATORS: dict[str, Accelerator] = {
    "blas": Accelerator(
        ("-DGGML_BLAS=ON",),
        "ggml-blas",
        "a BLAS library with headers (Debian: apt install libopenblas-dev pkg-config)",
    ),
    "cuda": Accelerator(
        ("-DGGML_CUDA=ON",),
        "ggml-cuda",
        "NVIDIA's CUDA toolkit, with nvcc in PATH or named by CUDACXX",
    ),
    "hip": Accelerator(("-DGGML_HIP=ON",), "ggml-hip", "AMD's ROCm 6.1 or newer, in /opt/rocm or named by ROCM_PATH"),
    "metal": Accelerator(("-DGGML_METAL=ON",), "ggml-metal", "macOS with Xcode's command line tools"),
    "rpc": Accelerator(("-DGGML_RPC=ON",), "ggml-rpc", "nothing beyond a compiler"),
    "sycl": Accelerator(
        ("-DGGML_SYCL=ON", "-DCMAKE_C_COMPILER=icx", "-DCMAKE_CXX_COMPILER=icpx"),
        "ggml-sycl",
        "Intel's oneAPI with its setvars.sh sourced",
    ),
    "vulkan": Accelerator(
        ("-DGGML_VULKAN=ON",),
        "ggml-vulkan",
        "the Vulkan loader and headers, glslc and SPIRV-Headers, as new as this llama.cpp",
    ),
}
# The CPU backend is always built; the name exists to say "nothing else".
CPU = "cpu"

# What a failed build prints -> what to do; the first match counts.
SYMPTOMS: tuple[tuple[str, str], ...] = (
    (r"No space left on device", "free some space, or set TMPDIR and XDG_CACHE_HOME to a larger disk"),
    (
        r"Killed signal terminated|internal compiler error: Killed|out of memory",
        "the compiler ran out of memory: set CMAKE_BUILD_PARALLEL_LEVEL=1 and try again",
    ),
    (
        r"name resolution|Failed to establish a new connection|NewConnectionError|Network is unreachable"
        r"|Connection (?:refused|reset|timed out)|Read timed out|ProxyError|No matching distribution found",
        "the package index did not give what was asked for: check the network and pip's configuration",
    ),
    (
        r'"native", but no GPU was detected',
        "no GPU is visible: name the one to build for, for example CMAKE_ARGS=-DCMAKE_CUDA_ARCHITECTURES=89",
    ),
    (
        r"No CMAKE_C(?:XX)?_COMPILER could be found|CMAKE_C(?:XX)?_COMPILER not set|The C(?:XX)? compiler\s*\n",
        "install a C and C++ compiler (Debian: apt install build-essential; macOS: xcode-select --install)",
    ),
)
ERROR_LINE = re.compile(r"(?:^|\s)(?:fatal )?error:|CMake Error|^FAILED:|No space left|Killed", re.IGNORECASE)
# pip's own frame around the output of the build says nothing about the cause.
BOILERPLATE = re.compile(
    r"^\s*$|subprocess-exited-with-error|^\s*(?:note|hint):|\[notice\]|full command:|^\s*cwd:|[\u00d7\u2502\u2570]"
    r"|ERROR: Failed building|Failed to build|did not run successfully|^\s*exit code:|Configuring incomplete"
)


def pinned_version(constraints: Path) -> str:
    """The exact version that `constraints.txt` asks for."""
    try:
        text = constraints.read_text(encoding="utf-8")
    except OSError as error:
        raise SetupError(f"{constraints} cannot be read: {error.strerror}", "check the checkout out again") from error
    found = re.search(rf"^{re.escape(PACKAGE)}\s*==\s*([0-9][^\s;#]*)", text, re.MULTILINE)
    if found is None:
        raise SetupError(f"{constraints} pins no version of {PACKAGE}", f"add a line such as {PACKAGE}==0.3.36")
    return found.group(1)


def parse_accelerators(text: str, system: str) -> tuple[str, ...]:
    """The backends named in `text` ("cuda,rpc"), sorted, each once; none named means llama.cpp's default."""
    names = {name.strip().lower() for name in text.split(",")} - {""}
    unknown = sorted(names - ACCELERATORS.keys() - {CPU})
    if unknown:
        known = ", ".join(sorted([CPU, *ACCELERATORS]))
        raise SetupError(f"unknown accelerator {', '.join(unknown)!r}", f"known are {known}; several as cuda,rpc")
    if "metal" in names and system != "Darwin":
        raise SetupError("metal is there on macOS only", "choose another ACCEL, or leave it out for the CPU")
    # llama-cpp-python switches Metal on in every macOS build, so naming it changes nothing.
    return tuple(sorted(names - {CPU, "metal"}))


def cmake_arguments(accelerators: Sequence[str], system: str, extra: str) -> list[str]:
    """The options of the build; those of the user (`extra`) come last, where CMake lets them win."""
    # Said outright, because llama.cpp drops it when SOURCE_DATE_EPOCH is set.
    arguments = ["-DGGML_NATIVE=ON"]
    for name in accelerators:
        arguments += ACCELERATORS[name].options
        if name == "blas" and system != "Darwin":
            arguments.append("-DGGML_BLAS_VENDOR=OpenBLAS")
    return arguments + extra.split()


def processor_features(system: str, cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """What a build for this very CPU depends on: its instruction sets and, on ARM, its parts."""
    if system == "Darwin":
        names = ("machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features")
        return " ".join(output_of(["sysctl", "-n", name]) for name in names)
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor()
    wanted = re.compile(r"^(?:flags|features|cpu implementer|cpu part|isa|cpu)\s*:\s*(.+)$", re.I | re.M)
    return " ".join(sorted({word for line in wanted.findall(text) for word in line.split()}))


def graphics_features(accelerators: Sequence[str]) -> str:
    """The compute capabilities of the NVIDIA GPUs here: a native CUDA build holds code for these alone."""
    if "cuda" not in accelerators:
        return ""
    capabilities = output_of(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    return " ".join(sorted(set(capabilities.split())))


def output_of(command: Sequence[str]) -> str:
    """The standard output of a small command, empty when it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def wheel_key(version: str, accelerators: Sequence[str], ingredients: Sequence[str]) -> str:
    """A readable directory name that is different for every wheel that would be different."""
    digest = hashlib.sha256("\0".join([version, *accelerators, *ingredients]).encode()).hexdigest()
    named = "+".join(accelerators) or CPU
    return f"{version}-{platform.system()}-{platform.machine()}-{named}-{digest[:12]}".lower()


def machine_key(version: str, accelerators: Sequence[str], arguments: Sequence[str]) -> str:
    """The key of the wheel that this machine, compiler choice and set of options need."""
    system = platform.system()
    environment = [os.environ.get(name, "") for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS")]
    libc = "-".join(platform.libc_ver()) if system == "Linux" else platform.mac_ver()[0].split(".")[0]
    features = [processor_features(system), graphics_features(accelerators)]
    return wheel_key(version, accelerators, [*arguments, *environment, libc, *features])


def cache_directory(environment: Mapping[str, str], system: str) -> Path:
    """Where this user's wheels are kept."""
    if system == "Darwin":
        return Path.home() / "Library" / "Caches" / "abcli" / "wheels"
    chosen = environment.get("XDG_CACHE_HOME", "")
    # The XDG specification says that a relative path is to be ignored.
    base = Path(chosen) if Path(chosen).is_absolute() else Path.home() / ".cache"
    return base / "abcli" / "wheels"


def cached_wheel(directory: Path) -> Path | None:
    """The whole wheel in `directory`; a damaged one is removed and counts as none."""
    wheels = sorted(directory.glob("*.whl"))
    if not wheels:
        return None
    if zipfile.is_zipfile(wheels[0]):
        return wheels[0]
    say(f"{wheels[0]} is damaged: it is built again")
    shutil.rmtree(directory)
    return None


def installed_key() -> str | None:
    """The key of the wheel that is installed here, from the origin that pip recorded for it."""
    try:
        record = importlib.metadata.distribution(PACKAGE).read_text("direct_url.json")
        url = urllib.parse.urlparse(json.loads(record or "{}").get("url", ""))
    except (importlib.metadata.PackageNotFoundError, ValueError):
        return None
    return Path(urllib.parse.unquote(url.path)).parent.name or None


def require_tools(accelerators: Sequence[str], environment: Mapping[str, str]) -> dict[str, str]:
    """Check for what pip cannot fetch; the result is to be added to the environment of the build."""
    for variable, names, language in (
        ("CC", ("cc", "gcc", "clang"), "C"),
        ("CXX", ("c++", "g++", "clang++"), "C++"),
    ):
        chosen = environment.get(variable, "").split()[:1]
        candidates = ("icx", "icpx") if "sycl" in accelerators else tuple(chosen) or names
        if not any(shutil.which(name) for name in candidates):
            wanted = ACCELERATORS["sycl"].needs if "sycl" in accelerators else compiler_package()
            raise SetupError(f"no {language} compiler found (looked for {', '.join(candidates)})", f"install {wanted}")
    # macOS has a `cc` even where nothing is behind it.
    if platform.system() == "Darwin" and not output_of(["xcode-select", "-p"]):
        raise SetupError("the C and C++ compilers are not installed", f"run {compiler_package()}")
    given = environment.get("CUDACXX") or "CMAKE_CUDA_COMPILER" in environment.get("CMAKE_ARGS", "")
    if "cuda" in accelerators and not given and shutil.which("nvcc") is None:
        usual = Path("/usr/local/cuda/bin/nvcc")
        if not usual.exists():
            raise SetupError("nvcc, the CUDA compiler, is not found", f"cuda needs {ACCELERATORS['cuda'].needs}")
        return {"CUDACXX": str(usual)}
    return {}


def compiler_package() -> str:
    """How to get a compiler on this system."""
    if platform.system() == "Darwin":
        return "xcode-select --install"
    return "a C and C++ compiler, on Debian: apt install build-essential"


@contextlib.contextmanager
def only_one(lock: Path) -> Iterator[None]:
    """Let one process at a time build a wheel; the lock ends with the process, however that ends."""
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another build of the same wheel is under way: waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            # A file system without locks costs a second build, not a broken one: the rename is atomic.
            pass
        yield


def run_logged(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Run a command with its output in `log`; an interruption ends its compilers too."""
    with (
        log.open("ab") as sink,
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
        ) as process,
    ):
        try:
            return process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise


def relevant_lines(log: str) -> list[str]:
    """The lines that say why a build failed: from the first error on, else the last ones."""
    lines = [line[:LOG_LINE_WIDTH] for line in log.splitlines() if not BOILERPLATE.search(line)]
    first = next((number for number, line in enumerate(lines) if ERROR_LINE.search(line)), None)
    return lines[-LOG_LINES:] if first is None else lines[max(0, first - 1) :][:LOG_LINES]


def build_hint(log: str, accelerators: Sequence[str]) -> str:
    """What to do about a failed build."""
    for pattern, hint in SYMPTOMS:
        if re.search(pattern, log):
            return hint
    needs = "; ".join(f"{name} needs {ACCELERATORS[name].needs}" for name in accelerators)
    return needs or "see the log for the whole output"


def failure(step: str, log: Path, accelerators: Sequence[str]) -> SetupError:
    """The error of a failed step, after the decisive lines of its log were printed."""
    text = log.read_text(encoding="utf-8", errors="replace")
    for line in relevant_lines(text):
        say(f"  {line}")
    return SetupError(f"{step} {PACKAGE} failed; the log is {log}", build_hint(text, accelerators))


def pip(*arguments: str) -> list[str]:
    """The command line of this environment's pip."""
    return [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]


def build_wheel(version: str, accelerators: Sequence[str], arguments: Sequence[str], target: Path) -> Path:
    """Build the wheel into the directory `target`, which appears only when the wheel is whole."""
    environment = {**os.environ, **require_tools(accelerators, os.environ)}
    environment["CMAKE_ARGS"] = " ".join(arguments)
    environment.setdefault("CMAKE_BUILD_PARALLEL_LEVEL", str(os.cpu_count() or 1))
    log = target.with_name(f"{target.name}.log")
    log.write_bytes(b"")
    say(f"building {PACKAGE} {version} ({'+'.join(accelerators) or CPU}): takes minutes, once; log: {log}")
    # Whoever holds the lock owns these: left behind by a build that was killed.
    for leftover in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    prefix = f".{target.name}."
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix, ignore_cleanup_errors=True) as scratch:
        # pip's own scratch files go here too, so that an interrupted build leaves nothing behind.
        environment.setdefault("TMPDIR", scratch)
        source, wheels = Path(scratch, "source"), Path(scratch, "wheel")
        fetch = pip("download", "--no-deps", "--progress-bar", "off", "--no-binary", PACKAGE)
        if run_logged([*fetch, "--dest", str(source), f"{PACKAGE}=={version}"], environment, log) != 0:
            raise failure("fetching", log, accelerators)
        archive = next(source.iterdir())
        # pip's cache does not know CMAKE_ARGS and would hand back a wheel of other options.
        make = pip("wheel", "--no-deps", "--no-cache-dir", "--progress-bar", "off", "--verbose")
        if run_logged([*make, "--wheel-dir", str(wheels), str(archive)], environment, log) != 0:
            raise failure("building", log, accelerators)
        require_backends(next(wheels.glob("*.whl")), accelerators)
        with contextlib.suppress(OSError):
            # Without locks another build may have been first: then its wheel is as good as ours.
            wheels.rename(target)
    wheel = cached_wheel(target)
    if wheel is None:
        raise SetupError(f"no wheel appeared in {target}", "check that the directory can be written to")
    return wheel


def require_backends(wheel: Path, accelerators: Sequence[str]) -> None:
    """Refuse a wheel that was built without a backend that was asked for."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = [Path(name).name for name in archive.namelist()]
    for name in accelerators:
        if not any(ACCELERATORS[name].library in library for library in libraries if ".h" not in library):
            raise SetupError(f"the build left {name} out", f"{name} needs {ACCELERATORS[name].needs}")


def install(wheel: Path, version: str, log: Path) -> None:
    """Put the wheel in place of whatever is installed, then add what it depends on."""
    log.write_bytes(b"")
    # A second step, because a forced reinstallation would fetch every dependency again too.
    for options in (["--no-deps", "--force-reinstall"], ["--constraint", str(CONSTRAINTS)]):
        if run_logged(pip("install", "--progress-bar", "off", *options, str(wheel)), os.environ, log) != 0:
            raise failure("installing", log, ())
    say(f"installed {PACKAGE} {version} from {wheel.parent}")


def verify(version: str, key_directory: Path) -> None:
    """Import the package in another process, which a wheel for another CPU would kill."""
    check = "import llama_cpp; print(llama_cpp.__version__); llama_cpp.llama_backend_init()"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    if done.returncode == 0 and done.stdout.strip() == version:
        return
    last = (done.stderr.strip().splitlines() or [f"ended with status {done.returncode}"])[-1]
    found = f"version {done.stdout.strip()} is there" if done.returncode == 0 else last
    raise SetupError(
        f"{PACKAGE} {version} is installed but does not work: {found}",
        f"remove {key_directory} and run make setup again",
    )


def say(text: str) -> None:
    """Print a line for people."""
    print(text, file=sys.stderr, flush=True)


def set_up(accel: str) -> None:
    """Bring this environment to the pinned version with the accelerators asked for."""
    system = platform.system()
    version = pinned_version(CONSTRAINTS)
    accelerators = parse_accelerators(accel, system)
    arguments = cmake_arguments(accelerators, system, os.environ.get("CMAKE_ARGS", ""))
    key = machine_key(version, accelerators, arguments)
    target = cache_directory(os.environ, system) / key
    if installed_key() != key:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SetupError(
                f"{target.parent} cannot be made: {error.strerror}", "set XDG_CACHE_HOME to a directory of yours"
            ) from error
        with only_one(target.with_name(f"{key}.lock")):
            wheel = cached_wheel(target) or build_wheel(version, accelerators, arguments, target)
        install(wheel, version, target.with_name(f"{key}.install.log"))
    verify(version, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    known = ", ".join(sorted([CPU, *ACCELERATORS]))
    parser.add_argument("--accel", default="", help=f"backends to build, comma-separated: {known}")
    chosen = parser.parse_args(arguments)
    # Otherwise a terminated script would leave its compilers running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        set_up(chosen.accel)
    except SetupError as error:
        say(f"error: {error.message}\n{error.hint}")
        return 1
    except KeyboardInterrupt:
        say("interrupted: the next run starts the build again")
        return 130
    except OSError as error:
        say(f"error: {error.filename or 'the system'}: {error.strerror}\ncheck the disk space and permissions")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
