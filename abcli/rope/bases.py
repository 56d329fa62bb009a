"""Chooses the RoPE base of every bucket."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import numpy as np

from abcli.config import MAX_BUCKETS, MERGE_RULES, SPREADS, BucketConfig, Buckets, MergeRule, Spread
from abcli.errors import UnsupportedModelError, UsageError
from abcli.merge import check_pool_weights

_PAPER_SIX = (1.0, 1.75, 1.8, 1.9, 2.0, 2.5)


def symmetric_multipliers(count: int) -> tuple[float, ...]:
    """`count` multipliers of the native base, ascending, evenly spaced in the logarithm on both sides of 1.

    (count - 1) // 2 of them lie in [0.5, 1) and count // 2 in (1, 2]. Raises UsageError for a count out of range.
    """
    _check_count(count)
    below, above = (count - 1) // 2, count // 2
    return (
        *(0.5 * 2 ** (i / below) for i in range(below)),
        1.0,
        *(2 ** (i / above) for i in range(1, above + 1)),
    )


def paper_multipliers(count: int) -> tuple[float, ...]:
    """The one-sided set of Attention Buckets (arXiv 2312.04455, Llama-2-7B: 10,000 ... 25,000), ascending.

    Six buckets get the paper's own; any other number is interpolated over the paper's at even quantiles.
    Raises UsageError for a count out of range.
    """
    _check_count(count)
    quantiles = np.linspace(0, len(_PAPER_SIX) - 1, count)
    return tuple(float(m) for m in np.interp(quantiles, range(len(_PAPER_SIX)), _PAPER_SIX))


def choose_bases(config: BucketConfig, native_base: float) -> tuple[float, ...]:
    """The base of every bucket for a model trained with `native_base`, rounded to float32 as in llama.cpp.

    Explicit bases or multipliers keep their order and override `count` and `spread`; a spread is ascending and
    contains the native base. Raises UsageError for values that make no sense, UnsupportedModelError for a
    native base that is none.
    """
    native = _to_float32(native_base)
    if not 1 < native < math.inf:
        raise UnsupportedModelError(
            f"the model has a RoPE base of {native_base:g}", "only models with rotary positions have buckets"
        )
    if config.bases and config.multipliers:
        raise UsageError("both bases and multipliers are given", "give only one of `bases` and `multipliers`")
    if config.bases:
        return _checked(config.bases)
    if config.multipliers:
        for multiplier in config.multipliers:
            if not 0 < multiplier < math.inf:
                raise UsageError(f"the multiplier {multiplier:g} is not possible", "give positive numbers")
        return _checked(multiplier * native for multiplier in config.multipliers)
    if config.spread not in SPREADS:
        raise UsageError(f"unknown spread {config.spread!r}", f"use one of {', '.join(SPREADS)}")
    spread = symmetric_multipliers if config.spread == "symmetric" else paper_multipliers
    return _checked(multiplier * native for multiplier in spread(config.count))


def asked_buckets(
    count: int | None = None,
    bases: Sequence[float] = (),
    multipliers: Sequence[float] = (),
    spread: Spread | None = None,
    merge: MergeRule | None = None,
    weights: Sequence[float] = (),
) -> BucketConfig:
    """What is asked for, where anything may be left open. Raises UsageError for contradictions."""
    usual = BucketConfig()
    if bases and multipliers:
        raise UsageError("`bases` and `multipliers` are both given", "give one of them", setting="bases")
    explicit = len(bases or multipliers)
    if explicit and spread is not None:
        raise UsageError("`spread` has no say over explicit bases", "drop one", setting="spread")
    if explicit and count is not None and count != explicit:
        raise UsageError(
            f"`buckets={count}` contradicts the {explicit} bases that are given", "drop `buckets`", setting="buckets"
        )
    number = explicit or (usual.count if count is None else count)
    if not 1 <= number <= MAX_BUCKETS:
        raise UsageError(f"{number} buckets are impossible", f"choose 1 to {MAX_BUCKETS}", setting="buckets")
    if merge is not None and merge not in MERGE_RULES:
        raise UsageError(f"unknown merge rule {merge!r}", f"use one of {', '.join(MERGE_RULES)}", setting="merge")
    if weights and merge != "pool":
        raise UsageError(
            "`weights` needs `merge=pool`", "the other rules find the weights by themselves", setting="weights"
        )
    check_pool_weights(weights, number)
    return BucketConfig(
        number, spread or usual.spread, tuple(bases), tuple(multipliers), merge or usual.merge, tuple(weights)
    )


def resolve_buckets(config: BucketConfig, native_base: float, prefill_base: float | None = None) -> Buckets:
    """The buckets that `config` asks for, of a model trained with `native_base`.

    `prefill_base` is the base under which a shared prefill computes; None is the native one. Raises as `choose_bases`.
    """
    asked = BucketConfig(bases=(native_base if prefill_base is None else prefill_base,))
    (computing,) = choose_bases(asked, native_base)
    return Buckets(choose_bases(config, native_base), computing, config.merge, config.weights)


def nearest_base(bases: Sequence[float], base: float) -> int:
    """Which of `bases` is, by its logarithm, nearest to `base`; of several the first."""
    if len(bases) == 1:
        return 0
    return min(range(len(bases)), key=lambda index: abs(math.log(bases[index] / base)))


def parse_numbers(text: str, flag: str) -> tuple[float, ...]:
    """The finite numbers of a comma-separated list such as "50000,100000"; `flag` is named in a UsageError."""
    numbers = []
    for item in text.split(","):
        try:
            number = float(item)
        except ValueError:
            number = math.nan
        # float() would also take "1_0", where a comma was meant.
        if not math.isfinite(number) or "_" in item:
            raise UsageError(f"{flag}: {item.strip()!r} is not a number", f"give finite numbers, like {flag} 0.5,1,2")
        numbers.append(number)
    return tuple(numbers)


def _check_count(count: int) -> None:
    if not 1 <= count <= MAX_BUCKETS:
        raise UsageError(f"{count} buckets are not possible", f"use 1 to {MAX_BUCKETS} buckets")


def _checked(bases: Iterable[float]) -> tuple[float, ...]:
    given = tuple(bases)
    _check_count(len(given))
    rounded = tuple(_to_float32(base) for base in given)
    for base, stored in zip(given, rounded, strict=True):
        if not 1 < stored < math.inf:
            raise UsageError(f"the RoPE base {base:g} is not possible", "give finite bases above 1")
    return rounded


def _to_float32(number: float) -> float:
    with np.errstate(over="ignore"):
        return float(np.float32(number))
