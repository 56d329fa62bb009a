"""Feeds mutated model files to every reader of headers and counts what comes of it.

    python scripts/fuzz_headers.py [--count 100000] [--seed 0] [--keep DIR]

The readers may refuse a file with an error of abcli's and nothing else, within a second of processor time and within
512 MiB of memory beyond what the process has at the start. Exit status 1, with the file kept in --keep, otherwise.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from abcli.config import EngineConfig, LoraConfig
from abcli.engine.memory import Room, predict
from abcli.errors import AbcliError
from abcli.models.adapter import is_adapter, read_adapter, with_adapters
from abcli.models.check import check_file
from abcli.models.fingerprint import fingerprint
from abcli.models.header import read_header
from abcli.models.inspection import inspect, inspect_adapter
from abcli.models.verification import Verification
from abcli.models.weights import scan_weights
from tests.support.lora import random_lora, write_lora
from tests.support.tiny_gguf import write_tiny_mamba, write_tiny_model

SECONDS = 1.0
MEMORY_BYTES = 512 * 2**20
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


class HangError(Exception):
    """A reader took too long."""


def seeds(folder: Path) -> list[tuple[bytes, int]]:
    """Small models of the architectures that the tests know, and adapters of the first, each with its header's size."""
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
    factors = {"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0, "general.alignment": 64}
    files.append(write_tiny_model(folder / "yarn.gguf", rope_factors=[1.0] * 8, metadata=factors, **small))  # type: ignore[arg-type]
    return [(path.read_bytes(), read_header(path).data_offset) for path in files]


def mutate(source: random.Random, data: bytes, other: bytes, header_size: int) -> tuple[str, bytes]:
    """The name of a mutation and `data` after one to four of it, mostly within its first `header_size` bytes."""
    kinds: dict[str, Callable[[bytearray, int], None]] = {
        "bits": lambda out, at: out.__setitem__(at, out[at] ^ 1 << source.randrange(8)),
        "bytes": lambda out, at: out.__setitem__(at, source.randrange(256)),
        "lengths": lambda out, at: _number(source, out, at),
        "truncation": lambda out, at: out.__delitem__(slice(at, None)),
        "splice": lambda out, at: out.__setitem__(slice(at, None), other[source.randrange(len(other)) :]),
        "removal": lambda out, at: out.__delitem__(slice(at, at + source.randrange(1, 64))),
        "repetition": lambda out, at: out.__setitem__(slice(at, at), out[at : at + source.randrange(1, 256)]),
        "patch": lambda out, at: _patch(source, out, at, other),
    }
    name = source.choice(list(kinds))
    out = bytearray(data)
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


def read_all(path: Path) -> str:
    """Send `path` through every reader; "accepted" or "refused". Raises whatever is no error of abcli's."""
    list(Verification(path).structure())
    try:
        if is_adapter(read_header(path)):
            model = check_file(path.with_name("llama.gguf"))
            fingerprint(with_adapters(model, [LoraConfig(path)]))
            adapter = read_adapter(path)
            inspect_adapter(adapter)
            scan_weights(adapter.header)
            return "accepted"
        header = check_file(path)
        inspect(header)
        config = EngineConfig(path, (5000.0, 10000.0), context_size=4096, gpu_layers=0)
        predict(config, header).advice(Room(2**20))
        scan_weights(header)
    except AbcliError:
        return "refused"
    return "accepted"


def main() -> int:
    """Run the mutations; the number of violations decides about the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"))
    arguments = parser.parse_args()

    def hang(_signal: int, _frame: FrameType | None) -> None:
        raise HangError

    signal.signal(signal.SIGVTALRM, hang)
    counts: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    source = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as name:
        files = seeds(Path(name))
        limit = psutil.Process().memory_info().vms + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        path = Path(name) / "mutated.gguf"
        for number in range(arguments.count):
            (seed, header_size), (other, _) = source.choice(files), source.choice(files)
            kind, data = mutate(source, seed, other, header_size)
            path.write_bytes(data)
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
            try:
                counts[f"{kind}: {read_all(path)}"] += 1
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
    print(json.dumps({"count": arguments.count, "seed": arguments.seed, "problems": sum(problems.values()), **counts}))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
