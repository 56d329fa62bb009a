"""Predicted against measured memory of set-ups: llama.cpp's own buffer sizes, and what the process has resident.

    python scripts/measure_memory.py MODEL... [--buckets 1,6] [--contexts 512,4096] [--cache-types f16,q8_0]
        [--slots 1] [--prefill exact] [--fused] [--lora FILE]...

Each set-up runs in a process of its own, which reads 600 tokens in each slot and decodes two. Prints a table and, as
the last line, the same as JSON. Weights that llama.cpp repacks are in memory twice, as its copy and as pages of the
file that the system can drop; `resident` counts them once. With adapters llama.cpp plans its compute buffers anew at
the first batch; where that comes before the prompt (--fused, --prefill shared), its log has them twice.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import psutil

from abcli.config import BucketConfig, ContextConfig, LoraConfig, ModelConfig
from abcli.engine.make import Kind, make_engine
from abcli.engine.memory import predict
from abcli.gguf.checked import check_model
from abcli.native.llama import echo_log
from abcli.native.model import Model
from abcli.rope.bases import resolve_buckets

MEBIBYTE = 2**20
PROMPT_TOKENS = 600
# What llama.cpp logs -> the part of the prediction it belongs to.
BUFFERS = {
    "model": "weights",
    "LoRA": "adapters",
    "KV": "caches",
    "RS": "caches",
    "compute": "compute",
    "output": "outputs",
}
PARTS = ("weights", "adapters", "caches", "compute", "outputs")


def main() -> None:
    """Measure every combination and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--buckets", default="1,6")
    parser.add_argument("--contexts", default="512,4096")
    parser.add_argument("--cache-types", default="f16")
    parser.add_argument("--prefill", default="exact", help="exact, where every buffer is used to the full, or shared")
    parser.add_argument("--slots", type=int, default=1, help="prompts at the same time")
    parser.add_argument("--fused", action="store_true", help="the engine of one context")
    parser.add_argument("--lora", action="append", default=[], type=Path, metavar="FILE", help="adapter; repeatable")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    buckets, contexts = ([int(word) for word in text.split(",")] for text in (arguments.buckets, arguments.contexts))
    if arguments.child:
        print(json.dumps(measure(arguments.models[0], buckets[0], contexts[0], arguments)))
        return
    results = []
    print(f"{'model':34} {'buckets':>7} {'context':>7} {'cache':>5}  predicted / measured MiB, and their ratio")
    for model, count, context, cache in product(arguments.models, buckets, contexts, arguments.cache_types.split(",")):
        command = [sys.executable, __file__, str(model), "--child", "--buckets", str(count)]
        command += ["--contexts", str(context), "--cache-types", cache, "--prefill", arguments.prefill]
        command += ["--slots", str(arguments.slots)]
        command += [*(["--fused"] if arguments.fused else []), *(f"--lora={lora}" for lora in arguments.lora)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{model.name:34} {count:>7} {context:>7} {cache:>5}  failed: {done.stderr.strip()[-200:]}")
            continue
        results.append(json.loads(done.stdout.splitlines()[-1]))
        print(_line(results[-1]), flush=True)
    print(json.dumps(results))


def measure(path: Path, buckets: int, context: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Bytes predicted and measured of one set-up; run it in a fresh process."""
    process = psutil.Process()
    cache, fused = arguments.cache_types, arguments.fused
    checked = check_model(ModelConfig(path, lora=tuple(LoraConfig(lora) for lora in arguments.lora)))
    log: list[str] = []
    echo_log(log.append)
    before = _memory(process)
    chosen = resolve_buckets(BucketConfig(count=buckets), checked.header.native_base)
    config = ContextConfig(context_size=context, cache_type_k=cache, cache_type_v=cache)
    config = replace(config, slots=arguments.slots, prefill=arguments.prefill, engine="fused" if fused else "contexts")
    prediction = predict(checked, config, chosen)
    kind: Kind = "fused" if fused else "contexts"
    with Model(checked) as model, make_engine(kind, model, config, chosen) as engine:
        # A context that tried something out and went says so in the log; its buffers are none of the set-up's.
        loaded = _logged("".join(log), prediction.contexts)
        count = min(PROMPT_TOKENS, context - 2)
        # Different tokens: the embeddings are read row by row.
        for slot in range(config.slots):
            engine.prefill(slot, [(slot + token * 37) % model.vocabulary_size for token in range(count)])
        for token in range(2):
            engine.step(dict.fromkeys(range(config.slots), token))
        after = _memory(process)
    # Pages of the file that were read to be repacked are not needed any more.
    resident = after[0] - before[0] + max(0, after[1] - before[1] - loaded["copied"])
    predicted = {item.name: item.total for item in prediction.items}
    return {
        "model": path.name,
        "buckets": buckets,
        "context": context,
        "cache": cache,
        "slots": config.slots,
        "prefill": arguments.prefill,
        "fused": fused,
        "predicted": predicted,
        "predicted_total": prediction.resident,
        "logged": loaded,
        "resident": resident,
        "anonymous": after[0] - before[0],
        "file_pages": after[1] - before[1],
    }


def _memory(process: psutil.Process) -> tuple[int, int]:
    """Bytes of the process in memory: its own, and pages of files."""
    used = process.memory_info()
    return used.rss - used.shared, used.shared


def _logged(log: str, contexts: int) -> dict[str, int]:
    """Bytes of llama.cpp's buffers as its log gives them, for as many contexts as there are in the end."""
    found: dict[str, list[float]] = {name: [] for name in PARTS}
    copied = 0.0
    for device, kind, size in re.findall(r"(\S+) +(\w+) buffer size = +([\d.]+) MiB", log):
        if kind in BUFFERS:
            found[BUFFERS[kind]].append(float(size))
        if kind == "model" and not device.endswith("_Mapped"):
            copied += float(size)
    totals = {name: sum(sizes) for name, sizes in found.items()}
    made = len(found["outputs"])
    for name in ("caches", "compute", "outputs"):
        totals[name] = sum(found[name][: len(found[name]) * contexts // max(1, made)])
    return {name: round(size * MEBIBYTE) for name, size in (*totals.items(), ("copied", copied))}


def _line(result: dict[str, Any]) -> str:
    cells = []
    pairs = [(part, result["predicted"][part], result["logged"][part]) for part in PARTS]
    for name, predicted, measured in [*pairs, ("resident", result["predicted_total"], result["resident"])]:
        share = predicted / measured if measured else 1.0
        cells.append(f"{name} {predicted / MEBIBYTE:.1f}/{measured / MEBIBYTE:.1f} ({share:.2f})")
    start = f"{result['model']:34} {result['buckets']:>7} {result['context']:>7} {result['cache']:>5}"
    return f"{start}  {'  '.join(cells)}"


if __name__ == "__main__":
    main()
