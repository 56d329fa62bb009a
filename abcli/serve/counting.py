"""How many tokens a request has, before it is answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from starlette.responses import Response
from starlette.routing import Route

from abcli.serve.chat import read_chat
from abcli.serve.problems import RefusedError, Shape, openai_error
from abcli.serve.routing import Body, JsonResponse, post
from abcli.serve.service import Service

Translate: TypeAlias = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""From a request of another protocol to one for a chat's answer."""


def counting(path: str, translate: Translate = dict, *, kind: str = "", shape: Shape = openai_error) -> Route:
    """A route that tells the number of tokens of a request; `kind` is what the answer calls itself, if it does."""

    async def count(service: Service, body: Body) -> Response:
        found = await service.prepare(lambda: _count(service, translate(body)))
        return JsonResponse({"input_tokens": found, **({"object": kind} if kind else {})})

    return post(path, count, shape=shape)


def routes() -> list[Route]:
    """The routes of this module: those of chat requests."""
    paths = ("/v1/chat/completions/input_tokens", "/chat/completions/input_tokens")
    return [counting(path, kind="chat.completion.input_tokens") for path in paths]


def _count(service: Service, body: Mapping[str, Any]) -> int:
    try:
        return len(read_chat(service, body).asked[0].tokens)
    except RefusedError as error:
        # One that does not fit has tokens, too.
        if error.problem.code != "context_length_exceeded":
            raise
        return int(error.problem.more["n_prompt_tokens"])
