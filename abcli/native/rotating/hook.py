"""Functions of ggml that libllama calls, replaced by ours while somebody here needs that.

libllama calls functions of other libraries through pointers in its own data. Such a pointer is replaced when the first
user comes and put back when the last one goes. In between the replacement acts for the thread that asked for it only
(`acting`); every other user of llama.cpp in the process gets the original function.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from typing import Any, Protocol

import llama_cpp.llama_cpp as llama

from abcli.native import ggml_api as api
from abcli.native.rotating.image import Pointer, PointerError, address_of

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int, ctypes.c_float
# struct ggml_tensor * ggml_rope_ext(ctx, a, b, c, n_dims, mode, n_ctx_orig, freq_base, freq_scale, ext_factor,
#     attn_factor, beta_fast, beta_slow);
_ROPE = ctypes.CFUNCTYPE(_pointer, *[_pointer] * 4, *[_int] * 3, *[_float] * 6)
# enum ggml_status ggml_backend_sched_graph_compute_async(ggml_backend_sched_t sched, struct ggml_cgraph * graph);
_COMPUTE = ctypes.CFUNCTYPE(_int, _pointer, _pointer)
# struct ggml_tensor * ggml_mul_mat(struct ggml_context * ctx, struct ggml_tensor * a, struct ggml_tensor * b);
_PRODUCT = ctypes.CFUNCTYPE(_pointer, *[_pointer] * 3)
# void ggml_backend_tensor_copy(const struct ggml_tensor * src, struct ggml_tensor * dst);
_COPY = ctypes.CFUNCTYPE(None, _pointer, _pointer)
# void ggml_backend_tensor_get_async(backend, const struct ggml_tensor * tensor, void * data, offset, size);
_GET = ctypes.CFUNCTYPE(None, *[_pointer] * 3, *[ctypes.c_size_t] * 2)


class Actor(Protocol):
    """Whoever acts in place of ggml's functions on its thread. What it raises must not leave the methods."""

    def rope(self, original: Callable[..., int], arguments: tuple[Any, ...]) -> int:
        """In place of `ggml_rope_ext`."""

    def compute(self, original: Callable[..., int], scheduler: int, graph: int) -> int:
        """In place of `ggml_backend_sched_graph_compute_async`."""

    def copy(self, original: Callable[..., None], source: int, target: int) -> None:
        """In place of `ggml_backend_tensor_copy`."""

    def get(self, original: Callable[..., None], backend: int, tensor: int, *where: int) -> None:
        """In place of `ggml_backend_tensor_get_async`; `where` is an address, an offset and a size."""


class Rotator(Protocol):
    """Whoever rotates numbers in its own way on its thread. What it raises must not leave the method."""

    def rotate(self, original: Callable[..., int], *arguments: Any) -> int:
        """In place of `ggml_rope_ext`, also where an actor calls what it takes for the original."""


class Multiplier(Protocol):
    """Whoever acts in place of ggml's product of matrices on its thread. What it raises must not leave the method."""

    def product(self, original: Callable[..., int], context: int, weights: int, numbers: int) -> int:
        """In place of `ggml_mul_mat`."""


_threads = threading.local()


def acting(actor: Actor) -> AbstractContextManager[None]:
    """Let `actor` act in place of the functions, where they are replaced, for what this thread calls in the block."""
    return _set("actor", actor)


def multiplying(multiplier: Multiplier) -> AbstractContextManager[None]:
    """The same for `ggml_mul_mat` alone, whoever acts besides."""
    return _set("multiplier", multiplier)


def rotating(rotator: Rotator) -> AbstractContextManager[None]:
    """The same for the rotation itself, below the actor."""
    return _set("rotator", rotator)


@contextmanager
def _set(name: str, value: object) -> Iterator[None]:
    previous = getattr(_threads, name, None)
    setattr(_threads, name, value)
    try:
        yield
    finally:
        setattr(_threads, name, previous)


class Hook:
    """One function of ggml and the pointer through which libllama calls it."""

    def __init__(self, function: Any, prototype: Any, replacement: Callable[..., int | None]) -> None:
        """`replacement` gets the original function and its arguments. Raises PointerError."""
        self._pointer = Pointer(llama._lib.llama_decode, function)
        original = prototype(self._pointer.function)
        # Never freed: a thread may be on its way into it when the pointer is put back.
        self._callback = prototype(lambda *arguments: replacement(original, *arguments))
        self._address = address_of(self._callback)
        self._users = 0
        self._lock = threading.Lock()
        atexit.register(self._restore)
        if hasattr(os, "register_at_fork"):
            # A thread that held it is not there in the child.
            os.register_at_fork(after_in_child=self._renew_lock)

    @property
    def installed(self) -> bool:
        """Whether libllama calls the replacement."""
        return self._pointer.read() == self._address

    def acquire(self) -> None:
        """Replace the function, unless that is done. Raises PointerError if the system forbids it."""
        with self._lock:
            if self._users == 0:
                self._pointer.write(self._address)
            self._users += 1

    def release(self) -> None:
        """The caller of `acquire` needs it no more."""
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._restore()

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have the function replaced for the block."""
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def _restore(self) -> None:
        if self.installed:
            self._pointer.write(self._pointer.function)

    def _renew_lock(self) -> None:
        self._lock = threading.Lock()


@cache
def rope_hook() -> Hook:
    """The hook of `ggml_rope_ext`. Raises PointerError where it cannot be had."""

    def replacement(original: Callable[..., int], *arguments: Any) -> int:
        rotator: Rotator | None = getattr(_threads, "rotator", None)
        rotate = original if rotator is None else partial(rotator.rotate, original)
        actor: Actor | None = getattr(_threads, "actor", None)
        return rotate(*arguments) if actor is None else actor.rope(rotate, arguments)

    return Hook(api.rope, _ROPE, replacement)


def _actor_hook(function: Any, kind: Any, method: Callable[[Actor], Callable[..., Any]]) -> Hook:
    def replacement(original: Callable[..., Any], *arguments: int) -> Any:
        actor: Actor | None = getattr(_threads, "actor", None)
        return original(*arguments) if actor is None else method(actor)(original, *arguments)

    return Hook(function, kind, replacement)


@cache
def compute_hook() -> Hook:
    """The hook of `ggml_backend_sched_graph_compute_async`. Raises PointerError where it cannot be had."""
    return _actor_hook(api.scheduler_compute, _COMPUTE, lambda actor: actor.compute)


@cache
def copy_hook() -> Hook:
    """The hook of `ggml_backend_tensor_copy`. Raises PointerError where it cannot be had."""
    return _actor_hook(api.tensor_copy, _COPY, lambda actor: actor.copy)


@cache
def get_hook() -> Hook:
    """The hook of `ggml_backend_tensor_get_async`. Raises PointerError where it cannot be had."""
    return _actor_hook(api.tensor_get_async, _GET, lambda actor: actor.get)


@cache
def product_hook() -> Hook:
    """The hook of `ggml_mul_mat`. Raises PointerError where it cannot be had."""

    def replacement(original: Callable[..., int], *arguments: int) -> int:
        multiplier: Multiplier | None = getattr(_threads, "multiplier", None)
        return original(*arguments) if multiplier is None else multiplier.product(original, *arguments)

    return Hook(api.matrix_product, _PRODUCT, replacement)


@cache
def _obstacle(hooks: tuple[Callable[[], Hook], ...]) -> str:
    try:
        for hook in hooks:
            with hook().held():
                pass
    except PointerError as error:
        return str(error)
    return ""


_first_use = threading.Lock()


def hook_obstacle(*hooks: Callable[[], Hook]) -> str:
    """Why libllama's calls cannot be replaced in this process; empty if they can. To be asked before they are.

    Without `hooks` it is about those that turning rows needs.
    """
    # Two hooks of one function, made at once by two threads, would not know of each other.
    with _first_use:
        return _obstacle(hooks or (rope_hook, compute_hook, copy_hook))
