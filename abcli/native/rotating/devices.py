"""ggml backends beside llama.cpp's own, one per device, that compute on tensors which llama.cpp holds there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cached_property

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.errors import NativeError
from abcli.native import ggml_api as api
from abcli.native.ggml_api import TensorStruct
from abcli.native.owner import Owner
from abcli.rope.frequencies import RopeParameters, angular_frequencies

# ggml wants tensors at such addresses at most (TENSORALIGNMENT and the backends' own).
ALIGNMENT = 256

# Few rows of the widest models have fewer numbers.
_WIDEST = 1 << 20

# From one base to another, under the parameters of one kind of RoPE.
DeltaKey = tuple[RopeParameters, float, float]


class DeviceGraph(Owner):
    """A small graph on one device, kept for being computed again and again."""

    def __init__(self, backend: int, tensors: int, build: Callable[[int], Sequence[int]]) -> None:
        """`build` makes at most `tensors` tensors in the context that it is given; its results are computed."""
        size = tensors * api.tensor_overhead() + api.graph_overhead(tensors, False) + 1024
        with ExitStack() as stack:
            context = api.new_context(stack, size)
            graph = api.new_graph_custom(context, tensors, False)
            self.nodes = 0
            for result in build(context):
                api.expand(graph, result)
                self.nodes += 1
            # What lies between the tensors that have memory already and the results.
            if buffer := api.allocate(context, backend):
                stack.callback(api.buffer_free, buffer)
            elif not all(TensorStruct.from_address(node).data for node in nodes_of(graph)):
                raise NativeError("the device has no memory for a graph", "use fewer buckets or slots")
            self._stack = stack.pop_all()
        self._backend = backend
        self.handle: int = graph

    def compute(self) -> None:
        """Raises NativeError if the device fails."""
        # An empty graph aborts the RPC backend.
        if self.nodes:
            api.check(api.compute(self._backend, self.handle))


class Device(Owner):
    """A device, memory of ours there, and what turning a cache's keys there needs: a backend and angles."""

    def __init__(self, handle: int) -> None:
        """Raises NativeError if the device has no room."""
        with ExitStack() as stack:
            backend = api.device_init(handle, None)
            if not backend:
                raise NativeError("ggml cannot open a device a second time", "use `engine=contexts`")
            stack.callback(api.backend_free, backend)
            self.is_cpu: bool = api.device_type(handle) == api.BACKEND_DEVICE_TYPE_CPU
            self.backend: int = backend
            self._handle = handle
            self._tensors = stack.enter_context(ExitStack())
            # Tensors i32 [2] and [1] that hold 0 and 1, and 1.
            self.turns, self._one = (
                self.tensor(llama.GGML_TYPE_I32, (count,), self.memory(4 * count)) for count in (2, 1)
            )
            for tensor, first in ((self.turns, 0), (self._one, 1)):
                api.tensor_set(tensor, np.arange(first, 2, dtype=np.int32).ctypes.data, 0, 4 * (2 - first))
            self._deltas: dict[DeltaKey, int] = {}
            self._stack = stack.pop_all()

    def set_threads(self, threads: int) -> None:
        """How many threads compute here, if this is the CPU."""
        if self.is_cpu:
            api.set_threads(self.backend, threads)

    def inverse_angles(self, key: DeltaKey) -> int:
        """A tensor f32 [pairs] of 1 / (theta under the new base - theta under the old one), for ggml's RoPE."""
        if key not in self._deltas:
            parameters, old, new = key
            deltas = angular_frequencies(parameters, new) - angular_frequencies(parameters, old)
            with np.errstate(divide="ignore", over="ignore"):
                inverse = (1.0 / deltas).astype(np.float32)
            numbers = np.where(np.isfinite(inverse), inverse, np.float32(api.NO_ROTATION)).astype(np.float32)
            tensor = self.tensor(llama.GGML_TYPE_F32, (len(numbers),), self.memory(numbers.nbytes))
            api.tensor_set(tensor, numbers.ctypes.data, 0, numbers.nbytes)
            self._deltas[key] = tensor
        return self._deltas[key]

    @cached_property
    def prefers_few_operations(self) -> bool:
        """Whether their number counts more than what they compute; if so, the device has `divided_rotation`."""
        if self.is_cpu:
            return False
        with ExitStack() as stack:
            context = api.new_context(stack, 4 * api.tensor_overhead())
            rows, divisors = (api.new_1d(context, llama.GGML_TYPE_F32, count) for count in (_WIDEST, _WIDEST // 2))
            return bool(api.device_supports(self._handle, self.divided_rotation(context, rows, divisors)))

    def divided_rotation(self, context: int, numbers: int, divisors: int) -> int:
        """f32 [count] `numbers`, each pair of neighbours turned by 1 / its number in f32 [count / 2] `divisors`."""
        count = TensorStruct.from_address(numbers).ne[0]
        mode = api.MODE_NORMAL
        return int(api.rope(context, numbers, self._one, divisors, count, mode, 0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0))

    def supports(self, graph: int) -> bool:
        """Whether every operation of a graph can be computed here."""
        return all(api.device_supports(self._handle, node) for node in nodes_of(graph))

    def memory(self, size: int, stack: ExitStack | None = None) -> int:
        """A buffer of `size` bytes on the device, which lives as long as this, or `stack`. Raises NativeError."""
        buffer = api.buffer_alloc(api.device_buffer_type(self._handle), size + ALIGNMENT)
        if not buffer:
            raise NativeError("the device has no memory for a small table", "use fewer buckets or `engine=contexts`")
        (stack or self._tensors).callback(api.buffer_free, buffer)
        return int(buffer)

    def host_numbers(self, count: int, stack: ExitStack) -> NDArray[np.float32]:
        """Memory (float32 [count]) that the device writes to as fast as it can; it lives as long as `stack`."""
        kind = api.device_host_buffer_type(self._handle)
        buffer = api.buffer_alloc(kind, 4 * count) if kind else None
        if not buffer:
            return np.empty(count, np.float32)
        stack.callback(api.buffer_free, buffer)
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(api.buffer_base(buffer)))

    def tensor(
        self, type_id: int, shape: tuple[int, ...], buffer: int, offset: int = 0, stack: ExitStack | None = None
    ) -> int:
        """A tensor of up to three dimensions over a buffer of `memory`, from byte `offset` on."""
        context = api.new_context(stack or self._tensors, api.tensor_overhead())
        tensor = api.new_3d(context, type_id, *shape, *[1] * (3 - len(shape)))
        api.check(api.place(buffer, tensor, api.buffer_base(buffer) + offset))
        return int(tensor)


class Devices(Owner):
    """The devices that llama.cpp's tensors turn out to lie on, opened when they are first met."""

    def __init__(self) -> None:
        self._by_handle: dict[int, Device] = {}
        self._by_buffer: dict[int, Device] = {}
        self._threads = 1
        self._stack = ExitStack()

    def of(self, tensor: TensorStruct) -> Device:
        """The device whose memory holds `tensor`. Raises NativeError if that has none."""
        buffer = tensor.buffer
        if not buffer:
            raise NativeError("llama.cpp keeps numbers without memory")
        kind = api.buffer_type(buffer)
        if kind not in self._by_buffer:
            # A GPU's pinned host memory names the GPU, but the CPU computes there.
            self._by_buffer[kind] = self.cpu if api.buffer_is_host(buffer) else self._open(api.type_device(kind))
        return self._by_buffer[kind]

    @property
    def cpu(self) -> Device:
        """The device that computes in host memory."""
        return self._open(api.device_by_type(api.BACKEND_DEVICE_TYPE_CPU))

    def _open(self, handle: int | None) -> Device:
        if not handle:
            raise NativeError("llama.cpp keeps numbers in memory of an unknown device")
        if handle not in self._by_handle:
            device = self._by_handle[handle] = self._stack.enter_context(Device(handle))
            device.set_threads(self._threads)
        return self._by_handle[handle]

    @property
    def opened(self) -> list[Device]:
        """The devices met so far."""
        return list(self._by_handle.values())

    def set_threads(self, threads: int) -> None:
        """How many threads compute where the CPU does."""
        self._threads = threads
        for device in self._by_handle.values():
            device.set_threads(threads)


def nodes_of(graph: int) -> list[int]:
    """The addresses of a graph's nodes in the order of computation."""
    pointers = (ctypes.c_void_p * api.node_count(graph)).from_address(api.graph_nodes(graph))
    return [int(pointer) for pointer in pointers if pointer]
