"""What the heads of a model attend to: the nodes `kq_soft_max` of llama.cpp's graph, without flash attention."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.config import ContextConfig
from abcli.errors import NativeError
from abcli.gguf.architectures import window_layers
from abcli.native import ggml_api as api
from abcli.native.compute_thread import run_on_compute_thread
from abcli.native.context import BatchPart, Context
from abcli.native.ggml_api import TensorStruct, check_tensor_layout
from abcli.native.llama import CancelFlag
from abcli.native.model import Model
from abcli.native.state import StateError, without_flash_attention

# Gets a layer's number and its weights, float32 [heads, rows, positions], each row with the sum 1; valid only then.
See = Callable[[int, NDArray[np.float32]], None]

# bool (*ggml_backend_sched_eval_callback)(struct ggml_tensor * t, bool ask, void * user_data);
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p)
_NAME_OFFSET = TensorStruct.name.offset
_WEIGHTS = re.compile(rb"kq_soft_max-(\d+)$")
# Scores take heads x rows x cells numbers: at most so many rows are computed at once.
_ROWS = 128
# What a row's weights may miss of 1: its probabilities are f32, and so many as there are cells.
_TOLERANCE = 1e-2
# Types of a value cache that llama.cpp reads without flash attention.
_PLAIN = ("f32", "f16", "bf16")


def attention_config(config: ContextConfig) -> ContextConfig:
    """The settings of an `AttentionContext` beside an engine with `config`."""
    return replace(
        config,
        slots=1,
        ubatch_size=min(config.ubatch_size, _ROWS),
        flash_attention="off",
        cache_type_v=config.cache_type_v if config.cache_type_v in _PLAIN else "f16",
    )


class AttentionContext(Context):
    """A context without flash attention for one sequence, which shows what the rows of its heads attend to."""

    def __init__(
        self, model: Model, base: float, config: ContextConfig, cells: int, threads: int, cancel: CancelFlag
    ) -> None:
        """As `Context`; a quantised value cache, which needs flash attention, becomes f16."""
        check_tensor_layout()
        self._header = model.checked.header
        self._see: See | None = None
        self._error: BaseException | None = None
        self._seen = 0
        self._end = 0
        # llama.cpp keeps the address: it must live as long as the context.
        self._function = _CALLBACK(self._call)
        kind: Any = dict(llama.llama_context_params._fields_)["cb_eval"]
        watch = ctypes.cast(self._function, kind)
        super().__init__(model, base, attention_config(config), cells, threads, cancel, watch)

    def append(self, tokens: Sequence[int], see: See | None = None) -> None:
        """Append `tokens` to what the context holds; `see` gets the weights of each layer for as many rows as come at
        once, in order.

        Raises CancelledError, NativeError, and what `see` raises.
        """
        position = self.length(0)
        for start in range(0, len(tokens), self.ubatch_size):
            piece = tokens[start : start + self.ubatch_size]
            self._show(BatchPart(0, position + start, piece, output=0), see)

    def take(self, cells: Iterable[NDArray[np.uint8]], length: int) -> bool:
        """Fill this empty context with `cells`, pieces of an engine's state under this base, of `length` tokens.

        False, and empty again, if they have another form, as with a quantised value cache.
        """
        windows = window_layers(self._header) or ()
        try:
            for data in cells:
                self.write_spare(without_flash_attention(data, windows))
                self.append_spare(0)
        except (StateError, NativeError):
            self.drop_spare()
            self.truncate(0, 0)
        return self.length(0) == length

    def _show(self, part: BatchPart, see: See | None) -> None:
        self._see, self._seen, self._error = see, 0, None
        self._end = part.position + len(part.tokens)
        try:
            run_on_compute_thread(lambda: self.decode([part]), self._cancel.set)
        except Exception:
            # The graph was left because of it.
            if self._error is None:
                raise
        finally:
            self._see = None
        if self._error is not None:
            raise self._error
        if see is not None and not self._seen:
            raise NativeError("llama.cpp's graph of this model has no attention weights", "trace another model")

    def _call(self, tensor: int, ask: bool, _data: int | None) -> bool:
        if self._see is None or self._error is not None:
            # Leave out the rest of the graph after an error.
            return ask and self._error is not None
        try:
            found = _WEIGHTS.match(ctypes.string_at(tensor + _NAME_OFFSET))
            if found is None or ask:
                return found is not None
            self._see(int(found[1]), self._weights(TensorStruct.from_address(tensor), tensor))
            self._seen += 1
        except BaseException as error:
            # Nothing may be raised through llama.cpp.
            self._error = error
            return False
        return True

    def _weights(self, node: TensorStruct, tensor: int) -> NDArray[np.float32]:
        """The numbers of a node; cells beyond the last position, which are masked, left out. Raises NativeError."""
        cells, rows, heads, streams = node.ne
        if node.type != llama.GGML_TYPE_F32 or streams != 1 or cells < self._end:
            raise NativeError("llama.cpp's attention weights have an unknown form", "trace another model")
        whole = np.empty((heads, rows, cells), np.float32)
        api.tensor_get(tensor, whole.ctypes.data, 0, whole.nbytes)
        found = whole[:, :, : self._end]
        # Cell i holds position i: then no row looks at a cell beyond itself.
        ahead = np.triu(np.ones((rows, rows), bool), 1)
        if found[:, :, self._end - rows :][:, ahead].any() or whole[:, :, self._end :].any():
            raise NativeError("llama.cpp's cells are not in the order of the text", "report it with the model")
        return found
