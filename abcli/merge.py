"""Merges the next-token distributions of several buckets into one."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from abcli.config import MERGE_RULES, MergeRule
from abcli.errors import NativeError, UsageError

# One block of the exponentials of all buckets; with the logits it comes from it fits a 512 KiB L2 cache.
_BLOCK_BYTES = 224 * 1024
# Fewer numbers than this are done by one thread before another has woken up.
_NUMBERS_PER_THREAD = 100_000
# Below this share of a block's largest probability float32 sums lose digits: redo these in log space.
_SMALLEST_SHARE = np.float32(1e-30)
# exp() of this is 0 in float32; keeps 0 * -inf out of the entropy.
_NEGLIGIBLE = np.float32(-200.0)
# Pooled are the tokens with at least this share of the likeliest token's mean probability.
PLAUSIBLE_SHARE = 0.01
# Pooled log-probabilities lie at most so far (nats) below the mean, so that no bucket alone can decide.
LARGEST_DEFICIT = 10.0
# Weights are written with a few digits.
_WEIGHTS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Merged:
    """The merged distribution of one step.

    Arrays made by a `Merger` are overwritten by its next `merge`, except `weights`.
    """

    log_probabilities: NDArray[np.float32]
    """[vocabulary], natural logarithms; the probabilities sum to 1."""
    logits: NDArray[np.float32]
    """[vocabulary], `log_probabilities + log_normalizer`: on the scale of the buckets' own logits, because
    llama.cpp's repeat penalty depends on it. With one bucket they are the bucket's, bit for bit."""
    weights: NDArray[np.float64]
    """[buckets], sum to 1; those of the rule `pool` may be negative."""
    agreement: float
    """Sum over tokens of the smallest probability any bucket gives it: 1 when all buckets agree."""
    log_normalizer: float
    """Weighted mean of the buckets' logsumexp(logits)."""


class Merger:
    """Merges steps of one shape, `[buckets, vocabulary]`, with buffers that are allocated once.

    The exponentials are computed block by block with the block's own maximum as offset (pass 1); once the
    whole row is known they are scaled and combined (pass 2). Blocks are independent: several threads compute
    the same numbers as one. Not for use by two callers at a time.
    """

    def __init__(self, buckets: int, vocabulary: int, threads: int = 1) -> None:
        """Allocate the buffers: 4 bytes for each of buckets x vocabulary, and a little more.

        At most `threads` threads compute, and fewer where a share would be too small to be worth one.
        """
        if buckets < 1 or vocabulary < 1:
            raise UsageError(f"cannot merge {buckets} buckets of {vocabulary} tokens", "both must be positive")
        self.shape = (buckets, vocabulary)
        width = min(vocabulary, max(1024, _BLOCK_BYTES // (4 * buckets) // 16 * 16))
        self._blocks = [slice(low, min(low + width, vocabulary)) for low in range(0, vocabulary, width)]
        self._threads = max(1, min(threads, buckets * vocabulary // _NUMBERS_PER_THREAD, len(self._blocks)))
        # A block is contiguous: rows a power of two apart would fight for the same cache lines.
        self._exponentials = [np.empty((buckets, b.stop - b.start), np.float32) for b in self._blocks]
        # Room for what a thread computes in between.
        self._differences = np.empty((self._threads, buckets, width), np.float32)
        self._lowest = np.empty((self._threads, width), np.float32)
        self._log_probabilities = np.empty(vocabulary, np.float32)
        self._logits = np.empty(vocabulary, np.float32)
        # Per bucket and block: offset of the exponentials, their sum, and sum(exponential * difference).
        self._offsets = np.empty((buckets, len(self._blocks)))
        self._sums = np.empty_like(self._offsets)
        self._moments = np.zeros_like(self._offsets)

    def merge(self, logits: NDArray[np.float32], rule: MergeRule, pool_weights: Sequence[float] = ()) -> Merged:
        """Merge `logits` (float32 `[buckets, vocabulary]`, left untouched) by `rule`.

        With p_j = softmax(logits_j): `confidence` is sum_j a_j p_j with a_j = max_x p_j(x) normalised over j
        (Attention Buckets, arXiv 2312.04455); `mean` has equal a_j; `entropy` has a_j proportional to
        exp(-H(p_j)), H in nats; `max` takes the first of the buckets with the largest max_x p_j(x);
        `product` is the normalised geometric mean; `pool` is `mean`, but among the plausible tokens the mass is
        shared out by `pool_plausible` with `pool_weights`. -inf is a forbidden token.

        Raises UsageError for another shape or rule, or weights that `check_pool_weights` refuses; NativeError for
        NaN, +inf or a bucket of only -inf.
        """
        check_pool_weights(pool_weights, self.shape[0])
        if rule not in MERGE_RULES:
            raise UsageError(f"unknown merge rule {rule!r}", f"use one of {', '.join(MERGE_RULES)}")
        if logits.shape != self.shape or logits.dtype != np.float32:
            raise UsageError(
                f"cannot merge {logits.dtype} logits of shape {logits.shape}",
                f"float32 logits of shape {self.shape} are needed",
            )
        with np.errstate(all="ignore"):
            self._exponentiate(logits, with_moments=rule == "entropy")
            peaks, normalizers = self._normalize()
            weights = self._weigh(rule, peaks, normalizers)
            if rule == "pool" and pool_weights:
                weights = np.array(pool_weights, np.float64)
            return self._finish(logits, rule, weights, normalizers)

    def _each_block(self, work: Callable[[int, int], None]) -> None:
        """Call `work(block, thread)` for every block."""

        def share(thread: int) -> None:
            with np.errstate(all="ignore"):  # log(0) and exp(-large) are wanted; each thread has a state of its own
                for block in range(thread, len(self._blocks), self._threads):
                    work(block, thread)

        futures = [_pool().submit(share, thread) for thread in range(1, self._threads)]
        try:
            share(0)
        finally:
            # Nobody may use the buffers before all have ended, whatever was raised here.
            wait(futures)
        for future in futures:
            future.result()

    def _exponentiate(self, logits: NDArray[np.float32], *, with_moments: bool) -> None:
        def work(index: int, thread: int) -> None:
            values, exponentials = logits[:, self._blocks[index]], self._exponentials[index]
            peaks = values.max(axis=1)  # hands a NaN on
            self._offsets[:, index] = peaks
            np.subtract(values, np.where(peaks == -np.inf, 0, peaks)[:, None], out=exponentials)
            if with_moments:
                differences = self._differences[thread, :, : exponentials.shape[1]]
                np.maximum(exponentials, _NEGLIGIBLE, out=differences)
            np.exp(exponentials, out=exponentials)
            self._sums[:, index] = exponentials.sum(axis=1)
            if with_moments:
                self._moments[:, index] = np.einsum("jx,jx->j", exponentials, differences)

        self._each_block(work)

    def _normalize(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Largest logit and logsumexp of each bucket, from the blocks."""
        peaks: NDArray[np.float64] = self._offsets.max(axis=1)
        for bucket in np.flatnonzero(~np.isfinite(peaks)):
            what = "only -inf" if peaks[bucket] == -np.inf else str(peaks[bucket])
            raise NativeError(
                f"bucket {bucket} has logits with {what}",
                "the model file may be damaged, or the RoPE base of this bucket too far from the native one",
            )
        # In a block of nothing but -inf all exponentials are 0, so that any finite offset is right.
        self._offsets = np.where(self._offsets == -np.inf, peaks[:, None], self._offsets)
        totals = (self._sums * np.exp(self._offsets - peaks[:, None])).sum(axis=1)
        return peaks, peaks + np.log(totals)

    def _weigh(
        self, rule: MergeRule, peaks: NDArray[np.float64], normalizers: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        log_confidences = peaks - normalizers
        if rule == "max":
            weights = np.zeros(len(peaks))
            weights[np.argmax(log_confidences)] = 1.0
            return weights
        if rule == "confidence":
            weights = np.exp(log_confidences)
        elif rule == "entropy":
            distances = self._offsets - peaks[:, None]
            means = np.exp(self._offsets - normalizers[:, None]) * (self._moments + self._sums * distances)
            weights = np.exp(means.sum(axis=1) + log_confidences)  # exp(sum p log p)
        else:
            weights = np.ones(len(peaks))
        return np.asarray(weights / weights.sum(), np.float64)

    def _finish(
        self,
        logits: NDArray[np.float32],
        rule: MergeRule,
        weights: NDArray[np.float64],
        normalizers: NDArray[np.float64],
    ) -> Merged:
        log_normalizer = float(weights @ normalizers)
        mixing = np.full(len(weights), 1 / len(weights)) if rule == "pool" else weights
        single = 0 if len(weights) == 1 else int(np.argmax(weights)) if rule == "max" else None
        result, merged_logits = self._log_probabilities, self._logits
        agreement = 1.0
        if len(weights) > 1:
            # A mixture falls out of the same pass over the exponentials.
            agreement = self._combine(logits, mixing, normalizers, mix=single is None and rule != "product")
        if single is not None:
            # Differences in float64: beside a large logsumexp float32 would lose what small differences say.
            np.subtract(logits[single], normalizers[single], out=result, casting="same_kind", dtype=np.float64)
            merged_logits[:] = logits[single]
        elif rule == "product":
            _geometric_mean(logits, result)
        elif rule == "pool":
            plausible = np.flatnonzero(result >= result.max() + np.log(PLAUSIBLE_SHARE))
            rows = logits[:, plausible] - normalizers[:, None]
            result[plausible] = pool_plausible(rows, result[plausible].astype(np.float64), weights)
        if single is None:
            np.add(result, np.float32(log_normalizer), out=merged_logits)
        return Merged(result, merged_logits, weights, agreement, log_normalizer)

    def _combine(
        self,
        logits: NDArray[np.float32],
        weights: NDArray[np.float64],
        normalizers: NDArray[np.float64],
        *,
        mix: bool,
    ) -> float:
        """Turn the exponentials into probabilities; return the agreement; with `mix`, write log sum_j a_j p_j."""
        log_scales = self._offsets - normalizers[:, None]
        ceilings = log_scales.max(axis=0)
        scales = np.exp(log_scales - ceilings).astype(np.float32)
        factors = weights.astype(np.float32)
        agreements = np.empty(len(self._blocks))

        def work(index: int, thread: int) -> None:
            block = self._blocks[index]
            shares = self._exponentials[index]
            np.multiply(shares, scales[:, index, None], out=shares)
            lowest = np.minimum.reduce(shares, axis=0, out=self._lowest[thread, : shares.shape[1]])
            agreements[index] = float(lowest.sum()) * float(np.exp(ceilings[index]))
            if not mix:
                return
            mixture = np.matmul(factors, shares, out=self._log_probabilities[block])
            tiny = np.flatnonzero(mixture < _SMALLEST_SHARE) if mixture.min() < _SMALLEST_SHARE else ()
            np.log(mixture, out=mixture)
            np.add(mixture, np.float32(ceilings[index]), out=mixture)
            if len(tiny):
                mixture[tiny] = _mix_in_log_space(logits[:, block][:, tiny], weights, normalizers)

        self._each_block(work)
        return min(float(agreements.sum()), 1.0)


@cache
def _pool() -> Executor:
    """Threads for the shares of all mergers; they live as long as the process."""
    return ThreadPoolExecutor(thread_name_prefix="abcli-merge")


if hasattr(os, "register_at_fork"):
    # A child has none of its parent's threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)


def merge_kept(
    log_probabilities: NDArray[np.float32],
    entropies: NDArray[np.float32],
    rule: MergeRule,
    pool_weights: Sequence[float] = (),
) -> NDArray[np.float64]:
    """The merged log-probabilities [kept] of some tokens, by the rules of `Merger.merge`.

    `log_probabilities` [buckets, kept] must include each bucket's likeliest token, and may have -inf for forbidden
    ones; `entropies` [buckets] are in nats.
    Exact but for `product`, where the buckets' remaining mass is taken to be spread alike over the other tokens, and
    for `pool`, if a plausible token is not among those kept.
    """
    rows = log_probabilities.astype(np.float64)
    weights = np.full(len(rows), 1 / len(rows))
    if rule == "confidence":
        weights = np.exp(rows.max(axis=1))
    elif rule == "entropy":
        weights = np.exp(-entropies.astype(np.float64))
    elif rule == "max":
        return np.asarray(rows[np.argmax(rows.max(axis=1))], np.float64)
    elif rule == "product":
        means = rows.mean(axis=0)
        others = np.maximum(1 - np.exp(rows).sum(axis=1), 1e-12)
        return np.asarray(means - np.log(np.exp(means).sum() + np.exp(np.log(others).mean())), np.float64)
    mixed = _log_mixture(rows + np.log(weights / weights.sum())[:, None])
    if rule == "pool" and len(rows) > 1:
        plausible = np.flatnonzero(mixed >= mixed.max() + np.log(PLAUSIBLE_SHARE))
        shares = np.array(pool_weights) if pool_weights else weights
        mixed[plausible] = pool_plausible(rows[:, plausible], mixed[plausible], shares)
    return mixed


def pool_plausible(
    log_probabilities: NDArray[np.floating], log_means: NDArray[np.float64], weights: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Share the mass of the plausible tokens out by a log-linear pool: p(x) proportional to prod_j p_j(x)^w_j.

    `log_probabilities` is [buckets, tokens], `log_means` [tokens] the logarithm of the buckets' mean probability,
    whose sum is kept, and `weights` [buckets] sums to 1. A negative weight takes away what a bucket says that
    overlooks the context: it is the amateur of contrastive decoding (Li et al., arXiv 2210.15097), from which the
    limit to plausible tokens comes too. A bucket's probability counts as at least e^-10 of the mean.
    """
    rows = np.maximum(log_probabilities, log_means - LARGEST_DEFICIT)
    pooled = weights @ rows
    return np.asarray(pooled - _log_sum(pooled) + _log_sum(log_means), np.float64)


def check_pool_weights(weights: Sequence[float], buckets: int) -> None:
    """Raises UsageError unless there are no weights, or one finite one for each bucket, with the sum 1."""
    if not weights:
        return
    if len(weights) != buckets:
        raise UsageError(f"{len(weights)} weights are given for {buckets} buckets", "give one for each bucket")
    if not np.isfinite(weights).all() or abs(sum(weights) - 1) > _WEIGHTS_TOLERANCE:
        listed = ",".join(f"{weight:g}" for weight in weights)
        raise UsageError(f"the weights {listed} sum to {sum(weights):g}", "give finite weights with the sum 1")


def _log_sum(values: NDArray[np.float64]) -> float:
    peak = float(values.max())
    return peak + float(np.log(np.exp(values - peak).sum()))


def _geometric_mean(logits: NDArray[np.float32], out: NDArray[np.float32]) -> None:
    np.matmul(np.full(len(logits), 1 / len(logits), np.float32), logits, out=out)
    peak = out.max()
    if peak == -np.inf:
        raise NativeError("no token is possible in all buckets at once", "use another merge rule than product")
    np.subtract(out, peak, out=out)
    np.subtract(out, np.log(np.exp(out).sum()), out=out)


def _mix_in_log_space(
    logits: NDArray[np.float32], weights: NDArray[np.float64], normalizers: NDArray[np.float64]
) -> NDArray[np.float64]:
    """log sum_j a_j p_j for a few columns, in float64 with an offset per column."""
    return _log_mixture(logits - normalizers[:, None] + np.log(weights)[:, None])


def _log_mixture(terms: NDArray[np.float64]) -> NDArray[np.float64]:
    """log sum_j exp(terms_j) of each column; -inf for a column of nothing else."""
    peaks = terms.max(axis=0)
    offsets = np.where(peaks == -np.inf, 0.0, peaks)
    with np.errstate(divide="ignore"):
        return np.asarray(offsets + np.log(np.exp(terms - offsets).sum(axis=0)), np.float64)


def likeliest(numbers: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """The tokens with the `count` largest of `numbers` [vocabulary], the largest first and of equals the smaller token.

    The numbers are logits, probabilities or their logarithms; all tokens are returned where `count` asks for more.
    """
    if count < 1:
        return np.empty(0, np.intp)
    count = min(count, len(numbers))
    found = np.argpartition(-numbers, count - 1)[:count]
    return found[np.lexsort((found, -numbers[found]))]
