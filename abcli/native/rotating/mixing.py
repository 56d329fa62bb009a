"""Merges the buckets' distributions where llama.cpp computes their logits, so that one row comes to the host, not N.

`abcli.merge` says what is computed. Here it is a graph of ggml's own operations on the device; probabilities below the
smallest number of float32 count as none.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from math import sqrt

import llama_cpp.llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from abcli.config import MergeRule
from abcli.errors import NativeError
from abcli.native import ggml_api as api
from abcli.native.ggml_api import TensorStruct
from abcli.native.owner import Owner
from abcli.native.rotating.devices import Device, DeviceGraph, Devices

# The rules whose weights follow from each bucket's largest probability, or from nothing.
MIXING_RULES: tuple[MergeRule, ...] = ("confidence", "mean")
_TENSORS = 32


class LogitsMixer(Owner):
    """Mixes the rows of several buckets that a decode left on a device; one thread at a time."""

    mixes_on_cpu = False
    """Whether logits in host memory are merged this way too, which is slower than `abcli.merge`."""

    def __init__(self, devices: Devices, buckets: int, vocabulary: int) -> None:
        """`devices` own the memory of what comes out, and live at least as long as this."""
        self._devices = devices
        self._buckets, self._vocabulary = buckets, vocabulary
        # By where the logits lie and the rule; None where the device cannot do it.
        self._mixtures: dict[tuple[int, int, int, MergeRule], _Mixture | None] = {}

    def close(self) -> None:
        """Free the graphs; a second call does nothing."""
        while self._mixtures:
            mixture = self._mixtures.popitem()[1]
            if mixture is not None:
                mixture.close()

    def has_mixed(self, rule: MergeRule, slots: int) -> bool:
        """Whether so many slots were mixed by the rule the last time."""
        return any(mixture and key[2:] == (slots, rule) for key, mixture in self._mixtures.items())

    def mix(self, logits: int, rule: MergeRule, rows: Sequence[NDArray[np.float32]]) -> list[float] | None:
        """Write the merged logits of each slot to `rows` (float32 [vocabulary]); the slots' agreements.

        `logits` is llama.cpp's tensor f32 [vocabulary, slots * buckets], which is computed. None, with nothing of use
        in `rows`, for a rule or device that cannot do it, and for logits that are no numbers.
        """
        if rule not in MIXING_RULES or not logits:
            return None
        node = TensorStruct.from_address(logits)
        shape = (self._vocabulary, len(rows) * self._buckets, 1, 1)
        if (node.type, tuple(node.ne)) != (llama.GGML_TYPE_F32, shape) or not node.buffer:
            return None
        key = (node.buffer, node.data, len(rows), rule)
        if key not in self._mixtures:
            self._mixtures[key] = self._make(node, len(rows), rule)
        mixture = self._mixtures[key]
        return None if mixture is None else mixture.compute(rows)

    def _make(self, node: TensorStruct, slots: int, rule: MergeRule) -> _Mixture | None:
        # One at a time: each takes as much memory as the logits three times.
        self.close()
        device = self._devices.of(node)
        if device.is_cpu and not self.mixes_on_cpu:
            return None
        try:
            return _Mixture(device, node, (self._vocabulary, self._buckets, slots), rule)
        except NativeError:
            return None


class _Mixture(Owner):
    """The graph for logits that lie in one place."""

    def __init__(self, device: Device, logits: TensorStruct, shape: tuple[int, int, int], rule: MergeRule) -> None:
        """`shape` is (vocabulary, buckets, slots). Raises NativeError if the device lacks memory or an operation."""
        vocabulary, buckets, slots = self._shape = shape
        self._rule = rule
        # Merged logarithms [slots, vocabulary], then per slot and bucket the largest probability and logit, then
        # per slot the agreement.
        sizes = (slots * vocabulary, slots * buckets, slots * buckets, slots)
        self._starts = np.cumsum([0, *sizes]).tolist()
        with ExitStack() as stack:
            buffer = device.memory(4 * self._starts[-1], stack)
            self._results = device.tensor(llama.GGML_TYPE_F32, (self._starts[-1],), buffer, stack=stack)
            self._numbers = device.host_numbers(self._starts[-1], stack)

            def build(context: int) -> list[int]:
                rows = api.new_3d(context, llama.GGML_TYPE_F32, vocabulary, buckets * slots, 1)
                api.check(api.place(logits.buffer, rows, logits.data))
                results = self._nodes(context, rows)
                base = api.buffer_base(buffer)
                for result, start in zip(results, self._starts, strict=False):
                    api.check(api.place(buffer, result, base + 4 * start))
                return results

            self._graph = stack.enter_context(DeviceGraph(device.backend, _TENSORS, build))
            if not device.supports(self._graph.handle):
                raise NativeError("the device cannot merge")
            self._stack = stack.pop_all()

    def compute(self, rows: Sequence[NDArray[np.float32]]) -> list[float] | None:
        """See `LogitsMixer.mix`."""
        _, buckets, slots = self._shape
        self._graph.compute()
        api.tensor_get(self._results, self._numbers.ctypes.data, 0, self._numbers.nbytes)
        merged, *maxima, agreements = np.split(self._numbers, self._starts[1:-1])
        confidences, peaks = (part.reshape(slots, buckets).astype(np.float64) for part in maxima)
        if not (np.isfinite(peaks).all() and (confidences > 0).all() and np.isfinite(agreements).all()):
            return None
        weights = confidences if self._rule == "confidence" else np.ones_like(confidences)
        normalizers = peaks - np.log(confidences)
        # The graph has the mean over the buckets where weighed probabilities are to be added.
        offsets = (weights * normalizers).sum(axis=1) / weights.sum(axis=1)
        if self._rule == "confidence":
            offsets += np.log(buckets)
        for row, part, offset in zip(rows, merged.reshape(slots, -1), offsets, strict=True):
            np.add(part, np.float32(offset), out=row)
        return [min(float(agreement), 1.0) for agreement in agreements]

    def _nodes(self, context: int, rows: int) -> list[int]:
        """Log of the mean of the weighted probabilities, largest probabilities, largest logits, agreement."""
        vocabulary, buckets, slots = self._shape
        probabilities = api.soft_max(context, rows)
        confidences, peaks = (_row_maxima(context, numbers, vocabulary) for numbers in (probabilities, rows))
        each = api.reshape_3d(context, probabilities, vocabulary, buckets, slots)
        weighed = each
        if self._rule == "confidence":
            by_slot = api.reshape_3d(context, confidences, buckets, slots, 1)
            weights = api.divide(context, by_slot, api.sum_rows(context, by_slot))
            weighed = api.multiply(context, each, api.reshape_3d(context, weights, 1, buckets, slots))
        mean = _over_buckets(context, weighed, api.POOL_AVERAGE, buckets)
        lowest = _over_buckets(context, api.negate(context, each), api.POOL_MAX, buckets)
        agreement = api.sum_rows(context, api.negate(context, lowest))
        return [api.logarithm(context, mean), confidences, peaks, agreement]


def _over_buckets(context: int, numbers: int, operation: int, buckets: int) -> int:
    """[vocabulary, buckets, slots] to [vocabulary, 1, slots]."""
    return int(api.pool_2d(context, numbers, operation, 1, buckets, 1, 1, 0.0, 0.0))


def _row_maxima(context: int, numbers: int, width: int) -> int:
    """The largest number of each row of [width, rows]: of pieces first, so that many threads have work."""
    size = max(1, round(sqrt(width)))
    # So much padding that the pieces cover the row: they begin before it, and must not end within it.
    padding = next(padding for padding in range(size) if (width + 2 * padding) % size <= padding)
    pieces = (width + 2 * padding) // size
    parts = api.pool_2d(context, numbers, api.POOL_MAX, size, 1, size, 1, float(padding), 0.0)
    return int(api.pool_2d(context, parts, api.POOL_MAX, pieces, 1, pieces, 1, 0.0, 0.0))
