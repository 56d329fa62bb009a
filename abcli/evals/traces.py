"""What the buckets said at every token of an answer, kept so that any set of them can be merged later."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abcli.atomic import write_atomically
from abcli.engine.engine import Engine
from abcli.errors import NativeError
from abcli.generate import common_prefix
from abcli.likelihood import Beginning, Walk

# Each base's likeliest tokens are kept; what a merge of them misses is below the least of these.
KEPT_TOKENS = 48
_FORMAT = 1
_NEAR_PEAK = np.float32(-12.0)
# exp() of this is 0 in float32.
_NEGLIGIBLE = np.float32(-200.0)
# What zipfile raises on bytes that were an archive once, and numpy and `_decode` on arrays that are not a trace's.
_DAMAGE = (
    *(OSError, EOFError, zipfile.BadZipFile, zlib.error, struct.error, RuntimeError, OverflowError),
    *(KeyError, ValueError, TypeError, IndexError, AttributeError),
)


@dataclass(frozen=True)
class Node:
    """The next-token distributions of all bases after one beginning of an answer.

    A token that is not kept is, under every base, less likely than that base's `KEPT_TOKENS` likeliest.
    """

    tokens: NDArray[np.int32]
    """[kept], ascending: the likeliest of each base, and those the answers go on with."""
    log_probabilities: NDArray[np.float32]
    """[bases, kept], natural logarithms, normalised over the whole vocabulary."""
    entropies: NDArray[np.float32]
    """[bases], nats, over the whole vocabulary."""

    def place(self, token: int) -> int:
        """The index of a kept token."""
        return int(np.searchsorted(self.tokens, token))


@dataclass(frozen=True)
class Trace:
    """One question under every base: a tree of answer beginnings, and the way of each continuation through it."""

    bases: tuple[float, ...]
    nodes: tuple[Node, ...]
    paths: tuple[tuple[tuple[int, int], ...], ...]
    """For each continuation, the right one first: the (node, token) pairs it consists of."""

    def select(self, bases: Sequence[float]) -> list[int]:
        """The rows of `bases`, in their order. Raises KeyError for one that was not traced."""
        rows = {base: row for row, base in enumerate(self.bases)}
        return [rows[base] for base in bases]


def trace(
    engine: Engine,
    slot: int,
    prompt: Sequence[int],
    continuations: Sequence[Sequence[int]],
    last_alone: bool = False,
) -> Trace:
    """Let the buckets of `engine` read `prompt` and then each of `continuations`, token by token as in decoding.

    What `slot` holds of the prompt is reused; the prompt and the continuations may not be empty. Common beginnings
    of continuations are computed once. `last_alone` computes the prompt's last token by itself, as a shared prefill
    does: sizes of batches decide about the last bits. Raises NativeError for logits that are no numbers, and what
    the engine raises.
    """
    cached = engine.truncate(slot, min(common_prefix(engine.tokens(slot), prompt), len(prompt) - 1))
    if last_alone and cached < len(prompt) - 1:
        engine.prefill(slot, prompt[cached:-1])
        cached = len(prompt) - 1
    logits = engine.prefill(slot, prompt[cached:])
    nodes: dict[Beginning, Node] = {}
    walk = Walk(continuations)
    while taken := walk.take(1):
        (beginning,) = taken
        if beginning is not walk.root:
            engine.truncate(slot, len(prompt) + beginning.length - 1)
            logits = engine.step({slot: beginning.token})[slot]
        nodes[beginning] = _node(logits, set(beginning.following), engine.bases)
    numbers = {beginning: number for number, beginning in enumerate(nodes)}
    paths = (
        tuple((numbers[before], int(token)) for before, token in zip(walk.along(tokens), tokens, strict=True))
        for tokens in continuations
    )
    return Trace(engine.bases, tuple(nodes.values()), tuple(paths))


def _node(logits: NDArray[np.float32], following: set[int], bases: Sequence[float]) -> Node:
    chosen = set(following)
    peaks = logits.max(axis=1, keepdims=True)  # hands a NaN on
    for base, peak in zip(bases, peaks[:, 0], strict=True):
        if not np.isfinite(peak):
            raise NativeError(
                f"the logits under the RoPE base {base:g} are no numbers",
                "leave this base out; if the native one gives none either, the model file may be damaged",
            )
    differences = logits - peaks
    for row in differences:
        chosen.update(_likeliest(row, min(KEPT_TOKENS, len(row))).tolist())
    tokens = np.array(sorted(chosen), np.int32)
    kept = differences[:, tokens]
    np.maximum(differences, _NEGLIGIBLE, out=differences)  # no 0 * -inf below
    exponentials = np.exp(differences)
    sums = exponentials.sum(axis=1)
    moments = np.einsum("jx,jx->j", exponentials, differences)
    log_probabilities = kept - np.log(sums)[:, None]
    return Node(tokens, log_probabilities.astype(np.float32), (np.log(sums) - moments / sums).astype(np.float32))


def _likeliest(differences: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """The indices of the `count` largest of `differences` to the peak, in no order."""
    # Nearly always these are few, and to sort a whole vocabulary out costs as much as to compute its logits.
    near = np.flatnonzero(differences > _NEAR_PEAK)
    if len(near) < count:
        return np.argpartition(differences, -count)[-count:]
    return near[np.argpartition(differences[near], -count)[-count:]]


def save(path: Path, item: Trace) -> None:
    """Write `item` so that it is there whole or not at all. Raises OSError."""
    arrays = {
        "format": np.array(_FORMAT),
        "bases": np.array(item.bases, np.float64),
        "sizes": np.array([len(node.tokens) for node in item.nodes], np.int32),
        "tokens": np.concatenate([node.tokens for node in item.nodes]),
        "log_probabilities": np.concatenate([node.log_probabilities for node in item.nodes], axis=1),
        "entropies": np.stack([node.entropies for node in item.nodes]),
        "path_sizes": np.array([len(path) for path in item.paths], np.int32),
        "paths": np.array([pair for path in item.paths for pair in path], np.int32),
    }
    data = BytesIO()
    np.savez(data, **arrays)  # type: ignore[arg-type]
    write_atomically(path, data.getvalue())


def load(path: Path) -> Trace | None:
    """The trace in `path`, or None if it is not there, damaged or of another format."""
    try:
        data = BytesIO(path.read_bytes())
        # Checked first, as numpy reads the headers of arrays before it could see that they are damaged.
        with zipfile.ZipFile(data) as archive:
            if archive.testzip() is not None:
                return None
        data.seek(0)
        with np.load(data, allow_pickle=False) as arrays:
            return _decode(arrays) if int(arrays["format"]) == _FORMAT else None
    except _DAMAGE:
        return None


def _decode(arrays: Mapping[str, NDArray[Any]]) -> Trace:
    """The trace that `save` made `arrays` of. Raises ValueError, KeyError and others if they do not fit together."""
    bases, sizes, path_sizes = (tuple(arrays[name].tolist()) for name in ("bases", "sizes", "path_sizes"))
    tokens, log_probabilities, entropies = arrays["tokens"], arrays["log_probabilities"], arrays["entropies"]
    flat = [(int(node), int(token)) for node, token in arrays["paths"]]
    fitting = (
        tokens.shape == (sum(sizes),)
        and log_probabilities.shape == (len(bases), sum(sizes))
        and entropies.shape == (len(sizes), len(bases))
        and sum(path_sizes) == len(flat)
        and min(*sizes, *path_sizes) > 0
    )
    if not fitting:
        raise ValueError("the sizes contradict each other")
    ends = np.cumsum(sizes)[:-1]
    parts = zip(np.split(tokens, ends), np.split(log_probabilities, ends, axis=1), entropies, strict=True)
    nodes = tuple(Node(*part) for part in parts)
    if any(node < 0 or token not in nodes[node].tokens for node, token in flat):
        raise ValueError("a path leaves the tree")
    starts = np.cumsum([0, *path_sizes]).tolist()
    paths = tuple(tuple(flat[start:end]) for start, end in pairwise(starts))
    return Trace(bases, nodes, paths)
