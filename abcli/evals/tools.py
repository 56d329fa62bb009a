"""The task `tools`: a user's request and many functions, one of which is to be called, in the model's own format.

The data is that of the Berkeley Function Calling Leaderboard (Patil et al., ICML 2025), category live_multiple.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from abcli.chat.messages import Tool
from abcli.chat.tools import is_name
from abcli.evals.data import ContextFiller, Record, read_records, shuffled, take_turns
from abcli.evals.placement import check_settings
from abcli.evals.questions import CountTokens, Question, TaskSettings

# Of lists and objects in the parameters of a function.
MAX_NESTING = 64
# What a profile's `task` says.
CALIBRATED_ON = "tools in the model's own format"
# What it said, and a report says, of questions that were asked with a prompt of abcli's own.
FORMER_TASK = "tools"
FORMER_PROMPT = "tools asked with a prompt of abcli's own, not in the model's format"

_FETCH = "scripts/fetch_evaluation_data.py fetches it"
_DATA_MISSING = "tools needs a file of requests with their functions"
_DATA_HINT = f"give it with `data` FILE (BFCL_v4_live_multiple.json); {_FETCH}"
_ANSWERS_MISSING = "tools needs a file of the right calls"
_ANSWERS_HINT = f"give it with `answers` FILE (possible_answer/BFCL_v4_live_multiple.json); {_FETCH}"
# Python's names of types, which the data has beside JSON Schema's.
_TYPES = {"dict": "object", "float": "number", "tuple": "array"}


@dataclass(frozen=True)
class _Request:
    """What a user wants, the function to call for it, and the others that the data offers with it."""

    identifier: str
    text: str
    gold: Tool
    others: tuple[Tool, ...]


def tools(settings: TaskSettings, count: CountTokens) -> Iterator[Question]:
    """Requests, each on functions of which the one at the asked depth is to be called; each has its own context.

    The other functions are the request's own, then those of other requests. `candidates` are all their names. Raises
    UsageError for settings that make no sense and EvaluationDataError for the data.
    """
    check_settings(settings)
    requests = _requests(settings)
    pool: dict[str, Tool] = {}
    for request in requests:
        for function in (request.gold, *request.others):
            pool.setdefault(function.name, function)
    functions = list(pool.values())
    filler = ContextFiller(render, count, settings.length)

    def make(request: _Request, depth: float, identifier: str) -> Question | None:
        seed = f"tools/{settings.seed}/{request.identifier}"
        filled = filler.fill(request.gold, _others(request, functions, seed), depth, seed)
        if filled is None:
            return None
        return Question(
            identifier=identifier,
            group=identifier,
            context=filled.context,
            text=request.text,
            answer_start="",
            answer=request.gold.name,
            depth=filled.depth,
            length=settings.length,
            candidates=tuple(function.name for function in filled.passages),
            tools=filled.passages,
        )

    return iter(take_turns("tools", settings, shuffled(requests, f"tools/{settings.seed}"), make))


def render(functions: Sequence[Tool]) -> str:
    """The text of a context: a line of JSON for each function, as most templates write it."""
    return "\n".join(json.dumps(function.fields, ensure_ascii=False) for function in functions)


def in_json_schema(schema: Any) -> Any:
    """A schema of the data's in JSON Schema's words."""
    if isinstance(schema, list):
        return [in_json_schema(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: in_json_schema(value) for key, value in schema.items()}
    kind = found.get("type")
    if isinstance(kind, str):
        found["type"] = _TYPES.get(kind, kind)
        if kind == "any":
            del found["type"]
    return found


def _others(request: _Request, functions: Sequence[Tool], seed: str) -> Iterator[Tool]:
    """Functions to put around the right one, the best first, no name twice.

    A stranger that is called or described like the right one might be as right, so it is left out.
    """
    names = {request.gold.name}
    for function in request.others:
        if function.name not in names:
            names.add(function.name)
            yield function
    gold = request.gold
    for function in shuffled(functions, f"{seed}/others"):
        alike = _bare(function.name) == _bare(gold.name) or function.description == gold.description
        if function.name not in names and not alike:
            yield function


def _bare(name: str) -> str:
    """What a function is called without the service it belongs to: `get_weather` and `Weather.getWeather` are one."""
    return name.rpartition(".")[2].replace("_", "").casefold()


def _requests(settings: TaskSettings) -> list[_Request]:
    answers = _answers(settings)
    requests: dict[str, _Request] = {}
    for record in read_records(settings.data, _DATA_MISSING, _DATA_HINT):
        identifier = record.text("id")
        if identifier in requests:
            raise record.error(f"the id {identifier!r} was there before")
        if identifier not in answers:
            raise record.error(
                f"{settings.answers} has no answer to {identifier!r}", "give the answers that belong to the requests"
            )
        right, place = answers[identifier]
        functions = [_function(part) for part in record.records("function")]
        gold = next((function for function in functions if function.name == right), None)
        if gold is None:
            raise place.error(
                f"the answer {right!r} is none of the functions of {identifier!r} ({record.path}, line {record.line})",
                "give the answers that belong to the requests",
            )
        others = tuple(function for function in functions if function is not gold)
        requests[identifier] = _Request(identifier, _request_text(record), gold, others)
    return list(requests.values())


def _answers(settings: TaskSettings) -> dict[str, tuple[str, Record]]:
    """The right function of each request, and where it is said."""
    answers: dict[str, tuple[str, Record]] = {}
    for record in read_records(settings.answers, _ANSWERS_MISSING, _ANSWERS_HINT):
        identifier = record.text("id")
        if identifier in answers:
            raise record.error(f"the id {identifier!r} was there before")
        names = {name for call in record.records("ground_truth") for name in call.fields}
        if len(names) != 1:
            raise record.error(f"ground_truth names {len(names)} functions, not one")
        answers[identifier] = (names.pop(), record)
    return answers


def _request_text(record: Record) -> str:
    """The last message of the user, and all before it."""
    turns = record.items("question")
    if not all(isinstance(turn, list) for turn in turns):
        raise record.error("question is not a list of lists of messages")
    messages = [
        record.inner(message, f"question[{turn}][{index}]")
        for turn, content in enumerate(turns)
        for index, message in enumerate(content)
    ]
    last = max((index for index, message in enumerate(messages) if message.text("role") == "user"), default=-1)
    if last < 0:
        raise record.error("question has no message of a user")
    return "\n\n".join(message.text("content") for message in messages[: last + 1])


def _function(record: Record) -> Tool:
    name, description, parameters = record.text("name"), record.text("description"), record.record("parameters")
    if not is_name(name):
        raise record.error(f"a tool cannot have the name {name!r:.80}")
    if _nesting(parameters.fields) > MAX_NESTING:
        raise parameters.error(f"the parameters of {name} are nested more than {MAX_NESTING} levels deep")
    schema = in_json_schema(parameters.fields)
    if schema.setdefault("type", "object") != "object":
        raise parameters.error(f"the parameters of {name} are no object's")
    return Tool(name, description, schema)


def _nesting(value: Any) -> int:
    """How many levels of lists and objects there are, or one more than may be."""
    level, inner = 0, [value]
    while (inner := [item for item in inner if isinstance(item, (dict, list))]) and level <= MAX_NESTING:
        level += 1
        inner = [item for outer in inner for item in (outer.values() if isinstance(outer, dict) else outer)]
    return level
