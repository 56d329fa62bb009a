"""What a search for bases is worth: the deepest trough of the envelope of random sets of the same size.

Prints the 5 %, 50 % and 95 % quantiles over the sets, in percent of the wave's value at distance 0, beside both
searches; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys

import numpy as np

from abcli.gguf.check import check_file
from abcli.hub.locate import locate_model
from abcli.rope.frequencies import angular_frequencies
from abcli.rope.parameters import rope_parameters
from abcli.rope.search import candidate_multipliers, search_envelope, search_paper
from abcli.rope.waveform import envelope, value_at_zero, waveforms


def main() -> None:
    """Draw, search, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="GGUF file (default: the default model)")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--sets", type=int, default=1000)
    parser.add_argument("--buckets", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    header = check_file(locate_model(options.model))[0]
    parameters = rope_parameters(header, neox=False, context_size=options.length)
    multipliers = candidate_multipliers(0.5, 2.5, 201)
    native = int(np.argmin(np.abs(np.asarray(multipliers) - 1.0)))
    frequencies = np.stack([angular_frequencies(parameters, header.native_base * factor) for factor in multipliers])
    waves = waveforms(frequencies, options.length) * (100.0 / value_at_zero(frequencies.shape[1]))
    chance = np.random.default_rng(options.seed)
    others = np.array([index for index in range(len(multipliers)) if index != native])

    def floor(chosen: list[int]) -> float:
        return float(envelope(waves[chosen]).min())

    drawn = [floor([native, *chance.choice(others, options.buckets - 1, replace=False)]) for _ in range(options.sets)]
    result = {
        "length": options.length,
        "sets": options.sets,
        "random_5_50_95": [round(float(value), 1) for value in np.quantile(drawn, [0.05, 0.5, 0.95])],
        "random_best": round(max(drawn), 1),
        "paper": round(floor(list(search_paper(waves, native, options.buckets))), 1),
        "envelope": round(floor(list(search_envelope(waves, native, options.buckets))), 1),
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
