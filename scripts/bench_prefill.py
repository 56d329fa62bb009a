"""Time to the first token: 1 bucket, N buckets with exact and with shared prefill, and from the disk cache.

All arrangements take the same prompts in turn, round after round, in changing order; ratios are medians of each
round's ratios to one bucket. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.table import Table

from abcli.config import BucketConfig, ContextConfig, ModelConfig, PrefillMode
from abcli.engine.engine import Engine
from abcli.engine.make import make_engine
from abcli.gguf.checked import check_model
from abcli.hub.locate import locate_model
from abcli.native.model import Model
from abcli.rope.bases import resolve_buckets


def main() -> None:
    """Measure, print a table, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="a text file to take the prompts from")
    parser.add_argument("--model", help="GGUF file (default: the default model)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096])
    parser.add_argument("--buckets", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--exact-rounds", type=int, default=2, help="rounds of the slow exact prefill")
    options = parser.parse_args()
    path = locate_model(options.model)
    with ExitStack() as stack:
        model = stack.enter_context(Model(check_model(ModelConfig(path))))
        tokens = model.tokenize(options.text.read_text(encoding="utf-8"), add_special=False, parse_special=False)
        size = max(options.lengths) + 256
        cache = Path(stack.enter_context(tempfile.TemporaryDirectory()))

        def engine(buckets: int, mode: PrefillMode, prompt_cache: Path | None = None) -> Engine:
            config = ContextConfig(context_size=size, prefill=mode, prompt_cache=prompt_cache)
            chosen = resolve_buckets(BucketConfig(count=buckets), model.native_base)
            return stack.enter_context(make_engine("contexts", model, config, chosen))

        one, exact, shared = engine(1, "exact"), engine(options.buckets, "exact"), engine(options.buckets, "shared")
        cached = engine(options.buckets, "shared", cache)
        arrangements: dict[str, Callable[[list[int]], float]] = {
            "1 bucket": lambda prompt: first_token(one, prompt),
            "exact": lambda prompt: first_token(exact, prompt),
            "shared": lambda prompt: first_token(shared, prompt),
            "disk cache": lambda prompt: first_token(cached, prompt),
        }
        seconds = {
            length: measure(arrangements, tokens[:length], options.rounds, options.exact_rounds)
            for length in options.lengths
        }
        name = f"{path.name}: {model.description}; {shared.sharing}"
    report(name, seconds, options)


def first_token(engine: Engine, prompt: list[int]) -> float:
    """Seconds from an empty slot to the logits after the prompt."""
    engine.truncate(0, 0)
    begin = time.perf_counter()
    engine.prefill(0, prompt)
    return time.perf_counter() - begin


def measure(
    arrangements: dict[str, Callable[[list[int]], float]], prompt: list[int], rounds: int, exact_rounds: int
) -> dict[str, list[float]]:
    """Seconds of each arrangement, one per round."""
    arrangements["disk cache"](prompt)  # fills the cache
    seconds: dict[str, list[float]] = {name: [] for name in arrangements}
    for number in range(rounds):
        # The order changes every round, so that none always follows the one that heats the machine.
        names = list(arrangements)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if name != "exact" or number < exact_rounds:
                seconds[name].append(arrangements[name](prompt))
        sys.stderr.write(f"\r{len(prompt)} tokens: round {number + 1}/{rounds}   ")
    return seconds


def report(name: str, seconds: dict[int, dict[str, list[float]]], options: argparse.Namespace) -> None:
    """The table and the JSON line."""
    sys.stderr.write("\n")
    table = Table(title=f"Time to first token, {name}; {options.buckets} buckets, {options.rounds} rounds")
    for column in ("tokens", "1 bucket, s", "exact", "shared", "disk cache"):
        table.add_column(column, justify="right")
    result: dict[str, object] = {"model": name, "buckets": options.buckets, "rounds": options.rounds}
    for length, found in seconds.items():
        ratios = {
            key: statistics.median(a / b for a, b in zip(values, found["1 bucket"], strict=False))
            for key, values in found.items()
        }
        medians = {key: round(statistics.median(values), 4) for key, values in found.items()}
        table.add_row(
            str(length),
            f"{medians['1 bucket']:.2f}",
            *(f"{medians[key]:.2f} ({ratios[key]:.2f}x)" for key in ("exact", "shared", "disk cache")),
        )
        result[str(length)] = {"seconds": medians, "ratios": {key: round(value, 4) for key, value in ratios.items()}}
    Console(width=110).print(table)
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
