"""The ASGI application: all routes, with a guard before them."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from abcli.serve import anthropic, chat, completions, counting, embeddings, infos, page, responses
from abcli.serve.guard import Access, Guard
from abcli.serve.models import Models
from abcli.serve.problems import Problem
from abcli.serve.routing import problem_response
from abcli.serve.service import Served

PARTS: tuple[ModuleType, ...] = (infos, chat, completions, embeddings, counting, responses, anthropic, page)
"""The modules that have routes."""


def make_app(models: Models | Served, *, keys: Sequence[str] = (), access: Access | None = None) -> ASGIApp:
    """The application for some models, or just one; with `keys` all but open routes need one of them."""
    app = Starlette(
        routes=[route for part in PARTS for route in part.routes()],
        exception_handlers={HTTPException: _http_problem},
    )
    app.state.models = models if isinstance(models, Models) else Models.of(models)
    app.state.keys = [key.encode() for key in keys]
    return Guard(app, access or Access())


async def _http_problem(request: Request, error: Exception) -> Response:
    """What the router has to say: no such path, no such method."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    headers = dict(getattr(error, "headers", None) or {})
    if status == 405:
        message = f"{request.url.path[:200]} does not take {request.method}"
        return problem_response(Problem(status, "invalid_request_error", message, headers=headers))
    problem = Problem(status, "not_found_error", f"there is nothing at {request.url.path[:200]}", headers=headers)
    return problem_response(problem)
