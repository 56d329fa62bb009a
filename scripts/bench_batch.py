"""Throughput of batches: many slots against one, against `llama_cpp.Llama`, and questions on one document.

Prompts: the arrangements answer the same prompts in turn, round after round, in changing order; a speed is new
tokens per second of the whole time, prompts included. `llama_cpp.Llama` is driven through its `generate`, which
is the fastest way it has. Document: the time of all questions against one prefill of the document plus the bare
decoding of the new tokens; the questions' own tokens are measured beside it. The last line is JSON.

    scripts/bench_batch.py --model SmolLM2-135M-Instruct.Q8_0.gguf

measures what docs/batch.md says: 64 prompts with 1 and 6 buckets and 50 questions, for about a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

from llama_cpp import Llama
from rich.console import Console
from rich.table import Table

from abcli.batch.jobs import Job
from abcli.batch.scheduler import Scheduler, StopSwitch
from abcli.batch.slots import plan_slots, reuse_rule
from abcli.config import BucketConfig, ContextConfig, ModelConfig
from abcli.engine.workers import available_cores
from abcli.hub.locate import locate_model
from abcli.llm import LLM
from abcli.native.compute_thread import run_on_compute_thread
from abcli.prepare import prepare
from abcli.reuse import ReuseRule
from abcli.sampling import GenerationConfig, SamplingConfig

REPOSITORY = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Work:
    """A model with its slots, and how prompts may share their beginnings."""

    llm: LLM
    reuse: ReuseRule


def main() -> None:
    """Measure, print tables, print JSON."""
    options = parse_options()
    path = locate_model(options.model)
    report: dict[str, Any] = {"model": path.name, "cores": available_cores(), "prompts": [], "document": None}
    console = Console(file=sys.stderr)
    for buckets in options.buckets:
        seconds = measure_prompts(path, buckets, options)
        new = options.prompts * options.new
        slowest = max(statistics.median(values) for values in seconds.values())
        table = Table(
            *("arrangement", "seconds", "new tokens/s", "times the slowest"),
            title=f"{options.prompts} prompts, {'1 bucket' if buckets == 1 else f'{buckets} buckets'}",
        )
        for name, values in seconds.items():
            median = statistics.median(values)
            table.add_row(name, f"{median:.2f}", f"{new / median:.1f}", f"{slowest / median:.2f}")
            report["prompts"].append({"buckets": buckets, "arrangement": name, "seconds": values})
        console.print(table)
    if options.questions:
        found = measure_document(path, options)
        report["document_ratio"] = document_ratio(found)
        table = Table("part", "seconds", title=f"{options.questions} questions on {options.document} tokens")
        for name, values in found.items():
            table.add_row(name, f"{statistics.median(values):.3f}")
        table.add_row("all / (one prefill + bare decoding)", f"{report['document_ratio']:.3f}")
        console.print(table)
        report["document"] = found
    sys.stdout.write(json.dumps(report) + "\n")


def parse_options() -> argparse.Namespace:
    """The sizes of everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="GGUF file (default: the default model)")
    parser.add_argument("--text", type=Path, nargs="+", help="text files to take prompts from (default: docs/*.md)")
    parser.add_argument("--slots", type=int, nargs="+", help="slots to measure (default: what --slots auto takes)")
    parser.add_argument("--engine", choices=("auto", "contexts", "fused"), default="auto")
    parser.add_argument("--buckets", type=int, nargs="*", default=[1, 6])
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--shortest", type=int, default=200)
    parser.add_argument("--longest", type=int, default=400)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--questions", type=int, default=50, help="questions on the document; 0 leaves this out")
    parser.add_argument("--document", type=int, default=2000, help="tokens of the document")
    parser.add_argument("--question", type=int, default=16, help="tokens of a question")
    parser.add_argument("--document-buckets", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0, help="0: one per core")
    return parser.parse_args()


def measure_prompts(path: Path, buckets: int, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every round of every arrangement for prompts that share nothing."""
    size = options.longest + options.new
    with ExitStack() as stack:
        one = open_work(stack, path, buckets, 1, size, options.prompts, options)
        tokens = source_tokens(one.llm, options.text)
        chance = random.Random(1)
        prompts = []
        for _ in range(options.prompts):
            length = chance.randint(options.shortest, options.longest)
            start = chance.randrange(len(tokens) - length)
            prompts.append(tokens[start : start + length])
        arrangements: dict[str, Callable[[], float | None]] = {
            f"one after the other, {one.llm.engine_choice.kind}": lambda: answer_in_turn(one, prompts, options.new)
        }
        for slots in options.slots or [None]:
            work = open_work(stack, path, buckets, slots, size, options.prompts, options)
            name = f"batch, {work.llm.engine.slots} slots, {work.llm.engine_choice.kind}"
            arrangements[name] = partial(answer_batch, work, prompts, options.new)
        if buckets == 1:
            cores = options.threads or available_cores()
            llama = Llama(str(path), n_ctx=size, n_threads=cores, n_threads_batch=cores, verbose=False)
            stack.callback(llama.close)
            arrangements["llama_cpp.Llama"] = lambda: run_on_compute_thread(
                lambda: answer_with_llama(llama, prompts, options.new)
            )
        return rounds(arrangements, options.rounds)


def measure_document(path: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every round: all questions, one prefill of the document, bare decoding, the questions' tokens."""
    with ExitStack() as stack:
        size = options.document + options.question + options.new
        slots = options.slots[-1] if options.slots else None
        work = open_work(stack, path, options.document_buckets, slots, size, options.questions, options)
        tokens = source_tokens(work.llm, options.text)
        document = (tokens * (options.document // len(tokens) + 1))[: options.document]
        chance = random.Random(2)
        questions = [chance.sample(tokens, options.question) for _ in range(options.questions)]
        prompts = [[*document, *question] for question in questions]
        return rounds(
            {
                "all questions": lambda: answer_batch(work, prompts, options.new),
                "one prefill": lambda: prefill_once(work, document),
                "bare decoding": lambda: decode_bare(work, prompts[0], options.questions, options.new),
                "questions' tokens": lambda: prefill_questions(work, document, questions),
            },
            options.rounds,
        )


def document_ratio(found: dict[str, list[float]]) -> float:
    """The median over the rounds of all questions' time against one prefill and the bare decoding."""
    parts = zip(found["all questions"], found["one prefill"], found["bare decoding"], strict=True)
    return statistics.median(everything / (prefill + decoding) for everything, prefill, decoding in parts)


def rounds(arrangements: dict[str, Callable[[], float | None]], count: int) -> dict[str, list[float]]:
    """Call every arrangement `count` times, the order changing; its seconds, by its own clock if it has one."""
    seconds: dict[str, list[float]] = {name: [] for name in arrangements}
    names = list(arrangements)
    for index in range(count):
        for name in names[index % len(names) :] + names[: index % len(names)]:
            begin = perf_counter()
            own = arrangements[name]()
            seconds[name].append(perf_counter() - begin if own is None else own)
    return seconds


def open_work(
    stack: ExitStack, path: Path, buckets: int, slots: int | None, size: int, answers: int, options: argparse.Namespace
) -> Work:
    """A model of its own with `slots` slots of `size` tokens, None for as many as --slots auto takes."""
    context = ContextConfig(context_size=size, threads=options.threads, engine=options.engine)
    found = prepare(ModelConfig(path), context, BucketConfig(count=buckets))
    planned = replace(found.context, slots=plan_slots(slots, found, answers).slots)
    llm = stack.enter_context(LLM(replace(found, context=planned)))
    return Work(llm, reuse_rule(llm))


def source_tokens(llm: LLM, texts: Sequence[Path] | None) -> list[int]:
    """The tokens of the texts, one after another."""
    paths = texts or sorted((REPOSITORY / "docs").glob("*.md"))
    text = "\n".join(path.read_text(encoding="utf-8") for path in paths)
    return llm.tokenize(text, add_special=False, parse_special=False)


def generation(new: int) -> GenerationConfig:
    """Greedy, and always `new` tokens."""
    return GenerationConfig(SamplingConfig(temperature=0.0), max_tokens=new, ignore_eos=True)


def empty(work: Work) -> None:
    """Forget what earlier rounds have left."""
    for slot in range(work.llm.engine.slots):
        work.llm.engine.truncate(slot, 0)


def answer_batch(work: Work, prompts: Sequence[list[int]], new: int) -> None:
    """All prompts through the scheduler."""
    empty(work)
    jobs = [Job(index, index + 1, str(index), (), generation(new)) for index in range(len(prompts))]
    switch = StopSwitch(work.llm.generator.cancel)
    engine = work.llm.engine
    scheduler = Scheduler(jobs, engine, work.llm.generator, lambda job: prompts[job.index], switch, reuse=work.reuse)
    results = list(scheduler.results())
    if len(results) != len(prompts) or any(result.completion_tokens != new for result in results):
        raise SystemExit("a prompt has no full answer")


def answer_in_turn(work: Work, prompts: Sequence[list[int]], new: int) -> None:
    """One prompt after the other, as `abcli run` answers one."""
    for prompt in prompts:
        work.llm.engine.truncate(0, 0)
        for _ in work.llm.generator.stream(0, prompt, generation(new)):
            pass


def answer_with_llama(llama: Llama, prompts: Sequence[list[int]], new: int) -> None:
    """One prompt after the other through llama-cpp-python's own class."""
    for prompt in prompts:
        llama.reset()
        llama.detokenize(list(islice(llama.generate(prompt, temp=0.0), new)))


def prefill_once(work: Work, document: list[int]) -> None:
    """The document alone."""
    work.llm.engine.truncate(0, 0)
    work.llm.engine.prefill(0, document)


def decode_bare(work: Work, prompt: list[int], questions: int, new: int) -> float:
    """As many tokens as the answers to all questions have, in full slots; merging and sampling left out."""
    engine = work.llm.engine
    empty(work)
    engine.prefill(0, prompt)
    for slot in range(1, engine.slots):
        engine.copy(0, slot)
    held = len(prompt)
    begin = perf_counter()
    left = questions
    while left > 0:
        slots = range(min(left, engine.slots))
        # The first token of an answer comes with the prefill.
        for _ in range(new - 1):
            engine.step(dict.fromkeys(slots, prompt[0]))
        for slot in slots:
            engine.truncate(slot, held)
        left -= len(slots)
    return perf_counter() - begin


def prefill_questions(work: Work, document: list[int], questions: Sequence[list[int]]) -> float:
    """What is computed of each prompt when the document is there, up to the first new token."""
    engine = work.llm.engine
    engine.truncate(0, 0)
    engine.prefill(0, [*document, *questions[0]])
    begin = perf_counter()
    for before, question in pairwise(questions):
        prompt = [*document, *question]
        kept = engine.truncate(0, work.reuse.usable([*document, *before], prompt))
        engine.prefill(0, prompt[kept:])
    # The first question came with the document.
    return (perf_counter() - begin) * len(questions) / max(1, len(questions) - 1)


if __name__ == "__main__":
    main()
