"""How results are spelled, and that they are found again."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.batch.jobs import BadLine, Result
from abcli.batch.shapes import Shape, decode_entry, encode_entry, line_of

ANSWER = Result(4, 6, "a", "Hé\n", "stop", seed=3, prompt_tokens=5, completion_tokens=2)
FAILURE = BadLine(4, 6, None, "the prompt is empty", "give it some text").result()

RESULTS = st.builds(
    Result,
    index=st.integers(0, 99),
    line=st.integers(1, 10**12),
    identifier=st.none() | st.text(),
    text=st.text(),
    finish_reason=st.sampled_from(["stop", "length"]),
    seed=st.integers(0, 2**32),
    prompt_tokens=st.integers(0, 99),
    completion_tokens=st.integers(0, 99),
    error=st.just("") | st.text(),
    hint=st.text(),
    extra=st.just({}) | st.builds(lambda model: {"model": model}, st.text()),
)


@given(result=RESULTS, separator=st.none() | st.just("---"))
def test_every_result_is_one_line_that_says_whose_it_is(result: Result, separator: str | None) -> None:
    entry = encode_entry(result)
    assert decode_entry(entry) == result
    for format in ("jsonl", "openai"):
        data = Shape(format, separator=separator).encode(result)  # type: ignore[arg-type]
        assert data.count(b"\n") == 1
        assert line_of(format, data) == result.line  # type: ignore[arg-type]
    text = Shape("text").encode(result)
    assert text.endswith(b"\n")
    assert text.count(b"\n") == 1
    assert b"\r" not in text


@given(text=st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("\\nr\n\r")))
def test_a_line_of_text_can_be_turned_back(text: str) -> None:
    line = Shape("text").encode(Result(0, 1, "1", text, "stop")).decode().removesuffix("\n")
    back, rest = "", iter(line)
    for character in rest:
        back += {"n": "\n", "r": "\r", "\\": "\\"}[next(rest)] if character == "\\" else character
    assert back == text


def test_our_own_lines() -> None:
    assert json.loads(Shape("jsonl").encode(ANSWER)) == {
        "id": "a",
        "line": 6,
        "text": "Hé\n",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
        "seed": 3,
    }
    assert json.loads(Shape("jsonl").encode(FAILURE)) == {
        "id": None,
        "line": 6,
        "error": {"message": "the prompt is empty", "hint": "give it some text"},
    }
    numbered = Result(0, 1, "7", "x", "stop", extra={"id": 7})
    assert json.loads(Shape("jsonl").encode(numbered))["id"] == 7


def test_openai_lines() -> None:
    shape = Shape("openai", model="the-model", created=1_700_000_000)
    value = json.loads(shape.encode(ANSWER))
    request_id = value["response"].pop("request_id")
    completion_id = value["response"]["body"].pop("id")
    assert request_id.startswith("req_")
    assert completion_id == request_id.replace("req_", "chatcmpl-")
    assert value == {
        "id": "batch_req_6",
        "custom_id": "a",
        "response": {
            "status_code": 200,
            "body": {
                "object": "chat.completion",
                "created": 1_700_000_000,
                "model": "the-model",
                "choices": [
                    {
                        "index": 0,
                        "message": {"role": "assistant", "content": "Hé\n", "refusal": None},
                        "logprobs": None,
                        "finish_reason": "stop",
                    }
                ],
                "usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7},
            },
        },
        "error": None,
    }
    failed = json.loads(shape.encode(FAILURE))
    assert failed["custom_id"] is None
    assert failed["response"]["status_code"] == 400
    message = "line 6: the prompt is empty (give it some text)"
    assert failed["response"]["body"]["error"]["message"] == message
    assert failed["error"]["message"] == message
    named = Result(0, 1, "7", "x", "stop", extra={"model": "theirs"})
    assert json.loads(shape.encode(named))["response"]["body"]["model"] == "theirs"


def test_blocks_of_text() -> None:
    shape = Shape("text", separator="---")
    assert shape.encode(ANSWER) + shape.encode(FAILURE) == "Hé\n\n---\n\n---\n".encode()


@pytest.mark.parametrize(
    "value",
    ["", "[]", "1", "null", "{", '{"line": 0}', '{"line": true}', '{"id": "batch_req_x"}', '{"id": 1}', "[" * 99],
)
@pytest.mark.parametrize("format", ["jsonl", "openai"])
def test_other_lines_are_no_results(format: Any, value: str) -> None:
    with pytest.raises(ValueError):
        line_of(format, value.encode())
