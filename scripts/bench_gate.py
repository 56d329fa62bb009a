"""What a gate costs and saves in time: one bucket, six buckets, and six with a gate, side by side in one process.

All take turns at the same prompts, one after the other, greedily and with the same number of tokens. Printed are
medians of milliseconds per token after the first, ratios to one bucket within a turn, and how often all were asked.
With --task the prompts are questions of an evaluation task. With --cpu the time is that of one thread, which other
programs on the machine disturb little. With --slots they answer many prompts together instead, each in turn, and
printed are tokens per second of the whole time, prompts included.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.resources import files
from statistics import median
from time import perf_counter, process_time

import abcli
from abcli.config import ContextConfig, ModelConfig
from abcli.evals.model_under_test import Subject
from abcli.evals.runner import EvaluationSettings, make_questions
from abcli.gguf.checked import check_model
from abcli.hub.locate import locate_model

Contenders = dict[str, tuple[abcli.LLM, float | None]]

PROMPTS = (
    "Explain in a few sentences why the sky is blue.",
    "Write a short story about a lighthouse keeper and a storm.",
    "List the planets of the solar system in order, with one fact about each.",
    "Give me a recipe for bread.",
    "Write a Python function that returns the first n prime numbers, and explain it.",
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--gates", type=float, nargs="*", default=[0.5, 0.7, 0.9])
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--task", choices=["needle", "kv"], help="instead of free text, one answer after the other")
    parser.add_argument("--length", type=int, default=512, help="tokens of a task's prompt")
    parser.add_argument("--engine", choices=["fused", "contexts"], default="fused")
    parser.add_argument("--cpu", action="store_true", help="CPU time of one thread; one by one, prompts left out")
    parser.add_argument("--slots", type=int, default=1, help="answers at once")
    chosen = parser.parse_args()
    usual = {"profile": "none", "ctx_size": chosen.length + 512, "threads": int(chosen.cpu), "slots": chosen.slots}
    with ExitStack() as stack:
        one = stack.enter_context(abcli.load(chosen.model, buckets=1, **usual))
        six = stack.enter_context(abcli.load(chosen.model, engine=chosen.engine, **usual))
        gated = stack.enter_context(abcli.load(chosen.model, engine=chosen.engine, gate=0.5, **usual))
        contenders: Contenders = {"1 bucket": (one, None), "6 buckets": (six, None)}
        contenders |= {f"6, gate {gate:g}": (gated, gate) for gate in chosen.gates}
        print(f"{chosen.prompts} prompts, {chosen.tokens} tokens each, {chosen.engine}")
        if chosen.slots > 1:
            together(contenders, chosen)
        else:
            one_by_one(contenders, questions(chosen) if chosen.task else PROMPTS[: chosen.prompts], chosen)


def questions(chosen: argparse.Namespace) -> list[str]:
    """The prompts of the first questions of a task."""
    settings = EvaluationSettings(chosen.task, (chosen.length,), chosen.prompts)
    with Subject(check_model(ModelConfig(locate_model(chosen.model))), ContextConfig()) as subject:
        return [f"{question.context}\n\n{question.text}" for question in make_questions(settings, subject)]


def one_by_one(contenders: Contenders, prompts: Sequence[str], chosen: argparse.Namespace) -> None:
    """One answer after the other."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    asked: dict[str, list[float]] = {name: [] for name in contenders}
    for prompt in prompts:
        for name, (llm, gate) in contenders.items():
            settings = {"temp": 0, "ignore_eos": True, "gate": gate}
            llm.generate(prompt, max_tokens=1, **settings)
            begin = process_time()
            answer = llm.generate(prompt, max_tokens=chosen.tokens, **settings)
            seconds = process_time() - begin if chosen.cpu else answer.timings.decode
            times[name].append(1000 * seconds / (chosen.tokens - 1 + chosen.cpu))
            asked[name].append(answer.asked)
    first = times["1 bucket"]
    for name, found in times.items():
        ratios = [time / base for time, base in zip(found, first, strict=True)]
        share = sum(asked[name]) / len(asked[name])
        print(
            f"{name:14} {median(found):7.2f} ms/token  {median(ratios):5.2f}x  all asked for {share:.0%} of the tokens"
        )


def together(contenders: Contenders, chosen: argparse.Namespace) -> None:
    """All answers of a contender at once."""
    prompts = files("abcli.tune").joinpath("prompts.txt").read_text(encoding="utf-8").splitlines()[: chosen.prompts]
    speeds: dict[str, float] = {}
    clock = process_time if chosen.cpu else perf_counter
    for name, (llm, gate) in contenders.items():
        begin = clock()
        answers = llm.generate_many(prompts, max_tokens=chosen.tokens, temp=0, ignore_eos=True, gate=gate)
        speeds[name] = len(prompts) * chosen.tokens / (clock() - begin)
        share = sum(answer.asked for answer in answers) / len(answers)
        ratio = speeds[name] / speeds["6 buckets"] if "6 buckets" in speeds else float("nan")
        print(f"{name:14} {speeds[name]:7.1f} tokens/s  {ratio:5.2f}x six  all asked for {share:.0%} of the tokens")


if __name__ == "__main__":
    main()
