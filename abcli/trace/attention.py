"""How much the tokens of an answer attend to what stands before them, under each bucket's base.

A pass of its own, after the answer, in contexts without flash attention and beside the engine. What stands before the
answer comes from the engine's cells, or is computed once more, under the base that computes prompts; each bucket gets
its keys turned as in a shared prefill. Where the buckets compute prompts themselves, each does so here too. Then each
bucket computes the rows of the answer, in batches. The row of a token is the one that chose it: that of the token
before.

Looked at are the heads that look back furthest: a head's reach is the mean over the answer's rows of the largest
weight x distance (tokens), so that heads count that pick something out far back, not those that look at everything a
little. The first token of the text is left out: on it heads rest that look at nothing. A tenth of all heads is looked
at, those with the longest reach under the native base, under every base alike. Where only some layers have a sliding
window, their heads do not count: they see no further than it, and in Gemma no bucket's base reaches them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from abcli.config import CONTEXT_STEP, Buckets, ContextConfig
from abcli.engine.memory import free_room, predict
from abcli.engine.shared import NotShareableError, SharedPrefill
from abcli.engine.workers import available_cores
from abcli.errors import OutOfMemoryError
from abcli.gguf.architectures import window_layers
from abcli.native.attention import AttentionContext, attention_config
from abcli.native.llama import CancelFlag
from abcli.native.model import Model
from abcli.rope.bases import nearest_base
from abcli.rope.parameters import follows_context_size, rope_parameters
from abcli.text import gibibytes
from abcli.trace.trace import STRONGEST, Attention

# The share of all heads that is looked at.
HEADS = 0.1
# Weights that are kept at most, over buckets, rows and positions: 512 MiB.
_MAX_WEIGHTS = 2**27

Heads = tuple[tuple[int, int], ...]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Reading:
    """The weights of a few heads: `weights` is float32 [buckets, rows, positions], of rows with the sum 1.

    Row r stands at position `first + r` and sees what is at or before it; later positions are 0.
    """

    first: int
    heads: Heads
    weights: NDArray[np.float32]


def read_attention(
    model: Model,
    config: ContextConfig,
    bases: Sequence[float],
    tokens: Sequence[int],
    first: int,
    *,
    prefill_base: float | None = None,
    cells: Iterable[NDArray[np.uint8]] = (),
    heads: Heads = (),
    cancel: CancelFlag,
    progress: Progress = lambda _done, _total: None,
) -> Reading:
    """The weights of the rows from position `first` on, under each of `bases`.

    With a `prefill_base` that base computes what stands before the rows, if its keys can be turned; `cells`, if any,
    are what an engine holds of that, in pieces of state bytes. `heads` are chosen if none are given. `progress` gets
    (buckets done, buckets). At most as many rows as memory is set aside for. Raises OutOfMemoryError before anything is
    made, CancelledError and NativeError.
    """
    tokens = tokens[: first + max(1, _MAX_WEIGHTS // (len(bases) * len(tokens)))]
    before, rows = tokens[:first], tokens[first:]
    native = nearest_base(bases, model.checked.header.native_base)
    _check_memory(model, config, bases, len(tokens), len(rows), leads=prefill_base is not None)
    weights = np.zeros((len(bases), len(rows), len(tokens)), np.float32)
    with ExitStack() as stack:
        contexts = _Contexts(model, config, len(tokens), cancel, stack)
        leader = contexts.lead(prefill_base, bases, before, cells) if prefill_base is not None and before else None
        # The native bucket comes first: it says which heads are looked at.
        order = sorted(range(len(bases)), key=lambda bucket: bucket != native)
        for done, bucket in enumerate(order):
            progress(done, len(bases))
            with contexts.holding(bases[bucket], before, leader) as context:
                if not heads:
                    heads = furthest(_reaches(context, rows), window_layers(model.checked.header) or ())
                    context.truncate(0, first)
                _collect(context, rows, heads, weights[bucket])
    return Reading(first, heads, weights)


def furthest(reaches: Mapping[int, NDArray[np.float64]], windows: Sequence[bool] = ()) -> Heads:
    """The (layer, head) with the longest reaches, of `reaches` [heads] of each layer: a tenth of all heads.

    They are in layers without a window if `windows`, by layer, says that some have none.
    """
    whole = [layer for layer in reaches if layer < len(windows) and not windows[layer]] or list(reaches)
    every = sorted(
        ((float(reach), layer, head) for layer in whole for head, reach in enumerate(reaches[layer])), reverse=True
    )
    count = max(1, round(HEADS * sum(map(len, reaches.values()))))
    return tuple(sorted((layer, head) for _reach, layer, head in every[:count]))


def summarised(
    reading: Reading, merge_weights: NDArray[np.float64], prompt: int, passages: Sequence[tuple[int, int]]
) -> Attention:
    """What a trace keeps of a reading, of a text whose first `prompt` tokens are the prompt.

    `merge_weights` [steps, buckets] are those of the answer's tokens; negative ones of the rule `pool` count as none.
    """
    positive = np.maximum(merge_weights[: reading.weights.shape[1]], 0)
    positive /= positive.sum(axis=1, keepdims=True)
    starts = [start for start, _end in passages]
    buckets, steps, _length = reading.weights.shape
    count = min(STRONGEST, prompt)
    whole = np.zeros((buckets + 1, prompt), np.float64)
    sums = np.empty((steps, buckets + 1, len(passages)), np.float32)
    strongest = np.empty((steps, buckets + 1, count), np.int32)
    strongest_weights = np.empty(strongest.shape, np.float32)
    for step in range(steps):
        own = reading.weights[:, step, :prompt]
        rows = np.concatenate((own, (positive[step] @ own)[None].astype(np.float32)))
        whole += rows
        sums[step] = np.add.reduceat(rows, starts, axis=1)
        best = np.argpartition(rows, -count, axis=1)[:, -count:]
        found = np.take_along_axis(rows, best, axis=1)
        order = np.argsort(-found, axis=1, kind="stable")
        strongest[step] = np.take_along_axis(best, order, axis=1)
        strongest_weights[step] = np.take_along_axis(found, order, axis=1)
    by_distance = np.stack([mean_by_distance(weights, reading.first) for weights in reading.weights])
    mean = (whole / max(1, steps)).astype(np.float32)
    return Attention(reading.heads, steps, mean, sums, strongest, strongest_weights, by_distance)


def mean_by_distance(weights: NDArray[np.float32], first: int) -> NDArray[np.float32]:
    """The mean weight at each distance 0 .. first - 1, float32 [first], of rows [rows, positions] from `first` on.

    The first token of the text is left out. Every distance has as many rows.
    """
    total = np.zeros(first, np.float64)
    for row, values in enumerate(weights):
        at = first + row
        total += values[at - first + 1 : at + 1][::-1]
    return (total / max(1, len(weights))).astype(np.float32)


class _Contexts:
    """Makes contexts that hold the beginning of one text, one at a time beside the leader."""

    def __init__(self, model: Model, config: ContextConfig, length: int, cancel: CancelFlag, stack: ExitStack) -> None:
        self._model = model
        self._config = config
        self._cells = _cells(model, config, length)
        self._threads = config.threads or available_cores()
        self._cancel = cancel
        self._stack = stack
        self._shared: SharedPrefill | None = None

    def lead(
        self, base: float, bases: Sequence[float], tokens: Sequence[int], cells: Iterable[NDArray[np.uint8]]
    ) -> AttentionContext | None:
        """A context under `base` with `tokens`, from `cells` if they fit, if its keys can be turned to `bases`.

        It lives as long as the stack.
        """
        if self._model.rotation is None:
            return None
        rope = rope_parameters(
            self._model.checked.header, neox=self._model.rotation == "halves", context_size=self._cells
        )
        leader = self._stack.enter_context(self._make(base))
        shared = SharedPrefill(rope, self._model, _one_by_one)
        self._stack.callback(shared.close)
        furthest_base = max(bases, key=lambda other: abs(np.log(other / base)))
        try:
            with self._make(furthest_base) as other:
                shared.probe([leader, other], self._cells)
        except NotShareableError:
            return None
        self._shared = shared
        if not leader.take(cells, len(tokens)):
            leader.append(tokens)
        return leader

    @contextmanager
    def holding(
        self, base: float, tokens: Sequence[int], leader: AttentionContext | None
    ) -> Iterator[AttentionContext]:
        """A context under `base` with `tokens`, from the leader where there is one."""
        with self._make(base) as context:
            if leader is None or self._shared is None:
                context.append(tokens)
            else:
                piece = self._model.sliding_window or len(tokens)
                for start in range(0, len(tokens), piece):
                    self._shared.transfer(leader, [context], 0, start, min(start + piece, len(tokens)))
            yield context

    def _make(self, base: float) -> AttentionContext:
        return AttentionContext(self._model, base, self._config, self._cells, self._threads, self._cancel)


def _cells(model: Model, config: ContextConfig, length: int) -> int:
    """The cells of a context for `length` tokens: as many as in the engine where the rotation depends on that."""
    whole = config.context_size * config.slots
    return whole if follows_context_size(model.checked.header) else -(-length // CONTEXT_STEP) * CONTEXT_STEP


def _check_memory(
    model: Model, config: ContextConfig, bases: Sequence[float], length: int, rows: int, *, leads: bool
) -> None:
    """Raise OutOfMemoryError for a text of `length` tokens that is predicted to be too long, unless `config.force`."""
    cells = _cells(model, config, length)
    plain = replace(attention_config(config), context_size=cells, engine="contexts", prefill="exact", prompt_cache=None)
    # One bucket's context at a time, beside the leader's.
    prediction = predict(model.checked, plain, Buckets((bases[0],) * (1 + leads), bases[0]))
    there = [prediction.item(name) for name in ("weights", "logits", "tokenizer", "adapters")]
    # The weights that are kept, those of a layer, and keys and values on their way: all of them from the leader, and
    # twice a piece from the engine.
    heads = max(model.checked.header.heads, default=0)
    arrays = 4 * length * (len(bases) * rows + heads * min(rows, plain.ubatch_size))
    arrays += leads * (length + 2 * min(length, config.ubatch_size)) * prediction.kv_bytes_per_token
    host = prediction.host - sum(item.host for item in there) + arrays
    device = prediction.device - sum(item.device for item in there)
    room = free_room(model.checked.config.gpu_layers)
    if config.force or (host <= room.host and device <= room.device):
        return
    needed, free = (host, room.host) if host > room.host else (device, room.device)
    raise OutOfMemoryError(
        f"to read the attention over {length:,} tokens needs {gibibytes(needed)} of memory beside the engine, "
        f"but {gibibytes(free)} are free",
        "trace a shorter prompt, or with fewer `buckets`; `force` tries it as it is",
    )


def _one_by_one(job: Callable[[int], None], count: int) -> None:
    for index in range(count):
        job(index)


def _reaches(context: AttentionContext, rows: Sequence[int]) -> dict[int, NDArray[np.float64]]:
    """The sum over `rows`, which are appended, of the largest weight x distance, float64 [heads] of each layer."""
    found: dict[int, NDArray[np.float64]] = {}

    def see(layer: int, weights: NDArray[np.float32]) -> None:
        _heads, count, length = weights.shape
        places = np.arange(length, dtype=np.float32)
        distances = places[length - count :, None] - places[1:]
        # What lies ahead has no weight. Head by head, as all products together take as much memory as the weights.
        longest = [(head[:, 1:] * distances).max(axis=1, initial=0).sum(dtype=np.float64) for head in weights]
        found[layer] = found.get(layer, 0) + np.array(longest)

    context.append(rows, see)
    return found


def _collect(context: AttentionContext, rows: Sequence[int], heads: Heads, into: NDArray[np.float32]) -> None:
    """Append `rows`; the mean weights of `heads` go `into` [rows, positions]."""
    layers: dict[int, list[int]] = {}
    for layer, head in heads:
        layers.setdefault(layer, []).append(head)
    first = into.shape[1] - len(rows)

    def see(layer: int, weights: NDArray[np.float32]) -> None:
        if layer in layers:
            _heads, count, length = weights.shape
            into[length - count - first : length - first, :length] += weights[layers[layer]].sum(axis=0) / np.float32(
                len(heads)
            )

    context.append(rows, see)
