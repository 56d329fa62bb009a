"""A gain for every attention head: a factor on its output, put into llama.cpp's own graph.

llama.cpp ends each attention with a product of the layer's `attn_output` weights and the heads' outputs, side by side
[heads * value length, rows] (llm_graph_context::build_attn). While contexts of a model with gains are made and
computed, `ggml_mul_mat` is replaced: where it is asked for that product, the outputs are multiplied by the gains first.
llama.cpp computes, keeps and reuses that graph like any other.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.errors import NativeError, UnsupportedModelError
from abcli.native import ggml_api as api
from abcli.native.ggml_api import TensorStruct, check_tensor_layout
from abcli.native.owner import Owner
from abcli.native.rotating.devices import Devices
from abcli.native.rotating.hook import hook_obstacle, multiplying, product_hook

# The weights themselves, and those of a LoRA adapter, which get the same outputs.
_OUTPUT_WEIGHTS = re.compile(rb"blk\.(\d+)\.attn_output\.weight(\.lora_a)?")


class HeadGains(Owner):
    """The gains of one model, on every device where its heads' outputs are; any thread may use it."""

    def __init__(self, gains: Sequence[Sequence[float]]) -> None:
        """`gains` has a factor for each head of each layer.

        Raises UnsupportedModelError where functions of llama.cpp cannot be replaced.
        """
        check_tensor_layout()
        if obstacle := hook_obstacle(product_hook):
            raise UnsupportedModelError(f"gains of heads need a hook in llama.cpp: {obstacle}", "use `profile=none`")
        self._gains = [np.array(layer, np.float32) for layer in gains]
        self._tensors: dict[tuple[int, int], int] = {}
        self._met: set[int] = set()
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        with ExitStack() as stack:
            self._devices = stack.enter_context(Devices())
            stack.enter_context(product_hook().held())
            self._stack = stack.pop_all()

    @contextmanager
    def acting(self) -> Iterator[None]:
        """Let what this thread computes in the block be computed with the gains. Raises NativeError."""
        with multiplying(self):
            yield
        error, self._error = self._error, None
        if error is not None:
            raise NativeError(f"the gains of heads cannot be used: {error}", "use `profile=none`") from error

    @contextmanager
    def making(self) -> Iterator[None]:
        """The same for a context that is made, whose graphs must have the output of every layer.

        Raises UnsupportedModelError too.
        """
        with self.acting():
            yield
        missing = sorted(set(range(len(self._gains))) - self._met)
        if missing:
            raise UnsupportedModelError(
                f"llama.cpp computes no attention output that gains could change in layer {missing[0]}",
                "use `profile=none`",
            )

    def product(self, original: Callable[..., int], context: int, weights: int, numbers: int) -> int:
        """In place of `ggml_mul_mat`: with the gains, if it is that of heads' outputs."""
        name = _OUTPUT_WEIGHTS.fullmatch(TensorStruct.from_address(weights).name)
        if name is None:
            return original(context, weights, numbers)
        try:
            numbers = self._multiplied(context, int(name[1]), weights, numbers)
        except Exception as error:
            # Nothing may be raised through llama.cpp.
            self._error = error
        return original(context, weights, numbers)

    def _multiplied(self, context: int, layer: int, weights: int, numbers: int) -> int:
        width = TensorStruct.from_address(numbers).ne[0]
        gains = self._gains[layer]
        if width % len(gains):
            raise NativeError(f"layer {layer} has outputs of {width} numbers, which {len(gains)} heads cannot have")
        with self._lock:
            self._met.add(layer)
            device = self._devices.of(TensorStruct.from_address(weights))
            key = (layer, device.backend)
            if key not in self._tensors:
                values: NDArray[np.float32] = np.repeat(gains, width // len(gains))
                tensor = device.tensor(llama.GGML_TYPE_F32, (width,), device.memory(values.nbytes))
                api.tensor_set(tensor, values.ctypes.data, 0, values.nbytes)
                self._tensors[key] = tensor
        return int(api.multiply(context, numbers, self._tensors[key]))
