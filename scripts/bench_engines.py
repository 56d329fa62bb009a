"""Measures both engines against the raw limits of llama.cpp, side by side in one process.

For each model: one sequence alone; a raw batch of N sequences, without any callback; the fused engine; the engine of N
contexts. Every arrangement decodes a few tokens in turn, round after round, so that a slow moment of the machine meets
all of them; the figures are medians over the rounds, and the ratios are medians of each round's ratios.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from abcli.config import EngineConfig
from abcli.engine.contexts import ContextsEngine
from abcli.engine.fused import FusedEngine
from abcli.engine.protocol import Engine
from abcli.engine.workers import available_cores
from abcli.models.locate import locate_model
from abcli.native.context import BatchPart, Sequences, context_parameters
from abcli.native.library import CancelFlag, devices
from abcli.native.model import Model
from abcli.rope.bases import symmetric_multipliers


@dataclass
class Arrangement:
    """A way to decode; `advance()` decodes one token. Times are in seconds per token, one per round."""

    name: str
    advance: Callable[[], None]
    times: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds per token."""
        return statistics.median(self.times)


def raw(model: Model, config: EngineConfig, sequences: int, prompt: list[int], stack: ExitStack) -> Callable[[], None]:
    """One batch of `sequences` sequences per token: llama.cpp's own calls, one base, no callback."""
    cancel = CancelFlag()  # one and the same: the context keeps it, and llama.cpp reads it
    parameters = context_parameters(model, model.native_base, config, config.threads, cancel)
    parameters.n_ctx = config.context_size * sequences
    parameters.n_seq_max = parameters.n_outputs_max = sequences
    parameters.kv_unified = False
    context = stack.enter_context(Sequences(model, parameters, cancel))
    rows = np.empty((sequences, model.vocabulary_size), np.float32)
    length = 0

    def decode(tokens: list[int]) -> None:
        nonlocal length
        parts = [BatchPart(sequence, length, tokens, output=True) for sequence in range(sequences)]
        context.decode(parts, list(rows))
        length += len(tokens)

    size = max(1, context.ubatch_size // sequences)
    for start in range(0, len(prompt), size):
        decode(prompt[start : start + size])
    token = prompt[-1]

    def advance() -> None:
        nonlocal length
        if length == config.context_size:
            for sequence in range(sequences):
                context.truncate(sequence, len(prompt))
            length = len(prompt)
        decode([token])

    return advance


def ours(engine: Engine, prompt: list[int]) -> Callable[[], None]:
    """An engine's own steps."""
    engine.prefill(0, prompt)

    def advance() -> None:
        if len(engine.tokens(0)) == engine.context_size:
            engine.truncate(0, len(prompt))
        engine.step({0: prompt[-1]})

    return advance


def arrangements(model: Model, config: EngineConfig, prompt: list[int], stack: ExitStack) -> list[Arrangement]:
    """Everything that is measured, ready to decode."""
    buckets = len(config.bases)
    return [
        Arrangement("one sequence", raw(model, config, 1, prompt, stack)),
        Arrangement(f"raw batch of {buckets} sequences", raw(model, config, buckets, prompt, stack)),
        Arrangement(f"fused, {buckets} buckets", ours(stack.enter_context(FusedEngine(model, config)), prompt)),
        Arrangement(f"contexts, {buckets} buckets", ours(stack.enter_context(ContextsEngine(model, config)), prompt)),
    ]


def measure(found: list[Arrangement], rounds: int, tokens: int) -> None:
    """Decode `tokens` tokens with each arrangement in turn, `rounds` times; the order changes every round."""
    for arrangement in found:
        for _ in range(3):
            arrangement.advance()
    for number in range(rounds):
        for index in range(len(found)):
            arrangement = found[(index + number) % len(found)]
            begin = time.perf_counter()
            for _ in range(tokens):
                arrangement.advance()
            arrangement.times.append((time.perf_counter() - begin) / tokens)


def ratio(left: Arrangement, right: Arrangement) -> float:
    """Median over the rounds of left's time by right's."""
    return statistics.median(a / b for a, b in zip(left.times, right.times, strict=True))


def bench(path: Path, options: argparse.Namespace) -> dict[str, object]:
    """Measure one model, print its table and return its figures."""
    with Model(path, options.gpu_layers) as model, ExitStack() as stack:
        bases = tuple(float(np.float32(model.native_base * m)) for m in symmetric_multipliers(options.buckets))
        config = EngineConfig(
            path, bases, context_size=options.context, threads=options.threads, gpu_layers=options.gpu_layers
        )
        prompt = [100 + index % 150 for index in range(options.prompt)]
        found = arrangements(model, config, prompt, stack)
        measure(found, options.rounds, options.tokens)
        name = f"{path.name}: {model.description}"
    single, batch, fused, contexts = found
    title = f"{name}, {options.threads} threads, after {options.prompt} tokens, {options.rounds} rounds"
    table = Table(title=title)
    for column in ("arrangement", "ms/token", "tokens/s", "x one sequence", "x raw batch"):
        table.add_column(column, justify="left" if column == "arrangement" else "right")
    for arrangement in found:
        table.add_row(
            arrangement.name,
            f"{arrangement.median * 1e3:.2f}",
            f"{1 / arrangement.median:.1f}",
            f"{ratio(arrangement, single):.2f}",
            f"{ratio(arrangement, batch):.3f}",
        )
    Console(width=120).print(table)
    return {
        "model": name,
        "ms_per_token": {arrangement.name: round(arrangement.median * 1e3, 3) for arrangement in found},
        "fused_vs_raw_batch": round(ratio(fused, batch), 4),
        "fused_vs_one_sequence": round(ratio(fused, single), 4),
        "contexts_vs_one_sequence": round(ratio(contexts, single), 4),
        "fused_vs_contexts": round(ratio(fused, contexts), 4),
    }


def main() -> None:
    """Measure, print a table per model, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="GGUF files (default: the default model)")
    parser.add_argument("--buckets", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=12, help="tokens per arrangement and round")
    parser.add_argument("--prompt", type=int, default=64, help="tokens in the context before the first")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--gpu-layers", type=int, default=-1)
    options = parser.parse_args()
    figures = [bench(locate_model(name), options) for name in options.models or [None]]
    settings = {
        name: getattr(options, name) for name in ("buckets", "rounds", "tokens", "prompt", "context", "threads")
    }
    hardware = [f"{device.name}: {device.description}" for device in devices()]
    sys.stdout.write(json.dumps({"devices": hardware, **settings, "models": figures}) + "\n")


if __name__ == "__main__":
    main()
