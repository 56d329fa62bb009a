"""Feeds mutated model files to every reader of headers and counts what comes of it.

    python scripts/fuzz_headers.py [--count 100000] [--seed 0] [--load] [--keep DIR]

The readers may refuse a file with an error of abcli's and nothing else, within a second of processor time and within
512 MiB of memory beyond what the process has at the start. With --load, llama.cpp then loads what they accept, in a
process of its own (an adapter with its model), and may refuse it but not crash. Exit status 1,
with the file kept in --keep, otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from abcli.config import BucketConfig, ContextConfig, LoraConfig, ModelConfig
from abcli.engine.memory import Room, predict
from abcli.errors import AbcliError
from abcli.gguf.check import check_file
from abcli.gguf.checked import check_model
from abcli.gguf.description import inspect, inspect_adapter
from abcli.gguf.fingerprint import fingerprint
from abcli.gguf.header import read_header
from abcli.gguf.lora import check_adapters, is_adapter, read_adapter
from abcli.gguf.verification import Verification
from abcli.gguf.weights import scan_weights
from abcli.native import crash_probe as trial
from abcli.rope.bases import resolve_buckets
from tests.support.lora import random_lora, write_lora
from tests.support.tiny_gguf import write_tiny_mamba, write_tiny_model

SECONDS = 1.0
MEMORY_BYTES = 512 * 2**20
LOAD_SECONDS = 10
INTERESTING = (
    0,
    1,
    2,
    3,
    31,
    32,
    127,
    255,
    2**15,
    2**16 - 1,
    2**24,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**62,
    2**63,
    2**64 - 1,
)


EXPERTS = {"llama.expert_count": 4, "llama.expert_used_count": 2}
# Sizes of the metadata's value types (ggml/docs/gguf.md); strings and arrays are 8 and 9.
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


class HangError(Exception):
    """A reader took too long."""


class CrashError(Exception):
    """llama.cpp crashed on a file that the readers accept."""


@dataclass(frozen=True)
class Seed:
    """A sound file, the size of its header, and the places of its numbers: values, counts, shapes, offsets."""

    data: bytes
    header_size: int
    fields: tuple[tuple[int, int], ...]
    """(position, bytes) of each."""


def seeds(folder: Path) -> list[Seed]:
    """Small models of every architecture that the tests know, and adapters of the first."""
    small = {"embedding": 32, "heads": 2, "feed_forward": 32, "layers": 2}
    files = []
    for architecture in ("llama", "qwen2", "qwen2vl", "gemma3", "stablelm", "gpt2", "bloom"):
        kv_heads = 2 if architecture in ("gpt2", "bloom") else 1
        context = 64 if architecture == "gpt2" else 4096
        path = folder / f"{architecture}.gguf"
        files.append(
            write_tiny_model(path, architecture=architecture, kv_heads=kv_heads, context_length=context, **small)  # type: ignore[arg-type]
        )
    for dtype in ("f16", "q8_0"):
        files.append(write_lora(folder / f"lora-{dtype}.gguf", random_lora(files[0], rank=32), dtype=dtype))
    files.append(write_tiny_mamba(folder / "mamba.gguf", embedding=32))
    files.append(write_tiny_model(folder / "q8.gguf", tokenizer="llama", dtype="q8_0", **small))  # type: ignore[arg-type]
    files.append(write_tiny_model(folder / "experts.gguf", metadata=EXPERTS, tensors=_experts(), **small))  # type: ignore[arg-type]
    factors = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "general.alignment": 64}
    files.append(write_tiny_model(folder / "yarn.gguf", rope_factors=[1.0] * 8, metadata=factors, **small))  # type: ignore[arg-type]
    return [seed_of(path) for path in files]


def _experts() -> dict[str, np.ndarray | None]:
    """The tensors of two layers of four experts instead of one dense network, 32 numbers wide throughout."""
    random_numbers = np.random.default_rng(0)
    tensors: dict[str, np.ndarray | None] = {}
    for layer in range(2):
        start = f"blk.{layer}.ffn_"
        tensors[f"{start}gate_inp.weight"] = random_numbers.standard_normal((4, 32), np.float32)
        for name in ("gate", "up", "down"):
            tensors[f"{start}{name}.weight"] = None
            tensors[f"{start}{name}_exps.weight"] = random_numbers.standard_normal((4, 32, 32), np.float32)
    return tensors


def seed_of(path: Path) -> Seed:
    """The sound file `path`, taken apart."""
    data = path.read_bytes()
    return Seed(data, read_header(path).data_offset, tuple(_fields(data)))


def _fields(data: bytes) -> list[tuple[int, int]]:
    """The numbers in a sound header; of the items of an array the first three."""
    found: list[tuple[int, int]] = []
    at = 0

    def number(size: int) -> int:
        nonlocal at
        found.append((at, size))
        at += size
        return int.from_bytes(data[at - size : at], "little")

    def string() -> None:
        nonlocal at
        length = number(8)
        found.extend((at + place, 1) for place in range(min(3, length)))
        at += length

    at = 4
    number(4)
    tensors, keys = number(8), number(8)
    for _ in range(keys):
        string()
        kind, count = number(4), 1
        if kind == 9:
            kind, count = number(4), number(8)
        for item in range(count):
            string() if kind == 8 else number(SCALAR_BYTES[kind])
            if item >= 3:
                del found[-1]
    for _ in range(tensors):
        string()
        for _ in range(number(4)):
            number(8)
        number(4)
        number(8)
    return found


def mutate(source: random.Random, seed: Seed, other: bytes) -> tuple[str, bytes]:
    """The name of a mutation and the file after one to four of it, mostly within its header."""
    header_size = seed.header_size
    kinds: dict[str, Callable[[bytearray, int], None]] = {
        "bits": lambda out, at: out.__setitem__(at, out[at] ^ 1 << source.randrange(8)),
        "bytes": lambda out, at: out.__setitem__(at, source.randrange(256)),
        "lengths": lambda out, at: _number(source, out, at),
        "truncation": lambda out, at: out.__delitem__(slice(at, None)),
        "splice": lambda out, at: out.__setitem__(slice(at, None), other[source.randrange(len(other)) :]),
        "removal": lambda out, at: out.__delitem__(slice(at, at + source.randrange(1, 64))),
        "repetition": lambda out, at: out.__setitem__(slice(at, at), out[at : at + source.randrange(1, 256)]),
        "patch": lambda out, at: _patch(source, out, at, other),
        "field": lambda out, _at: _field(source, out, seed.fields),
    }
    # A changed field gets past the first checks more often than others.
    name = source.choice([*kinds, "field"])
    out = bytearray(seed.data)
    for _ in range(source.choice((1, 1, 2, 4))):
        if out:
            limit = min(len(out), header_size if source.random() < 0.95 else len(out))
            # Half of them in the first kilobyte, where counts and hyperparameters are.
            kinds[name](out, source.randrange(min(limit, 1024) if source.random() < 0.5 else limit))
    return name, bytes(out)


def _number(source: random.Random, out: bytearray, at: int) -> None:
    size = source.choice((4, 8))
    value = source.choice(INTERESTING) if source.random() < 0.7 else source.getrandbits(8 * size)
    out[at : at + size] = (value % 2 ** (8 * size)).to_bytes(size, "little")


def _patch(source: random.Random, out: bytearray, at: int, other: bytes) -> None:
    begin, size = source.randrange(len(other)), source.randrange(1, 128)
    out[at : at + size] = other[begin : begin + size]


def _field(source: random.Random, out: bytearray, fields: tuple[tuple[int, int], ...]) -> None:
    at, size = source.choice(fields)
    old = int.from_bytes(out[at : at + size], "little")
    values = (*INTERESTING, old + 1, old - 1, 2 * old, old // 2, source.getrandbits(8 * size))
    out[at : at + size] = (source.choice(values) % 2 ** (8 * size)).to_bytes(size, "little")
    if source.random() < 0.1 and size == 4:
        out[at : at + 4] = struct.pack("<f", source.choice((0.0, -1.0, 1e-30, 1e30, float("nan"), float("inf"))))


def load(path: Path) -> str:
    """Let llama.cpp load `path` as a trial does, in a forked process. Raises CrashError with what it wrote."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(write_end, 1)
        os.dup2(write_end, 2)
        # Processor time: a busy machine is no finding.
        resource.setrlimit(resource.RLIMIT_CPU, (LOAD_SECONDS, LOAD_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        os.environ["GGML_NO_BACKTRACE"] = "1"
        adapter = is_adapter(read_header(path))
        trial.main([str(path.with_name("llama.gguf")), str(path), "1.0"] if adapter else [str(path)])
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        output = pipe.read().decode(errors="replace")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        raise CrashError(f"{signal.Signals(-status).name} {' '.join(output.split())[-150:]}")
    return "loaded" if status == 0 else "refused by llama.cpp"


def read_all(path: Path) -> str:
    """Send `path` through every reader; "accepted" or "refused". Raises whatever is no error of abcli's."""
    list(Verification(path).structure())
    try:
        if is_adapter(read_header(path)):
            files = check_file(path.with_name("llama.gguf"))
            fingerprint(files, check_adapters(files, [LoraConfig(path)]))
            adapter = read_adapter(path)
            inspect_adapter(adapter)
            scan_weights(adapter.header)
            return "accepted"
        checked = check_model(ModelConfig(path, gpu_layers=0))
        inspect(checked.files)
        buckets = resolve_buckets(BucketConfig(bases=(5000.0, 10000.0)), checked.header.native_base)
        predict(checked, ContextConfig(context_size=4096), buckets).advice(Room(2**20))
        scan_weights(checked.header)
    except AbcliError:
        return "refused"
    return "accepted"


def main() -> int:
    """Run the mutations; the number of violations decides about the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--load", action="store_true", help="load what is accepted with llama.cpp, too")
    arguments = parser.parse_args()

    def hang(_signal: int, _frame: FrameType | None) -> None:
        raise HangError

    signal.signal(signal.SIGVTALRM, hang)
    counts: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    source = random.Random(arguments.seed)
    slowest, before = 0.0, _peak_bytes()
    with tempfile.TemporaryDirectory() as name:
        files = seeds(Path(name))
        limit = psutil.Process().memory_info().vms + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        path = Path(name) / "mutated.gguf"
        for number in range(arguments.count):
            kind, data = mutate(source, source.choice(files), source.choice(files).data)
            path.write_bytes(data)
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            begin = time.process_time()
            try:
                outcome = read_all(path)
                slowest = max(slowest, time.process_time() - begin)
                if arguments.load and outcome == "accepted":
                    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
                    outcome = load(path)
                counts[f"{kind}: {outcome}"] += 1
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                problems[f"{kind}: {type(error).__name__}: {error}"[:200]] += 1
                arguments.keep.mkdir(parents=True, exist_ok=True)
                (arguments.keep / f"{arguments.seed}-{number}.gguf").write_bytes(data)
            finally:
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    for line, count in sorted(counts.items()):
        print(f"{count:8} {line}")
    for line, count in problems.most_common():
        print(f"{count:8} PROBLEM {line}")
    summary = {"count": arguments.count, "seed": arguments.seed, "problems": sum(problems.values())}
    summary |= {"slowest_seconds": round(slowest, 3), "peak_growth_mib": round((_peak_bytes() - before) / 2**20, 1)}
    print(json.dumps(summary | counts))
    return 1 if problems else 0


def _peak_bytes() -> int:
    """The most memory that this process has had resident so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    sys.exit(main())
