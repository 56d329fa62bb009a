"""Shared prefill: one context computes keys and values, the others take them with their keys turned.

Under base b a key at position p is turned by p * theta_i(b) in pair i; turning it further by
p * (theta_i(b') - theta_i(b)) gives the key under base b'. Values are not turned. What attention has mixed into keys
and values of deeper layers stays that of the computing context: the approximation of the method.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from math import log

import numpy as np
from numpy.typing import NDArray

from abcli.errors import AbcliError
from abcli.gguf.architectures import window_layers
from abcli.native.context import BatchPart, Context
from abcli.native.model import Model
from abcli.native.rotating.keys import (
    PROBE_POSITION,
    TURNABLE_TYPES,
    KeyBlock,
    KeyRotator,
    agree,
    aligned_bytes,
    as_float32,
    number_bytes,
)
from abcli.native.state import CacheState, LayerKeys, StateError, parse_state
from abcli.rope.frequencies import RopeParameters, angular_frequencies

# Runs job(0) ... job(count - 1) on the engine's workers and waits for all.
RunAll = Callable[[Callable[[int], None], int], None]


class NotShareableError(AbcliError):
    """Why this model or cache cannot be prefilled for all buckets at once."""


@dataclass(frozen=True)
class _Pair:
    """The same layer's key, as computed under two bases; `at` is its place (cache, layer)."""

    at: tuple[int, int]
    first: LayerKeys
    second: LayerKeys


class SharedPrefill:
    """Carries ranges of a slot's cache from one context to others, for one shape of context."""

    def __init__(self, parameters: RopeParameters, model: Model, run_all: RunAll) -> None:
        """`parameters` are those of the contexts of `model`."""
        header = model.checked.header
        self._parameters = parameters
        self._head_width = header.key_length
        self._multipliers = model.checked.tuning.multipliers
        self._windows = window_layers(header) or ()
        # Any token, for the probe.
        self._token = model.vocabulary_size // 2
        self._run_all = run_all
        # Layers (cache, layer) whose keys follow the base; the others keep a base of their own, or have none.
        self._turning: frozenset[tuple[int, int]] = frozenset()
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._workers = threading.local()

    def close(self) -> None:
        """Free the rotators; a second call does nothing."""
        self._stack.close()

    @property
    def turning_layers(self) -> int:
        """The number of layers whose keys follow the base."""
        return len(self._turning)

    def probe(self, contexts: Sequence[Context], context_size: int) -> None:
        """Find out which layers follow the base and prove that turning gives llama.cpp's own keys.

        One token alone in its sequence attends to nothing else, so that its keys differ between two bases by the
        rotation alone, in every layer. Raises NotShareableError with the reason if they differ otherwise.
        """
        source = contexts[0]
        target = max(contexts, key=lambda context: abs(log(context.base / source.base)))
        position = min(PROBE_POSITION, context_size - 1)
        first, second = (self._state_of_one_token(context, position) for context in (source, target))
        try:
            caches, other_caches = parse_state(first), parse_state(second)
        except StateError as error:
            raise NotShareableError(error.message) from error
        pairs = _paired(caches, other_caches)
        if any(pair.first.type_id not in TURNABLE_TYPES for pair in pairs):
            raise NotShareableError("the keys are quantised, and quantised keys cannot be turned")
        if self._multipliers and [*map(len, self._model_layers(caches))] != [len(cache.layers) for cache in caches]:
            raise NotShareableError("which of the model's layers have their bases where cannot be told")
        turned = aligned_bytes(len(first))
        turned[:] = first
        candidates = frozenset(pair.at for pair in pairs if self._has_whole_heads(pair.first))
        self._rotate(turned, caches, candidates, (source.base, target.base))
        self._turning = frozenset(
            pair.at for pair in pairs if self._follows_base(pair, first, second, turned, pair.at in candidates)
        )

    def transfer(self, source: Context, targets: Sequence[Context], slot: int, start: int, end: int) -> None:
        """Append the tokens start to end that `source` holds in `slot` to `slot` of each target.

        The targets hold exactly the tokens before `start`. Raises NativeError; the caller then truncates.
        """

        def job(index: int) -> None:
            target = targets[index]
            data = self._scratch(size)
            with self._lock:  # llama.cpp does not promise that two threads may read one context
                source.read_spare(data)
            self._rotate(data, parse_state(data), self._turning, (source.base, target.base))
            target.write_spare(data)
            target.append_spare(slot)

        source.take_range(slot, start, end)
        try:
            size = source.spare_state_size()
            self._run_all(job, len(targets))
        finally:
            for context in (source, *targets):
                context.drop_spare()

    def _deltas(self, bases: tuple[float, float], multiplier: float = 1.0) -> NDArray[np.float64]:
        """Radians per position by which each pair must turn from one base to the other."""
        ours, theirs = (angular_frequencies(self._parameters, base * multiplier) for base in bases)
        return theirs - ours

    def _model_layers(self, caches: Sequence[CacheState]) -> list[list[int]]:
        """Which of the model's layers each cache has: those with a window have a second one of their own."""
        if len(caches) == 1:
            return [list(range(len(caches[0].layers)))]
        return [
            [layer for layer, window in enumerate(self._windows) if window == (number > 0)]
            for number in range(len(caches))
        ]

    def _rotate(
        self,
        data: NDArray[np.uint8],
        caches: Sequence[CacheState],
        layers: frozenset[tuple[int, int]],
        bases: tuple[float, float],
    ) -> None:
        rotate = partial(self._rotator().rotate, data, neox=self._parameters.neox)
        model_layers = self._model_layers(caches)
        for number, cache in enumerate(caches):
            chosen = {index: keys for index, keys in enumerate(cache.layers) if (number, index) in layers}
            if not self._multipliers:
                blocks = _blocks(list(chosen.values()), len(cache.positions), self._head_width)
                rotate(blocks, cache.positions, self._deltas(bases))
                continue
            for index, keys in chosen.items():
                (block,) = _blocks([keys], len(cache.positions), self._head_width)
                for head, multiplier in enumerate(self._multipliers[model_layers[number][index]]):
                    rotate([replace(block, head=head)], cache.positions, self._deltas(bases, multiplier))

    def _state_of_one_token(self, context: Context, position: int) -> NDArray[np.uint8]:
        try:
            context.decode([BatchPart(context.spare, position, (self._token,), output=False)], [None])
            data = aligned_bytes(context.spare_state_size())
            context.read_spare(data)
        finally:
            context.drop_spare()
        return data

    def _has_whole_heads(self, keys: LayerKeys) -> bool:
        return keys.row_bytes % (self._head_width * number_bytes(keys.type_id)) == 0

    def _follows_base(
        self, pair: _Pair, first: NDArray[np.uint8], second: NDArray[np.uint8], turned: NDArray[np.uint8], tried: bool
    ) -> bool:
        """Whether turning explains the other base's key; False if both bases give the same key."""

        def numbers(data: NDArray[np.uint8], keys: LayerKeys) -> NDArray[np.float32]:
            return as_float32(data[keys.offset : keys.offset + keys.row_bytes], keys.type_id)

        wanted = numbers(second, pair.second)
        if agree(numbers(first, pair.first), wanted, pair.first.type_id):
            return False
        if tried and agree(numbers(turned, pair.first), wanted, pair.first.type_id):
            return True
        raise NotShareableError(f"the keys of layer {pair.at[1]} do not follow the base as RoPE turns them")

    def _rotator(self) -> KeyRotator:
        """This thread's own rotator."""
        if not hasattr(self._workers, "rotator"):
            rotator = KeyRotator()
            with self._lock:
                self._stack.callback(rotator.close)
            self._workers.rotator = rotator
        found: KeyRotator = self._workers.rotator
        return found

    def _scratch(self, size: int) -> NDArray[np.uint8]:
        """This thread's own bytes for one piece of a cache."""
        held: NDArray[np.uint8] | None = getattr(self._workers, "scratch", None)
        if held is None or len(held) < size:
            held = self._workers.scratch = aligned_bytes(size)
        return held[:size]


def _paired(caches: Sequence[CacheState], others: Sequence[CacheState]) -> list[_Pair]:
    """The layers of both states side by side. Raises NotShareableError if the states differ in form."""

    def form(state: Sequence[CacheState]) -> list[list[tuple[int, int]]]:
        return [[(keys.type_id, keys.row_bytes) for keys in cache.layers] for cache in state]

    if form(caches) != form(others) or any(len(cache.positions) != 1 for cache in caches):
        raise NotShareableError("the caches of two buckets have different forms")
    return [
        _Pair((number, index), mine, theirs)
        for number, (cache, other) in enumerate(zip(caches, others, strict=True))
        for index, (mine, theirs) in enumerate(zip(cache.layers, other.layers, strict=True))
    ]


def _blocks(layers: Sequence[LayerKeys], cells: int, head_width: int) -> list[KeyBlock]:
    """`layers` as few blocks: neighbours of one shape lie at equal distances and turn in one operation."""
    blocks: list[KeyBlock] = []
    for (type_id, row_bytes), group in groupby(layers, key=lambda keys: (keys.type_id, keys.row_bytes)):
        heads = row_bytes // (head_width * number_bytes(type_id))
        for keys in group:
            previous = blocks[-1] if blocks else None
            if previous is not None and (previous.type_id, previous.heads) == (type_id, heads):
                gap = keys.offset - previous.offset - (previous.layers - 1) * previous.stride
                if previous.layers == 1 or gap == previous.stride:
                    blocks[-1] = replace(previous, layers=previous.layers + 1, stride=gap)
                    continue
            blocks.append(KeyBlock(keys.offset, cells * row_bytes, 1, cells, heads, head_width, type_id))
    return blocks
