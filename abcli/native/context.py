"""One llama.cpp context: a KV cache of several sequences under one RoPE base."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.config import ContextConfig
from abcli.errors import CancelledError, NativeError
from abcli.native.llama import CancelFlag, clear_log, log_tail, raise_interrupt
from abcli.native.model import Model
from abcli.native.owner import Owner

# ggml.h; the bindings do not name it.
_GGML_TYPE_BF16 = 30
CACHE_TYPE_IDS = {
    "f32": llama.GGML_TYPE_F32,
    "f16": llama.GGML_TYPE_F16,
    "bf16": _GGML_TYPE_BF16,
    "q8_0": llama.GGML_TYPE_Q8_0,
    "q5_1": llama.GGML_TYPE_Q5_1,
    "q5_0": llama.GGML_TYPE_Q5_0,
    "q4_1": llama.GGML_TYPE_Q4_1,
    "q4_0": llama.GGML_TYPE_Q4_0,
}
FLASH_ATTENTION_IDS = {
    "auto": llama.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
_DECODE_NO_ROOM = 1
_DECODE_ABORTED = 2


@dataclass(frozen=True)
class BatchPart:
    """Tokens that continue one sequence at `position`; the logits after the last `output` of them are asked for."""

    sequence: int
    position: int
    tokens: Sequence[int]
    output: int


class _Batch:
    """The arrays behind a `llama_batch` of up to `capacity` tokens, reused by every decode."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._tokens: NDArray[np.int32] = np.zeros(capacity, np.int32)
        self._positions: NDArray[np.int32] = np.zeros(capacity, np.int32)
        self._counts: NDArray[np.int32] = np.ones(capacity, np.int32)
        self._sequences: NDArray[np.int32] = np.zeros(capacity, np.int32)
        self._outputs: NDArray[np.int8] = np.zeros(capacity, np.int8)
        first, size = self._sequences.ctypes.data, self._sequences.itemsize
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._sequence_pointers = (pointer * capacity)(
            *(ctypes.cast(first + index * size, pointer) for index in range(capacity))
        )
        self.native = llama.llama_batch(
            0,
            self._tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            None,
            self._positions.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            self._counts.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)),
            ctypes.cast(self._sequence_pointers, ctypes.POINTER(pointer)),
            self._outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )

    def fill(self, parts: Sequence[BatchPart]) -> list[int]:
        """Write `parts` one after another; the batch index of each part's last token comes back."""
        end = 0
        last = []
        for part in parts:
            start, end = end, end + len(part.tokens)
            self._tokens[start:end] = part.tokens
            self._positions[start:end] = np.arange(part.position, part.position + end - start)
            self._sequences[start:end] = part.sequence
            self._outputs[start:end] = 0
            self._outputs[end - part.output : end] = 1
            last.append(end - 1)
        self.native.n_tokens = end
        return last


def context_parameters(model: Model, base: float, config: ContextConfig, threads: int, cancel: CancelFlag) -> Any:
    """`llama_context_params` with all that does not depend on the number of sequences."""
    parameters = llama.llama_context_default_params()
    parameters.n_batch = config.batch_size
    parameters.n_ubatch = config.ubatch_size
    parameters.n_threads = parameters.n_threads_batch = threads
    parameters.flash_attn_type = FLASH_ATTENTION_IDS[config.flash_attention]
    if model.has_rope:
        parameters.rope_freq_base = base
    parameters.type_k = CACHE_TYPE_IDS[config.cache_type_k]
    parameters.type_v = CACHE_TYPE_IDS[config.cache_type_v]
    parameters.abort_callback = cancel.callback
    parameters.abort_callback_data = cancel.data
    return parameters


class Sequences(Owner):
    """Owns one `llama_context`, whatever its sequences are used for. One thread at a time may call it."""

    def __init__(self, model: Model, parameters: Any, cancel: CancelFlag, *, tuned: bool = True) -> None:
        """A context made with `parameters` (`llama_context_params`); unless `tuned`, as if the model were not.

        Raises NativeError if llama.cpp cannot make it (too little memory, an impossible combination).
        """
        clear_log()
        with ExitStack() as stack:
            with model.making() if tuned else nullcontext():
                handle = llama.llama_init_from_model(model.handle, parameters)
            if not handle:
                raise NativeError(
                    f"llama.cpp cannot make a context of {parameters.n_ctx} tokens: {log_tail() or 'no reason given'}",
                    "ask for a shorter context (`ctx_size`), fewer buckets or other cache types",
                )
            stack.callback(llama.llama_free, handle)
            raise_interrupt()
            model.apply_adapters(handle)
            self._batch = _Batch(llama.llama_n_batch(handle))
            self._stack = stack.pop_all()
        self._handle = handle
        self._last: list[int] = []
        self._memory = llama.llama_get_memory(handle)
        self._cancel = cancel
        self._computing = model.computing if tuned else nullcontext
        self._row_bytes = model.vocabulary_size * 4
        self.base = float(parameters.rope_freq_base)
        self.batch_size: int = llama.llama_n_batch(handle)
        self.ubatch_size: int = llama.llama_n_ubatch(handle)

    def decode(self, parts: Sequence[BatchPart], logits: Sequence[NDArray[np.float32] | None] = ()) -> None:
        """Compute `parts` in one `llama_decode`; the logits of part i go to `logits[i]`, if given, by `fetch`.

        At most `batch_size` tokens in all. Raises CancelledError if the cancel flag stopped it and
        NativeError if llama.cpp failed; the caller then restores the sequences to their former lengths.
        """
        self._last = self._batch.fill(parts)
        with self._computing():
            status = llama.llama_decode(self._handle, self._batch.native)
        if status == _DECODE_ABORTED or (status != 0 and self._cancel.is_set()):
            raise CancelledError
        if status == _DECODE_NO_ROOM:
            raise NativeError("the context has no room for the next token", "ask for a larger `ctx_size`")
        if status != 0:
            raise NativeError(
                f"llama.cpp failed to decode (status {status}): {log_tail() or 'no reason given'}",
                "check the memory that is free, or try fewer buckets",
            )
        if logits:
            self.fetch(logits)

    def fetch(self, logits: Sequence[NDArray[np.float32] | None]) -> None:
        """Copy the logits of part i of the last `decode` into `logits[i]`, if given: [vocab], or [output, vocab]."""
        for last, target in zip(self._last, logits, strict=True):
            rows = () if target is None else np.atleast_2d(target)
            for index, row in enumerate(rows, last + 1 - len(rows)):
                source = llama.llama_get_logits_ith(self._handle, index)
                if not source:
                    raise NativeError(f"llama.cpp has no logits for token {index} of the batch")
                ctypes.memmove(row.ctypes.data, source, self._row_bytes)

    def truncate(self, sequence: int, length: int) -> bool:
        """Forget what follows the first `length` tokens; False if the memory cannot drop a part."""
        return bool(llama.llama_memory_seq_rm(self._memory, sequence, length, -1))

    def set_threads(self, threads: int) -> None:
        """Use `threads` threads from the next decode on."""
        llama.llama_set_n_threads(self._handle, threads, threads)

    def length(self, sequence: int) -> int:
        """The number of tokens of `sequence` in the cache."""
        return int(llama.llama_memory_seq_pos_max(self._memory, sequence)) + 1


class Context(Sequences):
    """A `llama_context` with one RoPE base, a sequence for each slot and a spare one in one pool of cells."""

    def __init__(
        self,
        model: Model,
        base: float,
        config: ContextConfig,
        cells: int,
        threads: int,
        cancel: CancelFlag,
        watch: Any = None,
    ) -> None:
        """A context under RoPE base `base` whose cache holds `cells` tokens over `config.slots` sequences.

        llama.cpp calls `watch` (`ggml_backend_sched_eval_callback`), which must outlive the context, at every node.
        Raises NativeError if llama.cpp cannot make it (too little memory, an impossible combination).
        """
        parameters = context_parameters(model, base, config, threads, cancel)
        if watch is not None:
            parameters.cb_eval = watch
        parameters.n_ctx = cells
        # One spare sequence beyond the slots carries pieces of a cache from context to context.
        parameters.n_seq_max = config.slots + 1
        # The default would reserve room for the logits of a whole batch.
        parameters.n_outputs_max = max(config.outputs, config.slots + 1)
        parameters.kv_unified = True
        super().__init__(model, parameters, cancel)
        self.base = base
        self.spare: int = config.slots

    def copy(self, source: int, target: int) -> None:
        """Make sequence `target` equal to `source`; in a unified cache both then share the cells."""
        llama.llama_memory_seq_rm(self._memory, target, -1, -1)
        llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def take_range(self, sequence: int, start: int, end: int) -> None:
        """Let the spare sequence hold the tokens start to end of `sequence`, sharing their cells."""
        self.drop_spare()
        llama.llama_memory_seq_cp(self._memory, sequence, self.spare, start, end)

    def append_spare(self, sequence: int) -> None:
        """Move what the spare sequence holds to `sequence`, which must not hold these positions yet."""
        llama.llama_memory_seq_cp(self._memory, self.spare, sequence, -1, -1)
        self.drop_spare()

    def drop_spare(self) -> None:
        """Empty the spare sequence."""
        llama.llama_memory_seq_rm(self._memory, self.spare, -1, -1)

    def spare_state_size(self) -> int:
        """The size in bytes of the state of the spare sequence (`llama_state_seq_get_size`)."""
        return int(llama.llama_state_seq_get_size(self._handle, self.spare))

    def read_spare(self, out: NDArray[np.uint8]) -> None:
        """Write the state of the spare sequence into `out`, which has its size. Raises NativeError."""
        pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        written = llama.llama_state_seq_get_data(self._handle, pointer, len(out), self.spare)
        if written != len(out):
            raise NativeError(f"llama.cpp gave {written} of {len(out)} bytes of state: {log_tail()}")

    def write_spare(self, data: NDArray[np.uint8]) -> None:
        """Fill the spare sequence from state bytes of a context of the same shape. Raises NativeError."""
        pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if llama.llama_state_seq_set_data(self._handle, pointer, len(data), self.spare) != len(data):
            raise NativeError(f"llama.cpp refused {len(data)} bytes of state: {log_tail() or 'no reason given'}")
