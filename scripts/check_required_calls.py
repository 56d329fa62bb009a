"""Ask a model for calls of tools that it has to make, and check every one: does it parse, validate, name a tool?

The requests are BFCL's live_multiple (`scripts/fetch_evaluation_data.py` fetches them): a request and the functions
to choose from. Each is asked with `tool_choice="required"`, greedily, of every bucket set (`--compare`, as `abcli eval`
has it; `--report`: the calibrated set of a report). With `--output` every answer is a line of a file as soon as it is
there, and what the file has is not asked again. Prints a line for each set, with paired differences to the first and
their intervals (bootstrap over sets of functions), then JSON as the last line. Needs the development tools.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jsonschema
import numpy as np

import abcli
from abcli.chat.asking import Asked, split_settings
from abcli.evals.configurations import Configuration, parse_configuration
from abcli.evals.report import read_report
from abcli.evals.tools import in_json_schema
from abcli.gguf.header import read_header
from abcli.hub.locate import locate_model

SETTINGS: dict[str, Any] = {
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "temp": 0,
    "max_tokens": 256,
}


RESAMPLES = 10_000


@dataclass(frozen=True)
class Request:
    """What a user asks, the functions there are, and the name of the right one."""

    identifier: str
    messages: list[dict[str, str]]
    tools: list[dict[str, Any]]
    right: str


@dataclass(frozen=True)
class Outcome:
    """What an answer is: calls and nothing else, that follow their schemas, of listed functions, of the right one.

    `cut`: it was not finished.
    """

    buckets: str
    request: str
    prompt_tokens: int
    answer_tokens: int
    functions: int
    parsed: bool
    valid: bool
    listed: bool
    right_name: bool
    cut: bool
    names: tuple[str, ...]


def read_requests(data: Path) -> list[Request]:
    """The requests in the order of their file."""
    name = "BFCL_v4_live_multiple.json"
    lines = (data / "possible_answer" / name).read_text(encoding="utf-8").splitlines()
    answers = {record["id"]: next(iter(record["ground_truth"][0])) for record in map(json.loads, lines)}
    found = []
    for record in map(json.loads, (data / name).read_text(encoding="utf-8").splitlines()):
        tools = [{**tool, "parameters": in_json_schema(tool["parameters"])} for tool in record["function"]]
        found.append(Request(record["id"], record["question"][0], tools, answers[record["id"]]))
    return found


def is_valid(answer: abcli.Answer, tools: Sequence[dict[str, Any]]) -> bool:
    """Whether the arguments of all calls follow the schemas of their functions."""
    schemas = {tool["name"]: tool["parameters"] for tool in tools}
    try:
        for call in answer.tool_calls:
            jsonschema.validate(json.loads(call.arguments), schemas[call.name])
    except (jsonschema.ValidationError, ValueError, KeyError) as error:
        print(f"invalid: {answer.tool_calls}: {error}", file=sys.stderr)
        return False
    return True


def chosen_requests(llm: abcli.LLM, requests: Sequence[Request], wanted: int, longest: int) -> list[Request]:
    """`wanted` requests drawn at random of those whose prompts have at most `longest` tokens.

    Those with the same functions follow each other, so that these are computed once.
    """
    drawn = list(requests)
    random.Random(0).shuffle(drawn)
    found: dict[str, list[Request]] = {}
    count = 0
    for request in drawn:
        if count < wanted and len(ask(llm, request).tokens) <= longest:
            found.setdefault(json.dumps(request.tools), []).append(request)
            count += 1
    return [request for those in found.values() for request in those]


def ask(llm: abcli.LLM, request: Request) -> Asked:
    """What a model is asked."""
    options, config = split_settings({"tools": request.tools, **SETTINGS})
    return llm.ask(request.messages, options, config)


def outcome_of(llm: abcli.LLM, buckets: str, request: Request) -> Outcome:
    """What comes of a request."""
    asked = ask(llm, request)
    *_, last = llm.answer(asked)
    answer = cast("abcli.Answer", last.answer)
    names = tuple(call.name for call in answer.tool_calls)
    parsed = bool(names) and not answer.text
    return Outcome(
        buckets,
        request.identifier,
        len(asked.tokens),
        len(answer.tokens),
        len(request.tools),
        parsed,
        parsed and is_valid(answer, request.tools),
        parsed and {*names} <= {tool["name"] for tool in request.tools},
        parsed and {*names} == {request.right},
        answer.finish_reason == "length",
        names,
    )


def read_outcomes(path: Path | None) -> list[Outcome]:
    """The answers in a file, which need not be there; a last line that was cut off is left out."""
    if path is None or not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [Outcome(**{**values, "names": tuple(values["names"])}) for values in found]


def summary(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """How many answers are what, of each bucket set, and how its names differ from those of the first, paired."""
    by_buckets: dict[str, dict[str, Outcome]] = {}
    for outcome in outcomes:
        by_buckets.setdefault(outcome.buckets, {})[outcome.request] = outcome
    found: dict[str, Any] = {}
    first = next(iter(by_buckets.values()))
    for name, those in by_buckets.items():
        found[name] = {"requests": len(those)}
        for what in ("parsed", "valid", "listed", "right_name", "cut"):
            found[name][what] = sum(getattr(outcome, what) for outcome in those.values())
        rate = found[name]["right_name"] / len(those)
        found[name]["accuracy"] = round(100 * rate, 1)
        found[name]["standard_error"] = round(100 * (rate * (1 - rate) / len(those)) ** 0.5, 1)
        if those is not first:
            differences: dict[str, list[int]] = {}
            for key in (key for key in first if key in those):
                difference = those[key].right_name - first[key].right_name
                differences.setdefault(function_set(key), []).append(difference)
            found[name]["less_the_first"] = paired(list(differences.values()))
    return found


def function_set(request: str) -> str:
    """The set of functions that a request chooses from: the middle of live_multiple_NUMBER-SET-NUMBER."""
    return request.split("-")[1]


def paired(differences: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The mean of differences in points, its 95 % interval, and how many are above and below 0.

    They come in groups, one for each set of functions, which the bootstrap draws whole.
    """
    values = np.array([value for group in differences for value in group])
    sums, sizes = (np.array([of(group) for group in differences]) for of in (sum, len))
    drawn = np.random.default_rng(0).integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = np.quantile(sums[drawn].sum(axis=1) / sizes[drawn].sum(axis=1), [0.025, 0.975])
    return {
        "requests": len(values),
        "function_sets": len(sums),
        "mean": round(100 * float(values.mean()), 1),
        "interval": [round(100 * float(low), 1), round(100 * float(high), 1)],
        "better": int((values > 0).sum()),
        "worse": int((values < 0).sum()),
    }


def configurations(arguments: argparse.Namespace) -> list[Configuration]:
    """The bucket sets that are compared, in the order in which they are given."""
    native = read_header(locate_model(arguments.model)).native_base

    def no_profile(_name: str | None) -> Any:
        sys.exit("give a calibrated set with --report")

    found = [parse_configuration(text, native, no_profile) for text in arguments.compare]
    for report in arguments.report:
        found += [one for one in read_report(report).configurations if one.name == "calibrated"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("data", type=Path, help="directory with BFCL's files")
    parser.add_argument("--model", help="model file or name")
    parser.add_argument("--chat-template", help="for a model that has none: a name or a file")
    parser.add_argument("--requests", type=int, default=50, help="how many, drawn at random")
    parser.add_argument("--longest", type=int, default=700, help="most tokens of a prompt")
    parser.add_argument("--compare", nargs="*", default=["native", "spread6"], help="bucket sets")
    parser.add_argument("--report", type=Path, nargs="*", default=[], help="reports with a calibrated set")
    parser.add_argument("--threads", "-t", type=int, default=0, help="threads of the engine")
    parser.add_argument("--output", "-o", type=Path, help="file for the answers, JSON lines; what it has is kept")
    arguments = parser.parse_args()
    outcomes = read_outcomes(arguments.output)
    known = {(outcome.buckets, outcome.request) for outcome in outcomes}
    with ExitStack() as stack:
        # What one set computes of a prompt the others take over: they prefill alike.
        cache = stack.enter_context(tempfile.TemporaryDirectory())
        models = {
            one.name: stack.enter_context(
                abcli.load(
                    arguments.model,
                    bases=one.bases,
                    merge=one.merge,
                    weights=one.weights,
                    prefill=one.prefill,
                    prefill_base=one.prefill_base,
                    chat_template=arguments.chat_template,
                    ctx_size=arguments.longest + SETTINGS["max_tokens"],
                    threads=arguments.threads,
                    prompt_cache=cache,
                )
            )
            for one in configurations(arguments)
        }
        first = next(iter(models.values()))
        requests = chosen_requests(first, read_requests(arguments.data), arguments.requests, arguments.longest)
        for request in requests:
            for name, llm in models.items():
                if (name, request.identifier) in known:
                    continue
                outcomes.append(outcome_of(llm, name, request))
                if arguments.output is not None:
                    with arguments.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(asdict(outcomes[-1])) + "\n")
    found = summary(outcomes)
    for name, values in found.items():
        print(name, *(f"{key} {value}" for key, value in values.items()), sep="  ")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
