"""Which tokens a chain of samplers needs to see: those beyond cannot be chosen, whatever it does."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from abcli.sampling import SamplingConfig

_BLOCK = 128
# With more candidates than this share of the vocabulary, looking for them costs more than it saves.
_LARGEST_SHARE = 1 / 8


def enough_candidates(config: SamplingConfig, penalty_last_n: int, biases: int, vocabulary: int) -> int:
    """How many of the likeliest tokens the chain needs beside those with a bias; 0 if it needs all.

    Top-k keeps the k best after penalties, which lower at most one token for each that they remember; `biases` is the
    number of tokens with a bias. Without top-k, temperature 0 takes the best one.
    """
    penalised = config.repeat_penalty != 1 or config.frequency_penalty != 0 or config.presence_penalty != 0
    raising = config.repeat_penalty < 1 or config.frequency_penalty < 0 or config.presence_penalty < 0
    if raising or config.mirostat or config.dry_multiplier > 0 or config.top_n_sigma > 0:
        return 0
    count = config.top_k
    if count <= 0:
        if config.temperature > 0 or config.typical_p < 1 or config.xtc_probability > 0:
            return 0
        count = 1
    count += biases + (penalty_last_n if penalised else 0)
    return count if count <= vocabulary * _LARGEST_SHARE / _BLOCK else 0


def likeliest(logits: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """The tokens with the `count` largest of `logits` [vocabulary], ascending, and maybe a few more.

    Every token that is as large as one of them is among them. At most one in 128 tokens can be asked for.
    """
    # Block i is every so-many-th number from the i-th on: numpy compares whole rows of those at once.
    whole = len(logits) // _BLOCK * _BLOCK
    maxima = logits[:whole].reshape(_BLOCK, -1).max(axis=0)
    # So many blocks have a number of this size, so as many numbers are at least that large.
    bound = np.partition(maxima, len(maxima) - count)[len(maxima) - count]
    return np.flatnonzero(logits >= bound)
