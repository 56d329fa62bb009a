"""What a schema costs in time per token: answers with and without one, in turn, with the same number of tokens.

The sampling settings are those of the command line; the schema allows one long text, so that both kinds of answers have
as many steps. Printed are milliseconds per token, the median of the rounds, their ratio with its spread, and JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from abcli import load
from abcli.sampling import generation_config

SCHEMA = {"type": "object", "properties": {"text": {"type": "string", "minLength": 100_000}}, "required": ["text"]}
KINDS: dict[str, dict[str, Any]] = {"free": {"ignore_eos": True}, "schema": {"json_schema": SCHEMA}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?")
    parser.add_argument("-k", "--buckets", type=int, default=1)
    parser.add_argument("-n", "--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("-t", "--threads", type=int, default=0)
    options = parser.parse_args()
    times: dict[str, list[float]] = {"free": [], "schema": []}
    with load(options.model, buckets=options.buckets, ctx_size=1024, threads=options.threads) as llm:
        vocabulary, prompt = llm.vocabulary_size, llm.prompt_tokens("Tell me about rivers, as JSON.", raw=True)
        for number in range(options.rounds + 1):
            for kind, settings in KINDS.items():
                begin, tokens = 0.0, 0
                wanted = generation_config(max_tokens=options.tokens, seed=number, **settings)
                for piece in llm.decode(prompt, wanted):
                    tokens = len(piece.answer.tokens)
                    begin = begin or time.perf_counter()
                if number:  # the first round compiles, and warms up
                    times[kind].append((time.perf_counter() - begin) / (tokens - 1))
    ratios = [schema / free for schema, free in zip(times["schema"], times["free"], strict=True)]
    found = {
        "vocabulary": vocabulary,
        "buckets": options.buckets,
        **{kind: round(1000 * statistics.median(values), 3) for kind, values in times.items()},
        "ratio": round(statistics.median(ratios), 3),
        "spread": [round(min(ratios), 3), round(max(ratios), 3)],
    }
    print(f"{found['free']} ms per token, {found['schema']} ms with a schema: {found['ratio']} times")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
