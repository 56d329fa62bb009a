"""Keeps strangers' web pages out: which hosts and origins may ask a server that trusts who can reach it."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from abcli.serve.problems import Problem
from abcli.serve.routing import problem_response

ANY = "*"
_METHODS = "GET, POST, OPTIONS"
_LOCAL_NAMES = ("localhost", "localhost.localdomain")


@dataclass(frozen=True)
class Access:
    """`hosts` are names that this server goes by beside addresses and localhost, "*" for any; `origins` are those of
    pages that may ask beside its own and localhost's, "*" for any."""

    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()

    def knows_host(self, host: str) -> bool:
        """Whether a Host header names this server: a page that has its own name point here (DNS rebinding) does not.

        An address cannot be pointed anywhere, so that all of them are fine.
        """
        name = host_name(host)
        return ANY in self.hosts or is_local_name(name) or _is_address(name) or name in _lower(self.hosts)

    def allows_origin(self, origin: str, host: str) -> bool:
        """Whether a page of `origin` may ask."""
        if ANY in self.origins or origin.lower() in _lower(self.origins):
            return True
        parts = _split(origin)
        name = host_name(parts)
        return is_local_name(name) or is_loopback(name) or (bool(parts) and parts == host.lower())


class Guard:
    """An ASGI application around another one that answers preflights and refuses foreign hosts and origins."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or refuse."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host, origin = headers.get("Host", ""), headers.get("Origin")
        if host and not self._access.knows_host(host):
            problem = Problem(403, "permission_error", f"this server does not go by the name {host!r:.100}")
            await problem_response(problem)(scope, receive, send)
        elif origin is None:
            await self._app(scope, receive, send)
        elif not self._access.allows_origin(origin, host):
            problem = Problem(403, "permission_error", f"pages of {origin!r:.100} may not ask this server")
            await problem_response(problem)(scope, receive, send)
        elif scope["method"] == "OPTIONS":
            await _preflight(headers, origin)(scope, receive, send)
        else:
            await self._app(scope, receive, _with_origin(send, origin))


def host_name(host: str) -> str:
    """The name in a Host header, without its port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].rstrip(".") if host.count(":") < 2 else host


def is_local_name(name: str) -> bool:
    """Whether a name always means this machine."""
    return name in _LOCAL_NAMES or name.endswith(".localhost")


def is_loopback(name: str) -> bool:
    """Whether an address is one of this machine that no other can reach, or a name for one."""
    if is_local_name(name):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _split(origin: str) -> str:
    """Host and port of an origin, empty for none such as "null"."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _lower(names: Iterable[str]) -> list[str]:
    return [name.lower() for name in names]


def _preflight(headers: Headers, origin: str) -> Response:
    wanted = headers.get("Access-Control-Request-Headers", "Authorization, Content-Type, X-Api-Key")
    return Response(
        headers={
            "Access-Control-Allow-Origin": origin,
            "Access-Control-Allow-Methods": _METHODS,
            "Access-Control-Allow-Headers": wanted,
            "Access-Control-Max-Age": "600",
            "Vary": "Origin",
        },
    )


def _with_origin(send: Send, origin: str) -> Send:
    async def send_allowed(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["Access-Control-Allow-Origin"] = origin
            headers.add_vary_header("Origin")
        await send(message)

    return send_allowed
