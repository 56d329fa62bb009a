"""llama.cpp itself: the one import of its bindings, its log, its version and its devices."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections import deque
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as llama
from llama_cpp import __version__ as BINDINGS_VERSION  # noqa: N812

_LOG_LEVEL_WARNING = 3
_LOG_LEVEL_ERROR = 4
_LOG_LEVEL_CONTINUED = 5
_LOG_LINES = 200


class _Log:
    """Keeps the last lines llama.cpp logged; `echo` also prints them (for --verbose)."""

    def __init__(self) -> None:
        self.lines: deque[tuple[int, str]] = deque(maxlen=_LOG_LINES)
        self.echo: Any = None
        self.interrupted = False
        self._level = 0
        self._partial = ""
        self._lock = threading.Lock()

    def write(self, level: int, text: bytes, _user_data: object) -> None:
        try:
            self._write(level, text)
        except KeyboardInterrupt:
            # ctypes would drop it: a callback has nobody to raise to.
            self.interrupted = True

    def _write(self, level: int, text: bytes) -> None:
        with self._lock, contextlib.suppress(Exception):
            if level != _LOG_LEVEL_CONTINUED:
                self._level = level
            decoded = text.decode("utf-8", "replace")
            if self.echo is not None:
                self.echo(decoded)
            *whole, self._partial = (self._partial + decoded).split("\n")
            self.lines.extend((self._level, line) for line in whole if line.strip())


_log = _Log()
# llama.cpp keeps this pointer for the life of the process: it must never be collected.
_log_callback = llama.llama_log_callback(_log.write)
_initialise_lock = threading.Lock()
_initialised = False


def initialise() -> None:
    """Start llama.cpp once per process and take over its log; further calls do nothing."""
    global _initialised
    with _initialise_lock:
        if not _initialised:
            llama.llama_log_set(_log_callback, ctypes.c_void_p(0))
            llama.llama_backend_init()
            _initialised = True


def echo_log(write: Any) -> None:
    """Pass every piece of llama.cpp's log to `write(text)` from now on; None stops it."""
    _log.echo = write


def clear_log() -> None:
    """Forget what llama.cpp has logged so far."""
    _log.lines.clear()


def raise_interrupt() -> None:
    """Raise the KeyboardInterrupt that came while llama.cpp was logging, if one did."""
    if _log.interrupted:
        _log.interrupted = False
        raise KeyboardInterrupt


def log_tail() -> str:
    """The newest error llama.cpp logged (else its newest warning), as one line; empty if none."""
    for level in (_LOG_LEVEL_ERROR, _LOG_LEVEL_WARNING):
        for line_level, line in reversed(_log.lines):
            if line_level == level:
                return line.strip()
    return ""


class CancelFlag:
    """A flag that llama.cpp polls between graph nodes without entering Python.

    The abort callback is `bool (*)(void * data)`. C's `strlen` has that shape: it is 0 for an empty string
    and 1 for a string of one character, so setting one byte of `data` aborts the computation.
    """

    def __init__(self) -> None:
        self._data = ctypes.create_string_buffer(2)
        self.callback = ctypes.cast(ctypes.pythonapi.strlen, llama.ggml_abort_callback)

    @property
    def data(self) -> int:
        """The address to pass as the callback's user data."""
        return ctypes.addressof(self._data)

    def set(self) -> None:
        """Ask every computation that polls this flag to stop; safe from any thread or signal handler."""
        self._data[0] = b"\x01"

    def clear(self) -> None:
        """Allow computations again."""
        self._data[0] = b"\x00"

    def is_set(self) -> bool:
        """Whether a stop was asked for."""
        return self._data[0] != b"\x00"


@dataclass(frozen=True)
class Device:
    """A device llama.cpp can compute on; memory in bytes, 0 where the backend does not tell."""

    name: str
    description: str
    free_memory: int
    total_memory: int


def _ggml(name: str, restype: Any, *argtypes: Any) -> Any:
    """A ggml function from the library that libllama itself loaded (other copies have other globals)."""
    function = getattr(llama._lib, name)
    function.restype = restype
    function.argtypes = list(argtypes)
    return function


def devices() -> list[Device]:
    """The devices of this build (`ggml_backend_dev_*`), the CPU included."""
    initialise()
    count = _ggml("ggml_backend_dev_count", ctypes.c_size_t)()
    get = _ggml("ggml_backend_dev_get", ctypes.c_void_p, ctypes.c_size_t)
    name = _ggml("ggml_backend_dev_name", ctypes.c_char_p, ctypes.c_void_p)
    describe = _ggml("ggml_backend_dev_description", ctypes.c_char_p, ctypes.c_void_p)
    size_pointer = ctypes.POINTER(ctypes.c_size_t)
    memory = _ggml("ggml_backend_dev_memory", None, ctypes.c_void_p, size_pointer, size_pointer)
    found = []
    for index in range(count):
        handle = get(index)
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        memory(handle, ctypes.byref(free), ctypes.byref(total))
        found.append(
            Device(
                name=(name(handle) or b"").decode("utf-8", "replace"),
                description=(describe(handle) or b"").decode("utf-8", "replace").strip(),
                free_memory=free.value,
                total_memory=total.value,
            )
        )
    return found


def supports_offload() -> bool:
    """Whether this build can put layers on a GPU (`llama_supports_gpu_offload`)."""
    initialise()
    return bool(llama.llama_supports_gpu_offload())


def version() -> str:
    """The llama.cpp build and its Python bindings, e.g. "llama.cpp 0.5.0-dev (llama-cpp-python 0.3.36)"."""
    return f"llama.cpp {llama.llama_version().decode('utf-8', 'replace')} (llama-cpp-python {BINDINGS_VERSION})"
