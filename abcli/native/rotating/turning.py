"""How the rows of one batch come to have several RoPE bases: inside llama.cpp's own graph.

While llama.cpp builds a graph for a batch with rows of other bases, `ggml_rope_ext` is replaced: to the rotation by the
context's base come a few operations that turn each row on (`abcli.native.rotating.tables`). llama.cpp computes, keeps
and reuses that graph like any other. `abcli.native.rotating.callback` is the way where the function cannot be replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, Protocol

import llama_cpp.llama_cpp as llama
import numpy as np

from abcli.errors import AbcliError, NativeError, UnsupportedModelError
from abcli.native import ggml_api as api
from abcli.native.ggml_api import TensorStruct
from abcli.native.owner import Owner
from abcli.native.rotating.devices import nodes_of
from abcli.native.rotating.graph import asked_parameters
from abcli.native.rotating.hook import acting, compute_hook, copy_hook, get_hook, hook_obstacle, rope_hook
from abcli.native.rotating.tables import Rotation, Tables, weights_of

# llama.cpp's name for its logits.
_LOGITS = b"result_output"
# GGML_STATUS_FAILED
_STATUS_FAILED = -1

# Gets nodes in the order of computation: all of a graph that is not computed yet and has not got its inputs, and that
# graph, or (0) one that is next.
Visit = Callable[[Sequence[int], int], None]


class Turning(Protocol):
    """A way to turn rows. One context, one thread at a time."""

    copies: bool | None
    """Whether llama.cpp copies streams where it wants to; None where it cannot be kept from it."""

    def make(self, parameters: Any, make: Callable[[], None]) -> None:
        """Set what the context needs in `parameters` (`llama_context_params`), and call `make`, which makes it.

        llama.cpp reserves memory for the graphs of turning rows then. Raises what `make` raises, and NativeError.
        """

    def run(
        self,
        decode: Callable[[], None],
        rows: int = 0,
        visit: Visit | None = None,
        *,
        compute: bool = True,
        stay: bool = False,
    ) -> None:
        """Call `decode`, which computes one batch of `rows` rows that are to be turned, or of rows that are not (0).

        `visit` gets every node of the graph before it is computed (see `input_of`); without `compute`, llama.cpp gives
        the tokens their cells and computes nothing. With `stay`, the logits may stay where they were computed, until
        `fetch`. Raises what `decode` and `visit` raise, and NativeError if turning fails.
        """

    def fetch(self) -> None:
        """Let llama.cpp have the logits of the last batch, if they stayed."""

    def close(self) -> None:
        """Free what it holds; a second call does nothing."""

    @property
    def logits(self) -> int:
        """llama.cpp's tensor of the logits of the last batch, while they lie where they were computed; else 0."""


def marked_base(base: float) -> float:
    """The base to make a context with, so that its rotations are told from those of layers with a base of their own.

    It is the float32 next to `base`, which takes its place before anything is computed.
    """
    return float(np.nextafter(np.float32(base), np.float32(np.inf)))


class Failure:
    """Keeps what is raised where llama.cpp is the caller, for the caller of llama.cpp."""

    def __init__(self) -> None:
        self._error: BaseException | None = None

    def keep(self, error: BaseException) -> None:
        """The first one counts."""
        self._error = self._error or error

    def raise_kept(self) -> None:
        """Raise what was kept, an Exception that is no error of ours as NativeError."""
        error, self._error = self._error, None
        if error is None:
            return
        if isinstance(error, AbcliError) or not isinstance(error, Exception):
            raise error
        raise NativeError(f"abcli's callback failed: {type(error).__name__}: {error}", "report it") from error


class InGraph(Owner):
    """Turns rows by operations of the graph itself."""

    def __init__(self, base: float, tables: Tables | None) -> None:
        """`base` is the context's; without `tables` no row ever turns. Raises PointerError (`hook_obstacle`)."""
        self._base = base
        self._marked = marked_base(base)
        self._tables = tables
        self._failure = Failure()
        self._visit: Visit | None = None
        self._compute = True
        self._turns = self._stay = False
        # llama.cpp's own copying of the logits, if it was left out.
        self._left: Callable[[], None] | None = None
        self.copies: bool | None = True
        # How many rows the graph that llama.cpp holds turns; 0 for one that turns none.
        self._rows = 0
        self._context = 0
        self._graph = 0
        # How many more nodes the last graph that was shown has room for.
        self.free_nodes = 0
        self._stack = ExitStack()
        if tables is not None:
            # Without the last one all logits come to the host.
            last = () if hook_obstacle(get_hook) else (get_hook(),)
            for hook in (rope_hook(), compute_hook(), copy_hook(), *last):
                hook.acquire()
                self._stack.callback(hook.release)

    def make(self, parameters: Any, make: Callable[[], None]) -> None:
        """See `Turning.make`."""
        if self._tables is not None:
            parameters.rope_freq_base = self._marked
        self._visit, self._compute, self._turns = None, True, True
        self._call(make)

    def run(
        self,
        decode: Callable[[], None],
        rows: int = 0,
        visit: Visit | None = None,
        *,
        compute: bool = True,
        stay: bool = False,
    ) -> None:
        """See `Turning.run`."""
        self._visit, self._compute, self._turns, self._stay, self._left = visit, compute, rows > 0, stay, None
        if visit is not None or not compute:
            with compute_hook().held():
                self._call(decode)
        else:
            self._call(decode)
        if rows and self._rows != rows:
            raise NativeError(
                f"llama.cpp's graph turns {self._rows} rows where {rows} were to be turned", "use `engine=contexts`"
            )

    def _call(self, function: Callable[[], None]) -> None:
        with acting(self):
            try:
                function()
            finally:
                self._failure.raise_kept()

    def rope(self, original: Callable[..., int], arguments: tuple[Any, ...]) -> int:
        """Rotate by the context's base in place of the marked one, and turn the rows."""
        base, self._context = arguments[7], arguments[0]
        if self._tables is None or base != self._marked:
            return original(*arguments)
        rotated = original(*arguments[:7], self._base, *arguments[8:])
        self._rows = 0
        if not self._turns:
            return rotated
        try:
            return self._turned(arguments, rotated, self._tables)
        except BaseException as error:
            # Nothing may be raised through llama.cpp; the graph is as good as any that is dropped.
            self._failure.keep(error)
            return rotated

    def compute(self, original: Callable[..., int], scheduler: int, graph: int) -> int:
        """Show the graph, and compute it unless it is left out."""
        self._graph = graph
        if self._visit is not None:
            try:
                self._visit(nodes_of(graph), graph)
                if self._context:
                    free = api.memory_size(self._context) - api.used_memory(self._context)
                    self.free_nodes = free // api.tensor_overhead()
            except BaseException as error:
                self._failure.keep(error)
                return int(_STATUS_FAILED)
        return original(scheduler, graph) if self._compute else 0

    def copy(self, original: Callable[..., None], source: int, target: int) -> None:
        """Copy a stream of the cache, unless it is done otherwise."""
        if self.copies:
            original(source, target)

    def get(self, original: Callable[..., None], backend: int, tensor: int, *where: int) -> None:
        """Copy a tensor to the host, unless it is the logits and they stay."""
        if self._stay and TensorStruct.from_address(tensor).name == _LOGITS:
            self._left = partial(original, backend, tensor, *where)
        else:
            original(backend, tensor, *where)

    def fetch(self) -> None:
        """See `Turning.fetch`."""
        if self._left is not None:
            self._left()
            self._left = None

    @property
    def logits(self) -> int:
        """llama.cpp's tensor of the logits that the last graph computed; 0 if there is none to be found."""
        return int((self._graph and api.graph_tensor(self._graph, _LOGITS)) or 0)

    def _turned(self, arguments: tuple[Any, ...], rotated: int, tables: Tables) -> int:
        node = TensorStruct.from_address(rotated)
        if (node.type, node.ne[3]) != (llama.GGML_TYPE_F32, 1):
            raise UnsupportedModelError("the model rotates numbers in a form that one batch cannot vary", "")
        self._rows = node.ne[2]
        rotation = Rotation(asked_parameters(arguments), node.ne[0])
        return tables.turn(arguments[0], rotated, rotation, weights_of(arguments[1]))


def input_of(source: int, graph: int) -> int:
    """Where the numbers lie that a node's `source` gets; `graph` as `Visit` has it.

    llama.cpp fills its inputs in host memory; the scheduler copies them to a device when it computes, to tensors with
    names of the form "device#input#number" (ggml_backend_sched_split_graph).
    """
    parts = bytes(TensorStruct.from_address(source).name).split(b"#")
    return int((graph and len(parts) == 3 and api.graph_tensor(graph, parts[1])) or source)
