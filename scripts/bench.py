"""Measures whole answers, sampling included, against llama_cpp.Llama and ways of calling llama.cpp directly.

`abcli bench` measures the engines alone, their prompts and their memory. Every arrangement decodes a few tokens in
turn, round after round, so that a slow moment of the machine meets all of them; the figures are medians over the
rounds, and the ratios are medians of each round's ratios. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import llama_cpp
import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

from abcli.bench.rounds import Rounds, Spread, Turn, take_turns
from abcli.config import BucketConfig, Buckets, ContextConfig, ModelConfig
from abcli.engine.make import make_engine
from abcli.engine.workers import available_cores
from abcli.generate import Generator
from abcli.gguf.checked import check_model
from abcli.hub.locate import locate_model
from abcli.merge import Merger
from abcli.native.compute_thread import compute_thread, run_on_compute_thread
from abcli.native.context import BatchPart, Context
from abcli.native.llama import CancelFlag, echo_log
from abcli.native.model import Model
from abcli.native.sampler import SamplerChain
from abcli.rope.bases import resolve_buckets
from abcli.sampling import GenerationConfig, SamplingConfig

PROMPT = "The history of the lighthouse begins with fires that were lit on hills. "
CONTEXT = 1024


@dataclass(frozen=True)
class Arrangement:
    """A way to decode; `advance(n)` decodes n tokens."""

    name: str
    advance: Callable[[int], None]


class RawContexts:
    """llama.cpp calls alone: N contexts, W of them at a time with T threads each, no merging or sampling."""

    def __init__(
        self, model: Model, config: ContextConfig, buckets: Buckets, workers: int, threads: int, stack: ExitStack
    ) -> None:
        cancel = CancelFlag()
        self._contexts = [
            stack.enter_context(Context(model, base, config, config.context_size, threads, cancel))
            for base in buckets.bases
        ]
        self._pool = compute_thread() if workers == 1 else stack.enter_context(ThreadPoolExecutor(workers))
        self._tokens = model.tokenize(PROMPT, add_special=True, parse_special=False)
        self._row = [np.empty(model.vocabulary_size, np.float32) for _ in buckets.bases]
        self._length = 0

    def _everywhere(self, tokens: list[int]) -> None:
        part = BatchPart(0, self._length, tokens, output=True)
        jobs = zip(self._contexts, self._row, strict=True)
        list(self._pool.map(lambda job: job[0].decode([part], [job[1]]), jobs))
        self._length += len(tokens)

    def advance(self, count: int) -> None:
        """Decode `count` tokens after a prompt that is decoded once."""
        if not self._length or self._length + count > CONTEXT:
            for context in self._contexts:
                context.truncate(0, 0)
            self._length = 0
            self._everywhere(self._tokens)
        for index in range(count):
            self._everywhere([self._tokens[index % len(self._tokens)]])


def ours(model: Model, config: ContextConfig, buckets: Buckets, stack: ExitStack) -> Callable[[int], None]:
    """abcli's own loop: engine, merge, sampler, text."""
    engine = stack.enter_context(make_engine("contexts", model, config, buckets))
    generator = stack.enter_context(Generator(engine, model, partial(SamplerChain, model)))
    tokens = model.tokenize(PROMPT, add_special=True, parse_special=False)
    settings = GenerationConfig(SamplingConfig(seed=1), ignore_eos=True)

    def pieces() -> Iterator[None]:
        while True:
            for _piece in generator.stream(0, tokens, settings):
                yield

    return _drawing(pieces())


def high_level(path: Path, threads: int, stack: ExitStack) -> Callable[[int], None]:
    """llama_cpp.Llama's own loop, with the same sampler settings."""
    model = llama_cpp.Llama(str(path), n_ctx=CONTEXT, n_threads=threads, n_threads_batch=threads, verbose=False)
    stack.callback(model.close)
    tokens = model.tokenize(PROMPT.encode())

    def pieces() -> Iterator[None]:
        while True:
            for _chunk in zip(model.generate(tokens, temp=0.8, top_k=40, top_p=0.95, min_p=0.05), range(900)):  # noqa: B905
                yield

    advance = _drawing(pieces())
    return lambda count: run_on_compute_thread(lambda: advance(count))


def _drawing(pieces: Iterator[None]) -> Callable[[int], None]:
    def advance(count: int) -> None:
        for _ in range(count):
            next(pieces)

    return advance


def arrangements(model: Model, buckets: int, threads: int, stack: ExitStack) -> list[Arrangement]:
    """Everything that is measured, ready to decode."""
    config = ContextConfig(context_size=CONTEXT, threads=threads)
    one, many = (resolve_buckets(BucketConfig(count=count), model.native_base) for count in (1, buckets))
    found = [
        Arrangement("raw, 1 context", RawContexts(model, config, one, 1, threads, stack).advance),
        Arrangement("llama_cpp.Llama", high_level(model.path, threads, stack)),
        Arrangement("abcli, 1 bucket", ours(model, config, one, stack)),
    ]
    for workers in sorted({1, 2, threads} & set(range(1, min(buckets, threads) + 1))):
        each = max(1, threads // workers)
        name = f"raw, {buckets} contexts, {workers} at a time, {each} threads each"
        raw = RawContexts(model, config, many, workers, each, stack)
        found.append(Arrangement(name, raw.advance))
    found.append(Arrangement(f"abcli, {buckets} buckets", ours(model, config, many, stack)))
    return found


def measure(found: list[Arrangement], rounds: int, tokens: int) -> Rounds[str]:
    """Decode `tokens` tokens with each arrangement in turn, `rounds` times, after as many to warm up."""
    for arrangement in found:
        arrangement.advance(tokens)
    times: Rounds[str] = Rounds()
    take_turns({each.name: Turn(partial(each.advance, tokens), tokens) for each in found}, rounds, times)
    return times


def merging(model: Model, buckets: int, vocabulary: int) -> float:
    """Median seconds of one merge and one default sampling, on random logits shaped like a model's."""
    random = np.random.default_rng(0)
    logits = random.normal(0, 3, (buckets, vocabulary)).astype(np.float32)
    logits[:, random.integers(0, vocabulary, 20)] += 12
    merger = Merger(buckets, vocabulary)

    @dataclass
    class Shape:
        vocabulary: object
        vocabulary_size: int
        trained_context: int

    shape = Shape(model.vocabulary, vocabulary, model.trained_context)
    with SamplerChain(shape, SamplingConfig(seed=1)) as sampler:  # type: ignore[arg-type]
        times = []
        for _ in range(100):
            begin = time.perf_counter()
            sampler.sample(merger.merge(logits, "confidence").logits)
            times.append(time.perf_counter() - begin)
    return statistics.median(times)


def memory(path: Path, buckets: int) -> dict[str, float]:
    """Megabytes of a fresh process with a model and `buckets` contexts, and what llama.cpp says its buffers take."""
    command = [sys.executable, __file__, str(path), "--buckets", str(buckets), "--memory-only"]
    answer = subprocess.run(command, capture_output=True, check=True, text=True)
    return dict(json.loads(answer.stdout))


def measure_memory(path: Path, buckets: int) -> dict[str, float]:
    """The figures of `memory`, for this process."""
    process = psutil.Process()
    with Model(check_model(ModelConfig(path))) as model:
        config = ContextConfig(context_size=CONTEXT, prefill="exact")
        lines: list[str] = []
        echo_log(lines.append)
        with make_engine(
            "contexts", model, config, resolve_buckets(BucketConfig(count=buckets), model.native_base)
        ) as engine:
            engine.prefill(0, [index % 1000 for index in range(CONTEXT - 2)])
            engine.step({0: 1})
            sizes = re.findall(r"(?:KV|compute|output) +buffer size *(?:=|is) +([0-9.]+) MiB", "".join(lines))
            return {
                "resident_mb": process.memory_info().rss / 1e6,
                "buffers_mb": sum(float(size) for size in sizes) * 1.048576,
            }


def main() -> None:
    """Measure, print a table, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="GGUF file (default: the default model)")
    parser.add_argument("--buckets", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tokens", type=int, default=16, help="tokens per arrangement and round")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    path = locate_model(options.model)
    if options.memory_only:
        sys.stdout.write(json.dumps(measure_memory(path, options.buckets)))
        return
    used = {count: memory(path, count) for count in (1, options.buckets)}
    with Model(check_model(ModelConfig(path))) as model, ExitStack() as stack:
        found = arrangements(model, options.buckets, options.threads, stack)
        times = measure(found, options.rounds, options.tokens)
        merge_time = merging(model, options.buckets, model.vocabulary_size)
        large_merge_time = merging(model, options.buckets, 262_144)
        name = f"{path.name}: {model.description}"
    report(name, [each.name for each in found], times, merge_time, large_merge_time, used, options)


def report(
    name: str,
    names: list[str],
    times: Rounds[str],
    merge_time: float,
    large_merge_time: float,
    used: dict[int, dict[str, float]],
    options: argparse.Namespace,
) -> None:
    """The table and the JSON line."""
    medians = {each: Spread.of(times.seconds(each)).median for each in names}

    def ratio(left: str, right: str) -> float:
        return Spread.of(times.ratios(left, right)).median

    single, llama, one = names[:3]
    many = names[-1]
    raw = min(names[3:-1], key=lambda each: medians[each])
    table = Table(title=f"{name}, {options.threads} threads, {options.rounds} rounds of {options.tokens} tokens")
    for column in ("arrangement", "ms/token", "tokens/s", "x raw 1 context"):
        table.add_column(column, justify="left" if column == "arrangement" else "right")
    for each, seconds in medians.items():
        table.add_row(each, f"{seconds * 1e3:.2f}", f"{1 / seconds:.1f}", f"{ratio(each, single):.2f}")
    Console(width=110).print(table)
    few, all_of_them = used[1], used[options.buckets]
    resident, buffers = (all_of_them[key] - few[key] for key in ("resident_mb", "buffers_mb"))
    Console(width=110).print(
        f"resident memory: {few['resident_mb']:.0f} MB with 1 bucket, {all_of_them['resident_mb']:.0f} MB with "
        f"{options.buckets}: {resident:.0f} MB more, of which caches and buffers of llama.cpp are {buffers:.0f} MB"
    )
    result = {
        "model": name,
        "threads": options.threads,
        "rounds": options.rounds,
        "tokens_per_round": options.tokens,
        "ms_per_token": {each: round(seconds * 1e3, 3) for each, seconds in medians.items()},
        "one_bucket_vs_llama_cpp_Llama": round(ratio(one, llama), 4),
        "one_bucket_vs_raw": round(ratio(one, single), 4),
        "buckets_vs_best_raw": round(ratio(many, raw), 4),
        "best_raw": raw,
        "merge_and_sample_ms": round(merge_time * 1e3, 3),
        "merge_and_sample_share_of_step": round(merge_time / medians[many], 4),
        "merge_and_sample_262k_ms": round(large_merge_time * 1e3, 3),
        "memory_mb": {
            str(count): {key: round(value, 1) for key, value in figures.items()} for count, figures in used.items()
        },
    }
    sys.stdout.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
