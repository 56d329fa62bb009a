"""The task `tools`: a user's request and many functions, one of which is to be called.

The data is that of the Berkeley Function Calling Leaderboard (Patil et al., ICML 2025), category live_multiple.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from abcli.evals.data import ContextFiller, Record, read_records, shuffled, take_turns
from abcli.evals.placement import check_settings
from abcli.evals.questions import CountTokens, Question, TaskSettings

MAX_NESTING = 32

_FETCH = "scripts/fetch_evaluation_data.py fetches it"
_DATA_MISSING = "tools needs a file of requests with their functions"
_DATA_HINT = f"give it with `data` FILE (BFCL_v4_live_multiple.json); {_FETCH}"
_ANSWERS_MISSING = "tools needs a file of the right calls"
_ANSWERS_HINT = f"give it with `answers` FILE (possible_answer/BFCL_v4_live_multiple.json); {_FETCH}"
_INSTRUCTION = 'Answer with the name of the one function above to call for this request, as {"name": "..."}.'


@dataclass(frozen=True)
class Function:
    """A function that can be called: its name as JSON spells it, and its line in a context."""

    name: str
    description: str
    line: str


@dataclass(frozen=True)
class _Request:
    """What a user wants, the function to call for it, and the others that the data offers with it."""

    identifier: str
    text: str
    gold: Function
    others: tuple[Function, ...]


def tools(settings: TaskSettings, count: CountTokens) -> Iterator[Question]:
    """Requests, each on functions of which the one at the asked depth is to be called; each has its own context.

    The other functions are the request's own, then those of other requests. `candidates` are all their names. Raises
    UsageError for settings that make no sense and EvaluationDataError for the data.
    """
    check_settings(settings)
    requests = _requests(settings)
    pool: dict[str, Function] = {}
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
            text=f"Request: {request.text}\n\n{_INSTRUCTION}",
            answer_start='{"name": "',
            answer=f'{request.gold.name}"',
            depth=filled.depth,
            length=settings.length,
            candidates=tuple(f'{function.name}"' for function in filled.passages),
        )

    return iter(take_turns("tools", settings, shuffled(requests, f"tools/{settings.seed}"), make))


def render(functions: Sequence[Function]) -> str:
    """The text of a context: a line of JSON for each function."""
    return "\n".join(function.line for function in functions)


def _others(request: _Request, functions: Sequence[Function], seed: str) -> Iterator[Function]:
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
        answers[identifier] = (_spelt(names.pop()), record)
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


def _function(record: Record) -> Function:
    name, description = record.text("name"), record.text("description")
    parameters = _brief_properties(record.record("parameters"), 1)
    content = {"name": name, "description": description, "parameters": parameters}
    return Function(_spelt(name), description, json.dumps(content, ensure_ascii=False))


def _spelt(name: str) -> str:
    """`name` as JSON spells it, without the quotation marks: as the context has it, and as the answer must."""
    return json.dumps(name, ensure_ascii=False)[1:-1]


def _brief_properties(schema: Record, level: int) -> dict[str, Any]:
    """The properties of an object's schema; there may be none."""
    if not schema.fields.get("properties"):
        return {}
    properties = schema.record("properties")
    return {name: _brief(properties.inner(value, name), level) for name, value in properties.fields.items()}


def _brief(schema: Record, level: int) -> Any:
    """A property as `type: description`, or as its own properties; what does not help to choose is left out."""
    if level > MAX_NESTING:
        raise schema.error(f"parameters are nested more than {MAX_NESTING} levels deep")
    kind = schema.text("type")
    if schema.fields.get("properties"):
        return _brief_properties(schema, level + 1)
    items = schema.fields.get("items")
    if isinstance(items, dict) and items.get("properties"):
        return [_brief_properties(schema.record("items"), level + 1)]
    if isinstance(items, dict) and isinstance(items.get("type"), str):
        kind = f"{kind} of {items['type']}"
    description = schema.fields.get("description")
    return f"{kind}: {description}" if isinstance(description, str) and description.strip() else kind
