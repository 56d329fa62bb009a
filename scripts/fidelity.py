"""How far a shared prefill is from an exact one: KL divergence of each bucket's next-token distribution.

Beside it stand the noise floor (the exact prefill again, with the last token computed in a piece of its own, as a
shared prefill computes it) and the distance between the bases themselves (KL from the native base's distribution).
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from abcli.config import BucketConfig, ContextConfig, ModelConfig
from abcli.engine.engine import Engine
from abcli.engine.make import make_engine
from abcli.gguf.checked import check_model
from abcli.hub.locate import locate_model
from abcli.native.model import Model
from abcli.rope.bases import resolve_buckets, symmetric_multipliers

Logs = NDArray[np.float64]


def log_softmax(logits: NDArray[np.float32]) -> Logs:
    """Log-probabilities, float64, of logits [buckets, vocabulary]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def divergence(left: Logs, right: Logs) -> NDArray[np.float64]:
    """KL(left || right) of each bucket in nats."""
    return np.asarray((np.exp(left) * (left - right)).sum(axis=1))


def compare(exact: Engine, shared: Engine, prompt: list[int], native: int) -> dict[str, NDArray[np.float64]]:
    """The three divergences of one prompt, each [buckets]."""
    for engine in (exact, shared):
        engine.truncate(0, 0)
    reference = log_softmax(exact.prefill(0, prompt))
    exact.truncate(0, 0)
    exact.prefill(0, prompt[:-1])
    again = log_softmax(exact.prefill(0, prompt[-1:]))
    ours = log_softmax(shared.prefill(0, prompt))
    return {
        "shared": divergence(reference, ours),
        "noise": divergence(reference, again),
        "bases": divergence(reference[[native] * len(reference)], reference),
    }


def main() -> None:
    """Measure, print a table, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, nargs="+", help="text files to cut prompts from")
    parser.add_argument("--model", help="GGUF file (default: the default model)")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--shortest", type=int, default=200)
    parser.add_argument("--longest", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    path = locate_model(options.model)
    text = "\n".join(file.read_text(encoding="utf-8") for file in options.text)
    chance = random.Random(options.seed)
    collected: dict[str, list[NDArray[np.float64]]] = {"shared": [], "noise": [], "bases": []}
    with Model(check_model(ModelConfig(path))) as model:
        buckets = resolve_buckets(BucketConfig(count=6), model.native_base)
        middle = buckets.bases.index(buckets.prefill_base)
        exact_config = ContextConfig(context_size=options.longest + 8, prefill="exact")
        shared_config = replace(exact_config, prefill="shared")
        tokens = model.tokenize(text, add_special=False, parse_special=False)
        lengths = np.geomspace(options.shortest, options.longest, options.prompts).astype(int)
        with (
            make_engine("contexts", model, exact_config, buckets) as exact,
            make_engine("contexts", model, shared_config, buckets) as shared,
        ):
            note = str(shared.sharing)
            for number, length in enumerate(lengths):
                start = chance.randrange(0, len(tokens) - int(length))
                found = compare(exact, shared, tokens[start : start + int(length)], middle)
                for name, values in found.items():
                    collected[name].append(values)
                sys.stderr.write(f"\r{number + 1}/{len(lengths)}")
        name = f"{path.name}: {model.description}; {note}"
    sys.stderr.write("\n")
    table = Table(title=f"{name}; {options.prompts} prompts, {options.shortest} to {options.longest} tokens")
    for column in ("base multiplier", "KL(exact || shared)", "noise floor", "KL(native || this base)"):
        table.add_column(column, justify="right")
    report: dict[str, object] = {"model": name, "prompts": options.prompts, "seed": options.seed}
    stacked = {key: np.array(values) for key, values in collected.items()}
    for bucket, factor in enumerate(symmetric_multipliers(6)):
        table.add_row(f"{factor:.2f}", *(_mean(stacked[key][:, bucket]) for key in ("shared", "noise", "bases")))
    table.add_row("all", *(_mean(stacked[key].ravel()) for key in ("shared", "noise", "bases")))
    Console(width=120).print(table)
    for key, values in stacked.items():
        report[key] = {"mean": values.mean(axis=0).round(6).tolist(), "max": values.max(axis=0).round(6).tolist()}
    sys.stdout.write(json.dumps(report) + "\n")


def _mean(values: NDArray[np.float64]) -> str:
    """Mean and standard error."""
    return f"{values.mean():.5f} +- {values.std(ddof=1) / np.sqrt(len(values)):.5f}"


if __name__ == "__main__":
    main()
