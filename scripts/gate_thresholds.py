"""What a gate costs in quality: where is the native bucket sure enough to decide alone, and how is that best told?

The questions of an evaluation task are answered with the default spread, token by token along the right answer. For
each measure and threshold are printed: how often all buckets are asked, and the paired differences of loss (nats per
token) and exact answers to asking always, with standard errors over contexts; then one line of JSON. The others' cells
are those of having computed the answer so far, where a gate would let them take over the native bucket's.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from abcli.calibrate.gates import GATES, Measure, probability, steps_of, try_gate
from abcli.config import BucketConfig, ContextConfig, ModelConfig, evaluations_directory
from abcli.evals.configurations import Configuration
from abcli.evals.model_under_test import Subject
from abcli.evals.runner import TASKS, EvaluationSettings, make_questions
from abcli.gguf.checked import check_model
from abcli.rope.bases import choose_bases


def margin(row: NDArray[np.float32], _entropy: float) -> float:
    """By how much the likeliest token is more likely than the next."""
    second, first = np.exp(np.partition(row, -2)[-2:])
    return float(first - second)


MEASURES: dict[str, Measure] = {
    "probability": probability,
    "margin": margin,
    "exp(-entropy)": lambda _row, entropy: float(np.exp(-entropy)),
}


def main() -> None:
    """Ask the model, or read what it has answered before, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--task", choices=sorted(TASKS), default="needle")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--answers", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--scores", type=Path, default=evaluations_directory(), help="where results are stored")
    chosen = parser.parse_args()
    settings = EvaluationSettings(
        chosen.task, (chosen.length,), chosen.limit, chosen.seed, 5, chosen.data, chosen.answers
    )
    config = ContextConfig(threads=chosen.threads)
    with Subject(check_model(ModelConfig(chosen.model)), config, scores=chosen.scores) as subject:
        questions = make_questions(settings, subject)
        bases = choose_bases(BucketConfig(), subject.native_base)
        tokenized = [subject.prompts.tokenize(question) for question in questions]
        traces = subject.trace(
            [replace(question, continuations=question.continuations[:1]) for question in tokenized],
            bases,
            subject.prefill("auto", None),
            lambda done, total: print(f"\r{done}/{total}", end="", file=sys.stderr) if done % 10 == 0 else None,
        )
        native = subject.native_base
        found = {
            name: steps_of(traces, Configuration("spread", bases), native, measure)
            for name, measure in MEASURES.items()
        }
    groups = np.unique([question.group for question in questions], return_inverse=True)[1]
    tokens = len(found["probability"].question)
    print(
        f"\n{chosen.task} {chosen.length}: {len(questions)} questions on {groups.max() + 1} contexts, {tokens} tokens"
    )
    report = [("never asked", replace(try_gate(found["probability"], groups, -1.0), gate=0.0))]
    for name, steps in found.items():
        report += [(name, try_gate(steps, groups, gate)) for gate in GATES]
    for name, one in report:
        print(
            f"{name:14} {one.gate:4}  asked {one.asked:5.1%}  NLL {one.difference:+.4f} +- {one.error:.4f}"
            f"  exact {one.exact:+.4f} +- {one.exact_error:.4f}"
        )
    gates = [(name, asdict(one)) for name, one in report]
    print(json.dumps({"task": chosen.task, "length": chosen.length, "gates": gates}))


if __name__ == "__main__":
    main()
