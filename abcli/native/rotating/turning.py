"""llama.cpp's eval callback, and the handler in it that turns the rows of each bucket by its own angles."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.errors import NativeError
from abcli.native import ggml_api as api
from abcli.native.ggml_api import TensorStruct
from abcli.native.rotating.devices import Device, DeviceGraph, Devices
from abcli.native.rotating.graph import Observation, RopeNode

# bool (*ggml_backend_sched_eval_callback)(struct ggml_tensor * t, bool ask, void * user_data);
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
_OPERATION_OFFSET = TensorStruct.op.offset
# Everything that two rotations of equal memory share: type, buffer, shape and strides.
_SHAPE_BYTES = TensorStruct.op.offset
_DATA_OFFSET = TensorStruct.data.offset
# A model has few distinct ones, since layers reuse memory; each length of a prompt's last piece makes new ones.
_MAX_GRAPHS = 512


class Handler(Protocol):
    """What happens at each node of a graph that llama.cpp computes."""

    def ask(self, tensor: int) -> bool:
        """Before it is computed: is `done` to be called right after it?"""

    def done(self, tensor: int) -> bool:
        """After it was computed; False leaves out the rest of the graph."""


class Idle:
    """Wants nothing: the graph is computed in one go."""

    def ask(self, _tensor: int) -> bool:
        """No."""
        return False

    def done(self, _tensor: int) -> bool:
        """Never called."""
        return True


class Skip:
    """Leaves out the graph after its first node: llama.cpp has given the tokens their cells, and no more is wanted."""

    def ask(self, _tensor: int) -> bool:
        """Yes."""
        return True

    def done(self, _tensor: int) -> bool:
        """Stop here."""
        return False


class EvalCallback:
    """The one callback of a context. An exception in it stops the graph and is kept for the caller of llama.cpp."""

    def __init__(self) -> None:
        self.handler: Handler = Idle()
        # Nodes of the graph in work that nobody wants; there are a thousand, so they are not asked about further.
        self.quiet: Set[int] = frozenset()
        self._error: BaseException | None = None
        # llama.cpp keeps the address: it must live as long as the context.
        self._function = _CALLBACK(self._call)

    def install(self, parameters: Any) -> None:
        """Set the callback in `llama_context_params`."""
        kind = dict(llama.llama_context_params._fields_)["cb_eval"]
        parameters.cb_eval = ctypes.cast(self._function, kind)

    def run(self, handler: Handler, decode: Callable[[], None]) -> None:
        """Call `decode` with `handler` in place. Raises what the handler raised, an Exception as NativeError."""
        self.handler, self.quiet, self._error = handler, frozenset(), None
        try:
            decode()
        finally:
            self.handler, self.quiet = Idle(), frozenset()
            error, self._error = self._error, None
            if error is not None and not isinstance(error, Exception):
                raise error
        if isinstance(error, NativeError):
            raise error
        if error is not None:
            raise NativeError(f"abcli's callback failed: {type(error).__name__}: {error}", "report it") from error

    def _call(self, tensor: int, ask: bool, _data: int | None) -> bool:
        if ask and tensor in self.quiet:
            return False
        try:
            return self.handler.ask(tensor) if ask else self.handler.done(tensor)
        except BaseException as error:
            # An exception must not leave a C callback.
            self._error = error
            self.handler, self.quiet = Skip(), frozenset()
            return ask


@dataclass(frozen=True)
class Layout:
    """How the rows of a batch lie: for each of `slots` slots, for each base of `bases`, `tokens` tokens.

    Either `slots` or `tokens` is 1.
    """

    bases: tuple[float, ...]
    slots: int
    tokens: int

    @property
    def rows(self) -> int:
        """The number of rows of the batch."""
        return self.slots * len(self.bases) * self.tokens


@dataclass
class _Expected:
    """What the batch in work must look like; `cells` is int64 [rows], each row's sequence, `positions` likewise."""

    layout: Layout
    sequences: NDArray[np.int64]
    positions: NDArray[np.int64]


class Turning:
    """A handler that turns queries and keys right after llama.cpp has rotated them by the context's base.

    The graph and what is to be done in it are learned once and reused as long as llama.cpp reuses the graph.
    """

    def __init__(
        self,
        context: Any,
        callback: EvalCallback,
        base: float,
        observation: Observation,
        follows: frozenset[int],
        devices: Devices,
    ) -> None:
        """`callback` is that of `context`, a `llama_context`; `follows` are the ROPE operations that use its base."""
        self._context = context
        self._callback = callback
        self._base = base
        self._ropes = observation.ropes
        self._closes = observation.closes
        self._follows = follows
        self._devices = devices
        self._cells = {keys.pointer: keys.cells for keys in observation.keys.values()}
        self._cache: dict[tuple[object, ...], DeviceGraph] = {}
        # What is known of the graph that llama.cpp holds, if anything.
        self._learned: Layout | None = None
        self._graphs: dict[int, DeviceGraph] = {}
        self._quiet: set[int] = set()
        self._reused = -1
        # The state of one decode.
        self._expected = _Expected(Layout((), 0, 0), np.zeros(0, np.int64), np.zeros(0, np.int64))
        self._begun = self._known = self._careful = self._turns = False
        self._next = self._computed = 0
        self._members: list[tuple[int, RopeNode]] = []
        self._operations: dict[int, bytes] = {}

    def forget(self) -> None:
        """llama.cpp computes another graph in between."""
        self._learned = None

    def close(self) -> None:
        """Free all graphs; a second call does nothing."""
        self.forget()
        self._graphs = {}
        for graph in self._cache.values():
            graph.close()
        self._cache = {}

    def prepare(
        self, layout: Layout, sequences: NDArray[np.int64], positions: NDArray[np.int64], *, careful: bool
    ) -> None:
        """Expect a batch of this layout; `sequences` and `positions` are those of its rows (int64 [rows]).

        `careful` looks at the whole graph, even at one that is known, and proves that each row goes to the cell of
        its position.
        """
        self._expected = _Expected(layout, sequences, positions)
        self._careful = careful
        self._turns = any(base != self._base for base in layout.bases)
        self._begun = False
        self._next = self._computed = 0
        self._members = []

    def finish(self) -> None:
        """Raise NativeError unless every rotation of the graph was met exactly once."""
        wanted = len(self._graphs) if self._known else len(self._ropes)
        met = self._computed if self._known else self._next
        if not self._begun or met != wanted or self._members:
            self.forget()
            raise NativeError(
                f"llama.cpp computed {met} rotations where {wanted} were expected",
                "use `engine=contexts` with this model",
            )
        self._learned = self._expected.layout

    def ask(self, tensor: int) -> bool:
        """Is this the last operation of a group?"""
        if not self._begun:
            self._begin()
        if self._known:
            return tensor in self._graphs
        wanted = self._learn(tensor)
        if not wanted:
            self._quiet.add(tensor)
        return wanted

    def done(self, tensor: int) -> bool:
        """Turn the rows of the group."""
        self._graphs[tensor].compute()
        self._computed += 1
        return True

    def _begin(self) -> None:
        """Find out whether llama.cpp computes the graph of the last decode again: it counts when it does."""
        self._begun = True
        reused = int(llama.llama_perf_context(self._context).n_reused)
        layout = self._expected.layout
        self._known = reused == self._reused + 1 and self._learned == layout and not self._careful
        self._reused = reused
        if self._known:
            self._callback.quiet = self._quiet
        else:
            # Only a decode that ends well has learned the whole graph.
            self._learned = None
            self._graphs = {}
            self._quiet = set()
            if len(self._cache) > _MAX_GRAPHS:
                self.close()

    def _learn(self, tensor: int) -> bool:
        operation = ctypes.c_int.from_address(tensor + _OPERATION_OFFSET).value
        name = self._operations.get(operation)
        if name is None:
            name = self._operations[operation] = api.op_description(tensor)
        if name == b"SET_ROWS" and self._careful:
            self._check_cells(TensorStruct.from_address(tensor))
        return name == b"ROPE" and self._learn_rope(tensor)

    def _learn_rope(self, tensor: int) -> bool:
        index, self._next = self._next, self._next + 1
        layout = self._expected.layout
        node = TensorStruct.from_address(tensor)
        if index >= len(self._ropes) or not _matches(node, self._ropes[index], layout):
            raise NativeError(
                f"llama.cpp's rotation {index} is not the one that was seen before",
                "use `engine=contexts` with this model",
            )
        if self._turns and index in self._follows:
            self._members.append((tensor, self._ropes[index]))
        if not self._closes[index] or not self._members:
            return False
        self._graphs[tensor] = self._graph(layout)
        self._members = []
        return True

    def _graph(self, layout: Layout) -> DeviceGraph:
        """The graph that turns the members, made if it is new."""
        key: tuple[object, ...] = (layout,)
        for tensor, rope in self._members:
            shape = ctypes.string_at(tensor, _SHAPE_BYTES)
            key += (rope, shape, ctypes.string_at(tensor + _DATA_OFFSET, ctypes.sizeof(ctypes.c_void_p)))
        if key not in self._cache:
            members = list(self._members)
            device = self._devices.of(TensorStruct.from_address(members[0][0]))
            bases = sum(base != self._base for base in layout.bases)
            self._cache[key] = DeviceGraph(
                device.backend,
                len(members) * (1 + 2 * bases) + bases + 8,
                lambda context: self._build(context, device, members, layout),
            )
        return self._cache[key]

    def _build(
        self, context: int, device: Device, members: Sequence[tuple[int, RopeNode]], layout: Layout
    ) -> list[int]:
        results = []
        for tensor, rope in members:
            node = TensorStruct.from_address(tensor)
            # A view of llama.cpp's tensor would drag its whole graph into ours: a new tensor lies in its memory.
            extent = sum((count - 1) * step for count, step in zip(node.ne, node.nb, strict=True)) // node.nb[0] + 1
            vector = api.new_1d(context, node.type, extent)
            api.check(api.place(node.buffer, vector, node.data))
            count = max(layout.tokens, layout.slots)
            row = node.nb[2]
            step = row if layout.slots == 1 else row * len(layout.bases)
            parameters = rope.parameters
            for index, base in enumerate(layout.bases):
                if base == self._base:
                    continue
                offset = index * layout.tokens * row + rope.first_dimension * node.nb[0]
                width = rope.width if rope.first_dimension == 0 else parameters.dimensions
                view = api.view_4d(context, vector, width, rope.heads, count, 1, node.nb[1], step, step * count, offset)
                api.check(api.view_init(view))
                turned = api.rope_inplace(
                    context,
                    view,
                    device.positions(count),
                    device.inverse_angles((parameters, self._base, base)),
                    parameters.dimensions,
                    api.MODE_NEOX if parameters.neox else api.MODE_NORMAL,
                    *(0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0),
                )
                api.check(api.view_init(turned))
                results.append(turned)
        return results

    def _check_cells(self, node: TensorStruct) -> None:
        """Prove that each row's key goes to the cell of its position."""
        cells = self._cells.get(node.view_src or 0)
        if cells is None:
            return
        indices = TensorStruct.from_address(node.src[1])
        found = np.empty(indices.ne[0], np.int64)
        wanted = self._expected.sequences * cells + self._expected.positions
        if indices.type == api.GGML_TYPE_I64 and len(found) == len(wanted):
            api.tensor_get(node.src[1], found.ctypes.data, 0, found.nbytes)
            if np.array_equal(found, wanted):
                return
        raise NativeError("llama.cpp keeps a token elsewhere than at its position", "use `engine=contexts`")


def _matches(node: TensorStruct, rope: RopeNode, layout: Layout) -> bool:
    dimensions, mode, _, base, scale, extrapolation, _, _, _, first = api.rope_numbers(node)
    parameters = rope.parameters
    return bool(
        (node.type, node.ne[0], node.ne[1], node.ne[2], node.ne[3])
        == (rope.type_id, rope.width, rope.heads, layout.rows, 1)
        and (dimensions, mode == api.MODE_NEOX, first) == (parameters.dimensions, parameters.neox, rope.first_dimension)
        and (base, scale, extrapolation) == (rope.base, parameters.frequency_scale, parameters.extrapolation_factor)
    )
