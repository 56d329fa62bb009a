"""What went wrong, in HTTP: a status, a type, the field to blame; and how it is written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from abcli.errors import (
    AbcliError,
    CancelledError,
    ContextFullError,
    GrammarError,
    PromptError,
    TemplateError,
    UnsupportedModelError,
    UsageError,
)

log = logging.getLogger("abcli.serve")


@dataclass(frozen=True)
class Problem:
    """An error as a client sees it.

    `kind` is llama-server's and OpenAI's `type`, `param` the request's field to blame, `code` a word for programs.
    `more` are further fields, `headers` those of HTTP.
    """

    status: int
    kind: str
    message: str
    param: str | None = None
    code: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


Shape: TypeAlias = Callable[[Problem], dict[str, Any]]
"""How a protocol writes an error."""


class RefusedError(AbcliError):
    """A request that is not answered, for a reason that only a server has."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def refused(status: int, kind: str, message: str, *, code: str | None = None, **headers: str) -> RefusedError:
    """An error with these words; underscores in the names of headers are dashes."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return RefusedError(Problem(status, kind, message, code=code, headers=named))


def out_of_time() -> RefusedError:
    """The error of a request that a server's time limit ends."""
    return refused(503, "timeout_error", "the request took longer than the server allows", code="timeout")


def openai_error(problem: Problem) -> dict[str, Any]:
    """The object of OpenAI's description of its API (schema `ErrorResponse`)."""
    error = {"message": problem.message, "type": problem.kind, "param": problem.param, "code": problem.code}
    return {"error": {**error, **problem.more}}


def problem_of(error: BaseException) -> Problem:
    """What a client is told of an error; one that is not ours is logged, and the client learns nothing of it."""
    if isinstance(error, RefusedError):
        return error.problem
    if isinstance(error, ContextFullError):
        return Problem(
            400,
            "exceed_context_size_error",
            f"This model's maximum context length is {error.available} tokens, but the request has {error.used}",
            param="messages",
            code="context_length_exceeded",
            more={"n_prompt_tokens": error.used, "n_ctx": error.available},
        )
    if isinstance(error, UsageError):
        return Problem(400, "invalid_request_error", _sentence(error), param=error.setting or None)
    if isinstance(error, PromptError | TemplateError | GrammarError):
        return Problem(400, "invalid_request_error", _sentence(error))
    if isinstance(error, UnsupportedModelError):
        return Problem(501, "not_supported_error", _sentence(error))
    if isinstance(error, CancelledError):
        return Problem(503, "unavailable_error", "the server is stopping", headers={"Retry-After": "5"})
    if isinstance(error, AbcliError):
        log.error("%s", _sentence(error))
        return Problem(500, "server_error", _sentence(error))
    log.error("internal error", exc_info=error)
    return Problem(500, "server_error", "internal error")


@contextmanager
def blaming(name: str) -> Iterator[None]:
    """Say of errors within the block that name no field that this one is to blame."""
    try:
        yield
    except ContextFullError:
        raise
    except UsageError as error:
        if error.setting:
            raise
        raise UsageError(error.message, error.hint, setting=name) from None
    except (PromptError, GrammarError, TemplateError) as error:
        raise UsageError(error.message, error.hint, setting=name) from None


def _sentence(error: AbcliError) -> str:
    text = f"{error.message}; {error.hint}" if error.hint else error.message
    return text.replace("`", "'")
