"""How long running answers wait for a token while a long prompt comes in, against the time of one piece of it.

Rounds alternate between the prompt alone (the time of each of its pieces) and the prompt beside running answers (the
time of each step, which is the gap between two tokens of every answer). The last line is JSON.

    scripts/bench_gap.py --buckets 1 6 --engine contexts fused
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from time import perf_counter
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from abcli.engine.make import Kind
from abcli.generate import Generator
from abcli.llm import load
from abcli.profiles.profile import NO_PROFILE
from abcli.sampling import GenerationConfig, SamplingConfig


def main() -> None:
    """Measure, print a table, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="GGUF file (default: the default model)")
    parser.add_argument("--engine", choices=("contexts", "fused"), nargs="+", default=["contexts", "fused"])
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--answers", type=int, default=4, help="answers that run meanwhile")
    parser.add_argument("--prompt", type=int, default=3000, help="tokens of the long prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    options = parser.parse_args()
    table = Table("engine", "buckets", "longest piece alone, s", "longest gap, s", "gap / piece")
    report = []
    for kind in options.engine:
        for buckets in options.buckets:
            found = measure(kind, buckets, options)
            report.append(found)
            table.add_row(kind, str(buckets), *(f"{found[key]:.3f}" for key in ("piece", "gap", "ratio")))
    Console(file=sys.stderr).print(table)
    sys.stdout.write(json.dumps(report) + "\n")


def measure(kind: Kind, buckets: int, options: argparse.Namespace) -> dict[str, Any]:
    """Medians over the rounds of the longest piece and the longest gap, in seconds."""
    pieces, gaps = [], []
    sizes = {"ctx_size": options.prompt + 128, "slots": options.answers + 1, "threads": options.threads}
    with load(options.model, buckets=buckets, engine=kind, profile=NO_PROFILE, **sizes) as llm:
        engine, generator = llm.engine, llm.generator
        tokens = np.random.default_rng(0).integers(0, llm.vocabulary_size, options.prompt).tolist()
        for _ in range(options.rounds):
            pieces.append(times_of_steps(generator, options.answers, tokens))
            engine.truncate(options.answers, 0)
            for slot in range(options.answers):
                generator.start(slot, tokens[slot * 30 : slot * 30 + 30], generation(100))
            for _ in range(4):
                generator.step()
            gaps.append(times_of_steps(generator, options.answers, tokens))
            for slot in range(options.answers + 1):
                generator.drop(slot)
                engine.truncate(slot, 0)
    piece, gap = (statistics.median(max(times) for times in rounds) for rounds in (pieces, gaps))
    ratio = statistics.median(max(gap) / max(piece) for piece, gap in zip(pieces, gaps, strict=True))
    return {"engine": kind, "buckets": buckets, "piece": piece, "gap": gap, "ratio": ratio, "steps": gaps}


def times_of_steps(generator: Generator, slot: int, tokens: list[int]) -> list[float]:
    """The seconds of each step from the prompt's coming to its first token."""
    times = []
    answer = generator.start(slot, tokens, generation(1))
    while answer.finish_reason is None:
        begin = perf_counter()
        generator.step()
        times.append(perf_counter() - begin)
    return times


def generation(new: int) -> GenerationConfig:
    """Greedy, and always `new` tokens."""
    return GenerationConfig(SamplingConfig(temperature=0.0), max_tokens=new, ignore_eos=True)


if __name__ == "__main__":
    main()
