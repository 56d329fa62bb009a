"""Writes a llama model with random weights, for measuring speed and memory at sizes that nobody need fetch.

    python scripts/random_model.py FILE [--layers 22] [--embedding 2048] [--heads 32] [--kv-heads 4]
                                        [--feed-forward 5632] [--vocabulary 32000] [--type Q4_0]

The defaults are the shape of TinyLlama: 1.1 billion parameters. Needs 6 bytes of memory per parameter, and 2 on
the disk for a moment. What it says is noise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import llama_cpp.llama_cpp as llama

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.tiny_gguf import write_tiny_model

TYPES = ("F32", "F16", "Q8_0", "Q4_0", "Q4_1")


def main() -> None:
    """Write the model, then let llama.cpp quantise it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    for name, size in (
        ("layers", 22),
        ("embedding", 2048),
        ("heads", 32),
        ("kv-heads", 4),
        ("feed-forward", 5632),
        ("vocabulary", 32000),
    ):
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--type", choices=TYPES, default="Q4_0")
    options = parser.parse_args()
    whole = options.file.with_suffix(".f16.gguf")
    try:
        write_tiny_model(
            whole,
            layers=options.layers,
            embedding=options.embedding,
            heads=options.heads,
            kv_heads=options.kv_heads,
            feed_forward=options.feed_forward,
            vocabulary_size=options.vocabulary,
            dtype="f16",
        )
        settings = llama.llama_model_quantize_default_params()
        settings.ftype = getattr(llama, f"LLAMA_FTYPE_{'ALL' if options.type == 'F32' else 'MOSTLY'}_{options.type}")
        status = llama.llama_model_quantize(str(whole).encode(), str(options.file).encode(), settings)
    finally:
        whole.unlink(missing_ok=True)
    if status:
        sys.exit(f"llama.cpp could not quantise the model (status {status})")
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
