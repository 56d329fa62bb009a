"""The page at `/`: a chat that shows where the buckets agree. One file for a browser, which loads nothing else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from abcli.serve.models import Models
from abcli.serve.routing import about

_SCRIPTS = ("events.js", "store.js", "words.js", "page.js")


def routes() -> list[Route]:
    """The route of the page, which needs no key: it asks its reader for one."""
    return [about("/", page, is_open=True)]


async def page(_models: Models, _request: Request) -> Response:
    """The page, which may run only its own script and speak only to this server."""
    text, policy = whole_page()
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }
    return Response(text, media_type="text/html", headers=headers)


@cache
def whole_page() -> tuple[str, str]:
    """(the page with its style and script in it, the Content-Security-Policy that allows just these)."""
    style = _read("page.css")
    # A function around everything keeps the names from the browser's own.
    script = f'(() => {{\n"use strict";\n{"".join(map(_read, _SCRIPTS))}}})();\n'
    text = _read("page.html").replace("/* page.css */", style).replace("/* scripts */", script)
    policy = (
        "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; connect-src 'self'; "
        f"img-src data:; script-src {_source(script)}; style-src {_source(style)}"
    )
    return text, policy


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """What allows a text within the page: its hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
