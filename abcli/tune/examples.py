"""A user's own prompts and the answers that are wanted, from files of JSON lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abcli.chat.message_format import read_messages
from abcli.chat.messages import Message
from abcli.errors import PromptError
from abcli.evals.data import Record, read_records

_MISSING = "there is no file of prompts and answers"
_HINT = (
    'write JSON lines such as {"prompt": "...", "answer": "..."}, or {"messages": [...]} whose last message is the '
    "assistant's; or give `answers` with what `abcli batch` answered"
)
_ANSWERS = ("answer", "completion")


@dataclass(frozen=True)
class Example:
    """What the model reads and what it should say; `name` is its id, or else its line."""

    name: str
    messages: tuple[Message, ...]
    answer: str
    record: Record
    """Where it stands, to say what is wrong with it."""


def read_examples(path: Path, answers: Path | None = None) -> list[Example]:
    """The examples of a file of JSON lines, plain or packed with gzip.

    A line has a `prompt` or `messages`, as a line of a batch; or it is one of OpenAI's batch files, with these in its
    `body`. The answer is its `answer` or `completion`, or the last of the messages; with `answers` it is what that
    file, a batch's output in abcli's or OpenAI's form, has under the same id.

    Raises UsageError for a file that is not there, EvaluationDataError, with the line, for what cannot be used.
    """
    known = None if answers is None else _answers(answers)
    found: list[Example] = []
    names: set[str] = set()
    for record in read_records(path, _MISSING, _HINT):
        example = _example(record, known, answers)
        if example.name in names:
            raise record.error(f"the id {example.name!r:.80} was there before")
        names.add(example.name)
        found.append(example)
    return found


def _example(record: Record, known: Mapping[str, str] | None, answers: Path | None) -> Example:
    name = _identifier(record)
    asked = record.record("body") if "body" in record.fields else record
    if ("prompt" in asked.fields) == ("messages" in asked.fields):
        raise record.error("it must have either a prompt or messages", _HINT)
    if "prompt" in asked.fields:
        messages: tuple[Message, ...] = (Message("user", asked.text("prompt")),)
    else:
        try:
            messages = read_messages(asked.fields["messages"])
        except PromptError as error:
            raise record.error(error.message, error.hint) from None
    own = [key for key in _ANSWERS if key in record.fields]
    if known is not None:
        answer = known.get(name, "")
        if not answer:
            raise record.error(
                f"{answers} has no answer to {name!r:.80}", "give the answers that belong to the prompts"
            )
    elif own:
        answer = record.text(own[0])
    elif len(messages) > 1 and messages[-1].role == "assistant" and messages[-1].content.strip():
        messages, answer = messages[:-1], messages[-1].content
    else:
        raise record.error("it has no answer", _HINT)
    return Example(name, messages, answer, record)


def _answers(path: Path) -> dict[str, str]:
    """The answers of a batch's output by id; failed lines have none."""
    found: dict[str, str] = {}
    for record in read_records(path, _MISSING, _HINT):
        name = _identifier(record)
        if name in found:
            raise record.error(f"the id {name!r:.80} was there before")
        if record.fields.get("error") is not None:
            continue
        if "response" in record.fields:
            choice = record.record("response").record("body").records("choices")[0]
            found[name] = choice.record("message").text("content")
        else:
            found[name] = record.text("text")
    return found


def _identifier(record: Record) -> str:
    """The id of a line as `abcli batch` has it: its own, or else its number."""
    value: Any = record.fields.get("custom_id", record.fields.get("id", record.line))
    if isinstance(value, bool) or not isinstance(value, (int, str)) or value == "":
        raise record.error("its id is neither a text nor a whole number")
    return str(value)
