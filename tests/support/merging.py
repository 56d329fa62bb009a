"""Merging a single step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from abcli.config import MergeRule
from abcli.merge import Merged, Merger


def merge(logits: NDArray[np.float32], rule: MergeRule, pool_weights: Sequence[float] = ()) -> Merged:
    """What a new merger makes of `logits` [buckets, vocabulary]; the arrays are the caller's own."""
    return Merger(*logits.shape).merge(logits, rule, pool_weights)
