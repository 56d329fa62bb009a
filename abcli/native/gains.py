"""A gain for every attention head: a factor on its output, put into llama.cpp's own graph.

llama.cpp ends each attention with a product of the layer's `attn_output` weights and the heads' outputs, side by side
[heads * value length, rows] (llm_graph_context::build_attn). While contexts of a model with gains are made and
computed, `ggml_mul_mat` is replaced: where it is asked for that product, the outputs are multiplied by the gains first.
llama.cpp computes, keeps and reuses that graph like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.errors import NativeError
from abcli.native import ggml_api as api
from abcli.native.ggml_api import TensorStruct
from abcli.native.layer_change import LayerChange
from abcli.native.rotating.hook import multiplying, product_hook

# The weights themselves, and those of a LoRA adapter, which get the same outputs.
_OUTPUT_WEIGHTS = re.compile(rb"blk\.(\d+)\.attn_output\.weight(\.lora_a)?")


class HeadGains(LayerChange):
    """The gains of one model, on every device where its heads' outputs are."""

    def __init__(self, gains: Sequence[Sequence[float]]) -> None:
        """`gains` has a factor for each head of each layer. Raises UnsupportedModelError as `LayerChange`."""
        place = "attention output that gains could change"
        super().__init__("gains of heads", place, range(len(gains)), product_hook)
        self._gains = [np.array(layer, np.float32) for layer in gains]

    def replacing(self) -> AbstractContextManager[None]:
        """See `LayerChange.replacing`."""
        return multiplying(self)

    def product(self, original: Callable[..., int], context: int, weights: int, numbers: int) -> int:
        """In place of `ggml_mul_mat`: with the gains, if it is that of heads' outputs."""
        name = _OUTPUT_WEIGHTS.fullmatch(TensorStruct.from_address(weights).name)
        if name is None:
            return original(context, weights, numbers)
        try:
            numbers = self._multiplied(context, int(name[1]), weights, numbers)
        except Exception as error:
            self.keep(error)
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
