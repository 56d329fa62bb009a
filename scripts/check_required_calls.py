"""Ask a model for calls of tools that it has to make, and check every one: does it parse, validate, name a tool?

The requests are BFCL's live_multiple (`scripts/fetch_evaluation_data.py` fetches them): a request and the functions
to choose from. Each is asked with `tool_choice="required"`, greedily. Prints a table, then JSON as the last line. Needs
the development tools (jsonschema).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jsonschema

import abcli
from abcli.chat.asking import split_settings

# Python's names of types, which these functions have beside JSON's.
TYPES = {"dict": "object", "float": "number", "tuple": "array"}
SETTINGS: dict[str, Any] = {
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "temp": 0,
    "max_tokens": 256,
}


@dataclass
class Counts:
    """How many answers there were, and how many of them were right in which way; `cut` ones were not finished."""

    buckets: int
    requests: int = 0
    parsed: int = 0
    valid: int = 0
    listed: int = 0
    right_name: int = 0
    cut: int = 0


def in_json_schema(schema: Any) -> Any:
    """The schema of a function's arguments in JSON Schema's words."""
    if isinstance(schema, list):
        return [in_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: in_json_schema(value) for key, value in schema.items()}
    kind = found.get("type")
    if isinstance(kind, str):
        found["type"] = TYPES.get(kind, kind)
        if kind == "any":
            del found["type"]
    return found


def read_requests(data: Path) -> list[tuple[list[dict[str, str]], list[dict[str, Any]], str]]:
    """(messages, tools, the right function) of every request."""
    name = "BFCL_v4_live_multiple.json"
    lines = (data / "possible_answer" / name).read_text(encoding="utf-8").splitlines()
    answers = {record["id"]: next(iter(record["ground_truth"][0])) for record in map(json.loads, lines)}
    found = []
    for record in map(json.loads, (data / name).read_text(encoding="utf-8").splitlines()):
        tools = [{**tool, "parameters": in_json_schema(tool["parameters"])} for tool in record["function"]]
        found.append((record["question"][0], tools, answers[record["id"]]))
    return found


def check(answer: abcli.Answer, tools: list[dict[str, Any]], right: str, counts: Counts) -> None:
    """Count what an answer is."""
    counts.requests += 1
    schemas = {tool["name"]: tool["parameters"] for tool in tools}
    if answer.finish_reason == "length":
        counts.cut += 1
    if not answer.tool_calls or answer.text:
        return
    counts.parsed += 1
    counts.listed += all(call.name in schemas for call in answer.tool_calls)
    counts.right_name += all(call.name == right for call in answer.tool_calls)
    try:
        for call in answer.tool_calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
    except (jsonschema.ValidationError, ValueError, KeyError) as error:
        print(f"invalid: {answer.tool_calls}: {error}", file=sys.stderr)
        return
    counts.valid += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", type=Path, help="directory with BFCL's files")
    parser.add_argument("--model", help="model file or name")
    parser.add_argument("--requests", type=int, default=50, help="how many, drawn at random")
    parser.add_argument("--longest", type=int, default=700, help="most tokens of a prompt")
    parser.add_argument("--buckets", type=int, nargs="+", default=[1, 6])
    arguments = parser.parse_args()
    requests = read_requests(arguments.data)
    random.Random(0).shuffle(requests)
    results = []
    for buckets in arguments.buckets:
        counts = Counts(buckets)
        with abcli.load(arguments.model, buckets=buckets, ctx_size=arguments.longest + 256) as llm:
            for messages, tools, right in requests:
                options, config = split_settings({"tools": tools, **SETTINGS})
                asked = llm.ask(messages, options, config)
                if len(asked.tokens) > arguments.longest:
                    continue
                *_, last = llm.answer(asked)
                check(cast("abcli.Answer", last.answer), tools, right, counts)
                if counts.requests == arguments.requests:
                    break
        results.append(asdict(counts))
        print("  ".join(f"{name} {value}" for name, value in results[-1].items()), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
