"""The way back where libllama's calls cannot be replaced: rows are turned in llama.cpp's eval callback.

llama.cpp asks at every node of the graph (`cb_eval`). After each rotation it stops, and a small graph turns the rows
where they lie, on a backend of ours for the same device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import llama_cpp.llama_cpp as llama

from abcli.errors import UnsupportedModelError
from abcli.native import ggml_api as api
from abcli.native.ggml_api import TensorStruct
from abcli.native.owner import Owner
from abcli.native.rotating.devices import DeviceGraph, Devices
from abcli.native.rotating.graph import rope_node
from abcli.native.rotating.tables import NODES_PER_ROTATION, Rotation, Tables
from abcli.native.rotating.turning import Failure, Visit, marked_base

# bool (*ggml_backend_sched_eval_callback)(struct ggml_tensor * t, bool ask, void * user_data);
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
_OPERATION_OFFSET = TensorStruct.op.offset
# Where op_params holds the base of a rotation (ggml_rope_impl).
_BASE_OFFSET = TensorStruct.op_params.offset + 5 * 4
# ... and a number that no rotation uses any more (n_past).
_MARK_OFFSET, _MARK = TensorStruct.op_params.offset, 0x61626B74
# Layers reuse memory, so a model has few distinct ones; each length of a prompt's last piece makes new ones.
_MAX_GRAPHS = 512
_HINT = "use `engine=contexts` with this model"


class ByCallback(Owner):
    """Turns rows right after llama.cpp has rotated them. Implements `Turning`."""

    logits = 0
    copies: bool | None = None

    def __init__(self, base: float, tables: Tables | None, devices: Devices) -> None:
        """`base` is the context's; without `tables` no row ever turns."""
        self._base = base
        self._marked = marked_base(base)
        self._tables = tables
        self._devices = devices
        self._failure = Failure()
        self._visit: Visit | None = None
        self._compute = True
        self._failed = self._turns = False
        self._graphs: dict[tuple[bytes, int], DeviceGraph] = {}
        self._stack = ExitStack()
        self._stack.callback(self._forget)
        # llama.cpp keeps the address: it must live as long as the context.
        self._function = _CALLBACK(self._call)

    def make(self, parameters: Any, make: Callable[[], None]) -> None:
        """See `Turning.make`."""
        kind = dict(llama.llama_context_params._fields_)["cb_eval"]
        parameters.cb_eval = ctypes.cast(self._function, kind)
        if self._tables is not None:
            parameters.rope_freq_base = self._marked
        make()

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
        self._visit, self._compute, self._turns, self._failed = visit, compute, rows > 0, False
        try:
            decode()
        finally:
            self._failure.raise_kept()

    def fetch(self) -> None:
        """See `Turning.fetch`; they never stay."""

    def _call(self, tensor: int, ask: bool, _data: int | None) -> bool:
        if self._failed:
            # Leave out the rest of the graph.
            return ask
        try:
            return self._ask(tensor) if ask else self._done(tensor)
        except BaseException as error:
            # Nothing may be raised through llama.cpp.
            self._failure.keep(error)
            self._failed = True
            return ask

    def _ask(self, tensor: int) -> bool:
        """Is `_done` to be called right after this node was computed?"""
        if self._visit is not None:
            self._visit([tensor], 0)
        if not self._compute:
            return True
        operation = ctypes.c_int.from_address(tensor + _OPERATION_OFFSET).value
        if self._tables is None or api.operation(operation, tensor) != b"ROPE":
            return False
        # A graph that llama.cpp computes again has the true base already, and our mark.
        base = ctypes.c_float.from_address(tensor + _BASE_OFFSET)
        mark = ctypes.c_int32.from_address(tensor + _MARK_OFFSET)
        if base.value == self._marked:
            base.value, mark.value = self._base, _MARK
        return self._turns and mark.value == _MARK

    def _done(self, tensor: int) -> bool:
        """Turn the rows of a rotation; False leaves out the rest of the graph."""
        if self._compute:
            self._graph(tensor, self._tables).compute()
        return self._compute

    def _graph(self, tensor: int, tables: Tables | None) -> DeviceGraph:
        """The graph that turns the rows where they lie, made if it is new."""
        key = (ctypes.string_at(tensor, TensorStruct.flags.offset), TensorStruct.from_address(tensor).data)
        if key not in self._graphs:
            if len(self._graphs) >= _MAX_GRAPHS:
                self._forget()
            self._graphs[key] = self._make(TensorStruct.from_address(tensor), tables)
        return self._graphs[key]

    def _make(self, node: TensorStruct, tables: Tables | None) -> DeviceGraph:
        rope = rope_node(node)
        if tables is None or (node.type, node.ne[3], rope.first_dimension) != (llama.GGML_TYPE_F32, 1, 0):
            raise UnsupportedModelError("the model rotates numbers in a form that one batch cannot vary", _HINT)

        def build(context: int) -> list[int]:
            # A view of llama.cpp's tensor would drag its whole graph into ours: a new tensor lies in its memory.
            rows = api.new_3d(context, node.type, *node.ne[:3])
            api.check(api.place(node.buffer, rows, node.data))
            return [api.copy(context, tables.turn(context, rows, Rotation(rope.parameters, rope.width), node), rows)]

        return DeviceGraph(self._devices.of(node).backend, NODES_PER_ROTATION + 4, build)

    def _forget(self) -> None:
        while self._graphs:
            self._graphs.popitem()[1].close()
