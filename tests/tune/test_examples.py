"""A user's files of prompts and answers: every form is read, and what cannot be used is an error with its line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from abcli.errors import EvaluationDataError, UsageError
from abcli.tune.examples import Example, read_examples


def written(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def parts(example: Example) -> tuple[str, list[tuple[str, str]], str]:
    return example.name, [(message.role, message.content) for message in example.messages], example.answer


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2 + 2?"}]
SAID = [("system", "Be brief."), ("user", "2 + 2?")]
WANTED = {"role": "assistant", "content": "4"}
LINES: dict[str, tuple[dict[str, Any], tuple[str, list[tuple[str, str]], str]]] = {
    "a prompt": ({"prompt": "2 + 2?", "answer": "4"}, ("1", [("user", "2 + 2?")], "4")),
    "a completion": ({"id": 7, "prompt": "2 + 2?", "completion": " 4"}, ("7", [("user", "2 + 2?")], " 4")),
    "messages and an answer": ({"messages": MESSAGES, "answer": "4"}, ("1", SAID, "4")),
    "a conversation": ({"id": "a", "messages": [*MESSAGES, WANTED]}, ("a", SAID, "4")),
    "a line of OpenAI's": (
        {"custom_id": "r", "url": "/v1/chat/completions", "body": {"messages": [*MESSAGES, WANTED]}},
        ("r", SAID, "4"),
    ),
}


@pytest.mark.parametrize("case", LINES)
def test_a_line_is_read(tmp_path: Path, case: str) -> None:
    line, found = LINES[case]
    (example,) = read_examples(written(tmp_path / "file.jsonl", line))
    assert parts(example) == found


OUTPUTS: dict[str, dict[str, Any]] = {
    "abcli's": {"id": "a", "line": 1, "text": "4", "finish_reason": "stop"},
    "OpenAI's": {
        "custom_id": "a",
        "response": {"body": {"choices": [{"message": {"role": "assistant", "content": "4"}}]}},
        "error": None,
    },
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_answers_of_a_batch_are_found_by_their_ids(tmp_path: Path, case: str) -> None:
    other = {"id": "z", "line": 2, "error": {"message": "no", "hint": ""}}
    answers = written(tmp_path / "answers.jsonl", other, OUTPUTS[case])
    prompts = written(tmp_path / "prompts.jsonl", {"id": "a", "prompt": "2 + 2?"})
    (example,) = read_examples(prompts, answers)
    assert parts(example) == ("a", [("user", "2 + 2?")], "4")


GOOD = {"prompt": "2 + 2?", "answer": "4"}
BAD: dict[str, tuple[bytes, str]] = {
    "no JSON": (b"{", "line 2: not JSON"),
    "cut off": (json.dumps(GOOD).encode()[:-4], "line 2: not JSON"),
    "a list": (b"[]", "line 2: it is not a JSON object"),
    "a number too large": (b'{"prompt": 1e999, "answer": "4"}', "line 2: not JSON: the number"),
    "not UTF-8": (b'{"prompt": "\xff", "answer": "4"}', "line 2: byte 13 is not UTF-8"),
    "half a character": (b'{"prompt": "\\ud800", "answer": "4"}', "half a surrogate pair"),
    "nested too deeply": (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nested too deeply"),
    "no prompt": (b'{"answer": "4"}', "line 2: it must have either a prompt or messages"),
    "both": (b'{"prompt": "a", "messages": [], "answer": "4"}', "either a prompt or messages"),
    "no messages": (b'{"messages": [], "answer": "4"}', "line 2: messages is"),
    "a strange message": (b'{"messages": [{"role": "king", "content": "a"}], "answer": "4"}', "line 2: "),
    "no answer": (b'{"prompt": "a"}', "line 2: it has no answer"),
    "an empty answer": (b'{"prompt": "a", "answer": " "}', "line 2: answer is empty"),
    "an answer that is no text": (b'{"prompt": "a", "answer": 4}', "line 2: answer is not a string"),
    "only an answer": (b'{"messages": [{"role": "assistant", "content": "4"}]}', "line 2: it has no answer"),
    "an id that is a list": (b'{"id": [], "prompt": "a", "answer": "4"}', "neither a text nor a whole number"),
    "an id that was there": (b'{"id": 1, "prompt": "a", "answer": "4"}', "line 2: the id '1' was there before"),
    "a body that is none": (b'{"custom_id": "a", "body": 1}', "line 2: body is not an object"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_is_named(tmp_path: Path, case: str) -> None:
    line, reason = BAD[case]
    path = tmp_path / "file.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + line)
    with pytest.raises(EvaluationDataError, match=r"file\.jsonl") as found:
        read_examples(path)
    assert reason in found.value.message
    assert found.value.hint


def test_a_prompt_without_its_answer_is_an_error(tmp_path: Path) -> None:
    answers = written(tmp_path / "answers.jsonl", {"id": "b", "text": "4"})
    prompts = written(tmp_path / "prompts.jsonl", {"id": "a", "prompt": "2 + 2?"})
    with pytest.raises(EvaluationDataError, match="has no answer to 'a'"):
        read_examples(prompts, answers)


def test_a_packed_file_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode())[:-12])
    with pytest.raises(EvaluationDataError, match=r"breaks off|damaged"):
        read_examples(path)


def test_a_file_that_is_not_there_is_a_wrong_usage(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        read_examples(tmp_path / "none.jsonl")
