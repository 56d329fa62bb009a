"""Results as they are written: our JSON lines, OpenAI's, plain text, and the journal's own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from abcli.batch.jobs import Result

OutputFormat = Literal["jsonl", "openai", "text"]
OUTPUT_FORMATS: tuple[OutputFormat, ...] = get_args(OutputFormat)

_OPENAI_ID = "batch_req_"
_ESCAPED = {"\\": r"\\", "\n": r"\n", "\r": r"\r"}


@dataclass(frozen=True)
class Shape:
    """How results are spelled. `created` is in seconds since 1970; `model` names one where the request did not."""

    format: OutputFormat
    model: str = ""
    created: int = 0
    separator: str | None = None

    def encode(self, result: Result) -> bytes:
        """The bytes of a result, ending with a newline.

        As text an answer is one line in which a backslash, a line feed and a carriage return are written as
        two characters, or, with a separator, the answer as it is and then the separator's line; a failed line is
        an empty answer, and each call of a tool is a line of JSON behind the answer.
        """
        if self.format == "jsonl":
            return _json_line(_own(result))
        if self.format == "openai":
            return _json_line(self._openai(result))
        text = "\n".join([*filter(None, [result.text]), *map(_call_text, result.tool_calls)])
        if self.separator is not None:
            return f"{text}\n{self.separator}\n".encode("utf-8", "replace")
        escaped = re.sub(r"[\\\n\r]", lambda found: _ESCAPED[found.group()], text)
        return f"{escaped}\n".encode("utf-8", "replace")

    def _openai(self, result: Result) -> dict[str, Any]:
        """The shape of platform.openai.com/docs/api-reference/batch/request-output.

        A failed line has both the response that a server would have sent and `error`: clients look at either.
        """
        identity = hashlib.blake2b(f"{result.line}\n{result.identifier}".encode(), digest_size=12).hexdigest()
        error = None
        if result.error:
            message = f"line {result.line}: {result.error}" + (f" ({result.hint})" if result.hint else "")
            error = {"code": "invalid_request", "message": message}
            status = 400
            body: dict[str, Any] = {
                "error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}
            }
        else:
            status = 200
            content = result.text or (None if result.tool_calls else "")
            answer = {"role": "assistant", "content": content, "refusal": None, **_thoughts_and_calls(result)}
            if result.reasoning:
                answer["reasoning_content"] = answer.pop("reasoning")
            choice = {"index": 0, "message": answer, "logprobs": None, "finish_reason": result.finish_reason}
            body = {
                "id": f"chatcmpl-{identity}",
                "object": "chat.completion",
                "created": self.created,
                "model": result.extra.get("model", self.model),
                "choices": [choice],
                "usage": _usage(result),
            }
        return {
            "id": f"{_OPENAI_ID}{result.line}",
            "custom_id": result.identifier,
            "response": {"status_code": status, "request_id": f"req_{identity}", "body": body},
            "error": error,
        }


def line_of(format: OutputFormat, data: bytes) -> int:
    """The line of the input that an encoded result belongs to. Raises ValueError for anything else."""
    value = json.loads(data)
    line: Any = None
    if isinstance(value, dict):
        line = value.get("line")
        if format == "openai":
            found = re.fullmatch(rf"{_OPENAI_ID}([1-9][0-9]{{0,17}})", str(value.get("id")))
            line = int(found[1]) if found else None
    if type(line) is not int or line < 1:
        raise ValueError("not a result")
    return line


def encode_entry(result: Result) -> bytes:
    """A line of the journal: all there is to a result."""
    return _json_line(asdict(result))


def decode_entry(data: bytes) -> Result:
    """The result in a line of the journal. Raises ValueError for anything else."""
    try:
        return Result(**json.loads(data))
    except TypeError:
        raise ValueError("not a result") from None


def _own(result: Result) -> dict[str, Any]:
    identity = {"id": result.extra.get("id", result.identifier), "line": result.line}
    if result.error:
        return {**identity, "error": {"message": result.error, "hint": result.hint}}
    answer = {"text": result.text, **_thoughts_and_calls(result), "finish_reason": result.finish_reason}
    return {**identity, **answer, "usage": _usage(result), "seed": result.seed}


def _thoughts_and_calls(result: Result) -> dict[str, Any]:
    """What few answers have."""
    found = {"reasoning": result.reasoning, "tool_calls": list(result.tool_calls)}
    return {name: value for name, value in found.items() if value}


def _call_text(call: Mapping[str, Any]) -> str:
    return json.dumps(call["function"], ensure_ascii=False)


def _usage(result: Result) -> dict[str, int]:
    counts = {"prompt_tokens": result.prompt_tokens, "completion_tokens": result.completion_tokens}
    return {**counts, "total_tokens": sum(counts.values())}


def _json_line(value: dict[str, Any]) -> bytes:
    # Half a character has no UTF-8; spelled with a backslash it is JSON all the same.
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
