"""What is changed in llama.cpp's own graphs of one model, layer by layer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

from abcli.errors import AbcliError, NativeError, UnsupportedModelError
from abcli.native.ggml_api import check_tensor_layout
from abcli.native.owner import Owner
from abcli.native.rotating.devices import Devices
from abcli.native.rotating.hook import Hook, hook_obstacle

_HINT = "use `profile=none`"


class LayerChange(Owner):
    """Acts in place of a function of ggml for what is computed in `acting`; any thread may use it."""

    def __init__(self, what: str, place: str, layers: Collection[int], hook: Callable[[], Hook]) -> None:
        """`what` is changed, in `place`, of each of `layers`, by means of `hook`.

        Raises UnsupportedModelError where functions of llama.cpp cannot be replaced.
        """
        check_tensor_layout()
        if obstacle := hook_obstacle(hook):
            raise UnsupportedModelError(f"{what} need a hook in llama.cpp: {obstacle}", _HINT)
        self._what, self._place, self._layers = what, place, layers
        # The layers whose place was met, and numbers of ours on devices, by the lock's holder only.
        self._met: set[int] = set()
        self._tensors: dict[Any, int] = {}
        self._lock = threading.Lock()
        self._error: Exception | None = None
        with ExitStack() as stack:
            self._devices = stack.enter_context(Devices())
            stack.enter_context(hook().held())
            self._stack = stack.pop_all()

    def replacing(self) -> AbstractContextManager[None]:
        """Let this act in place of the function on this thread."""
        raise NotImplementedError

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Let what this thread computes in the block be changed. Raises UnsupportedModelError and NativeError."""
        with self.replacing():
            yield
        error, self._error = self._error, None
        if isinstance(error, AbcliError):
            raise error
        if error is not None:
            raise NativeError(f"{self._what} cannot be used: {error}", _HINT) from error

    @contextmanager
    def making(self) -> Iterator[None]:
        """The same for a context that is made, whose graphs must have the place in every layer."""
        with self.acting():
            yield
        missing = sorted(set(self._layers) - self._met)
        if missing:
            raise UnsupportedModelError(f"llama.cpp computes no {self._place} in layer {missing[0]}", _HINT)

    def keep(self, error: Exception) -> None:
        """Keep what must not be raised through llama.cpp, for whoever computes."""
        self._error = error
