"""The waves of a model's buckets along the distance, or of bases that are searched for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from abcli.config import BucketConfig
from abcli.errors import UnsupportedModelError, UsageError
from abcli.gguf.architectures import rotation
from abcli.gguf.header import Header
from abcli.rope.bases import choose_bases
from abcli.rope.frequencies import RopeParameters, angular_frequencies
from abcli.rope.parameters import rope_parameters
from abcli.rope.search import candidate_multipliers, search_envelope, search_paper
from abcli.rope.waveform import Floats, envelope, value_at_zero, waveforms

Objective = Literal["paper", "envelope"]

# 512 MiB of float64: room for 16 buckets over 4 million tokens, or 200 candidates over 330,000.
MAX_VALUES = 2**26


@dataclass(frozen=True)
class Search:
    """A search: how many bases, by which objective, from which multiples of the native base."""

    count: int
    objective: Objective
    low: float
    high: float
    candidates: int


@dataclass(frozen=True)
class Waves:
    """Waves as shares of A(0), float64: of the native base [n], of the buckets [buckets, n], of their envelope [n].

    The native base counts in the envelope only where it is one of the buckets.
    """

    header: Header
    context: int
    pairs: int
    native_base: float
    bases: tuple[float, ...]
    native: Floats
    waves: Floats
    envelope: Floats
    search: Search | None


def compute_waves(header: Header, context: int, buckets: BucketConfig, search: Search | None) -> Waves:
    """The waves of the buckets, or of the bases that the search finds, at distances 0 .. context - 1.

    Raises UnsupportedModelError for a model without RoPE, UsageError for what is too large or impossible.
    """
    parameters = rope_parameters(header, neox=False, context_size=context)
    pairs = parameters.dimensions // 2
    if rotation(header) == "none" or pairs < 1:
        raise UnsupportedModelError(
            f"{header.path} ({header.architecture}) does not use RoPE", "only models with rotary positions have waves"
        )
    (native_base,) = choose_bases(BucketConfig(count=1), header.native_base)
    if search is not None:
        buckets = BucketConfig(multipliers=_find(parameters, native_base, context, search))
    bases = choose_bases(buckets, native_base)
    table = _shares(parameters, (native_base, *bases), context)
    return Waves(
        header=header,
        context=context,
        pairs=pairs,
        native_base=native_base,
        bases=bases,
        native=table[0],
        waves=table[1:],
        envelope=envelope(table[1:]),
        search=search,
    )


def _find(parameters: RopeParameters, native_base: float, context: int, search: Search) -> tuple[float, ...]:
    """The multiples of the native base that the search chooses, ascending."""
    # The ends of the range must be possible bases; then all between them are.
    choose_bases(BucketConfig(multipliers=(search.low, search.high)), native_base)
    _check_size(search.candidates + 1, context)
    multipliers = candidate_multipliers(search.low, search.high, search.candidates)
    table = _shares(parameters, [multiplier * native_base for multiplier in multipliers], context)
    find = search_paper if search.objective == "paper" else search_envelope
    chosen = find(table, multipliers.index(1.0), search.count)
    return tuple(sorted(multipliers[index] for index in chosen))


def _shares(parameters: RopeParameters, bases: Sequence[float], context: int) -> Floats:
    """The waves of `bases` as shares of A(0), float64 [bases, context]."""
    _check_size(len(bases), context)
    frequencies = np.array([angular_frequencies(parameters, base) for base in bases])
    table = waveforms(frequencies, context)
    table /= value_at_zero(frequencies.shape[1])
    return table


def _check_size(bases: int, context: int) -> None:
    """Raise UsageError for more than can be computed."""
    if bases * context > MAX_VALUES:
        raise UsageError(
            f"{bases} bases over {context} tokens are too much to compute",
            f"choose a `ctx_size` of {MAX_VALUES // bases} or less, or fewer bases",
        )
