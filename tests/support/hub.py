"""A stand-in for the hub on loopback: the parts of its interface that a download uses, and its ways of failing.

The hub answers `/api/models/...` and `/user/repository/resolve/...`; files come from a second port, to which it
redirects, as the real one does. Every request is kept.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_" + "SecretToken" * 3


@dataclass(frozen=True)
class Fault:
    """What happens to one request for a file's content, from the front of `HubStandIn.faults`."""

    status: int = 0
    cut_after: int | None = None
    """Close the connection after so many bytes of the body."""
    hang_after: int | None = None
    """Send so many bytes, then nothing until `HubStandIn.release` is set."""
    ignore_range: bool = False
    wrong_bytes: bool = False
    extra: bytes = b""
    length: int | None = None
    """Announce and send only so many bytes."""


@dataclass
class Repository:
    """One repository: the files of each commit, and what its branches stand for."""

    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str]
    gated: bool = False
    private: bool = False
    large_storage: bool = True


@dataclass(frozen=True)
class Request:
    """A request that came in; `server` is "hub" or "cdn", the names of `headers` are in small letters."""

    server: str
    method: str
    path: str
    headers: dict[str, str]


def commit_of(files: dict[str, bytes]) -> str:
    """A commit's hash: whatever, but always the same for the same content."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class HubStandIn:
    """The state of the two servers; a test changes it while they run."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    faults: deque[Fault] = field(default_factory=deque)
    requests: list[Request] = field(default_factory=list)
    api_status: int = 0
    api_body: bytes | None = None
    head_status: int = 0
    redirects: bool = True
    release: threading.Event = field(default_factory=threading.Event)
    endpoint: str = ""
    cdn: str = ""

    def add(self, name: str, files: dict[str, bytes], **settings: bool) -> str:
        """Add or replace a repository; the commit of `main`."""
        commit = commit_of(files)
        old = self.repositories.get(name)
        commits = {**(old.commits if old is not None else {}), commit: files}
        self.repositories[name] = Repository(commits, {"main": commit}, **settings)
        return commit

    def content_requests(self) -> list[Request]:
        """The requests for the content of files, at the server that sent it."""
        where = "cdn" if self.redirects else "hub"
        return [
            request
            for request in self.requests
            if request.server == where and request.method == "GET" and not request.path.startswith("/api/")
        ]

    def environment(self, home: Path) -> dict[str, str]:
        """The variables that make a process of its own use the stand-in."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubStandIn
    kind: str

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        # Nothing of a connection that was cut may be left to the next request on it.
        self.close_connection = True
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(
            Request(self.kind, self.command, path, {key.lower(): value for key, value in self.headers.items()})
        )
        try:
            if self.kind == "cdn":
                self._content(self._blob(path.removeprefix("/blob/")))
            elif path.startswith("/api/models/"):
                self._information(path.removeprefix("/api/models/"))
            else:
                self._resolve(path.lstrip("/"))
        except (BrokenPipeError, ConnectionResetError):
            pass

    def _information(self, path: str) -> None:
        name, _, revision = path.partition("/revision/")
        repository = self.hub.repositories.get(name)
        if self.hub.api_status:
            self._error(self.hub.api_status)
        elif self.hub.api_body is not None:
            self._send(200, self.hub.api_body)
        elif repository is None or (repository.private and not self._known_token()):
            self._error(404, "RepoNotFound")
        elif (commit := self._commit(repository, revision or "main")) is None:
            self._error(404, "RevisionNotFound")
        else:
            siblings = [_sibling(path, data, repository) for path, data in repository.commits[commit].items()]
            self._send(200, json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())

    def _resolve(self, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        revision, _, file = rest.partition("/")
        repository = self.hub.repositories.get(name)
        if self.command == "HEAD" and self.hub.head_status:
            self._error(self.hub.head_status)
            return
        if repository is None:
            self._error(404, "RepoNotFound")
            return
        if repository.gated and not self._known_token():
            self._error(403 if self.headers.get("Authorization") else 401, "GatedRepo")
            return
        commit = self._commit(repository, revision)
        if commit is None or file not in repository.commits[commit]:
            self._error(404, "RevisionNotFound" if commit is None else "EntryNotFound")
            return
        data = repository.commits[commit][file]
        etag = _digest(data, repository)
        headers = {"X-Repo-Commit": commit, "X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if self.hub.redirects:
            location = f"{self.hub.cdn}/blob/{hashlib.sha256(data).hexdigest()}"
            self._send(302, b"", {**headers, "Location": location})
        elif self.command == "HEAD":
            self._send(200, b"", {**headers, "ETag": f'"{etag}"'}, length=len(data))
        else:
            self._content(data)

    def _content(self, data: bytes) -> None:
        """Send a file, or the rest of it that is asked for, with the next fault."""
        fault = self.hub.faults.popleft() if self.hub.faults else Fault()
        if fault.status:
            self._error(fault.status)
            return
        if fault.wrong_bytes:
            data = bytes(byte ^ 0xFF for byte in data)
        data += fault.extra
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        headers, status = {}, 200
        if begin >= len(data):
            self._error(416)
            return
        if begin and not fault.ignore_range:
            status, headers = 206, {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"}
            data = data[begin:]
        if fault.length is not None:
            data = data[: fault.length]
        sent = data
        for limit in (fault.cut_after, fault.hang_after):
            sent = sent[:limit]
        self._send(status, sent, headers, length=len(data))
        if fault.hang_after is not None:
            self.wfile.flush()
            self.hub.release.wait(60)

    def _blob(self, digest: str) -> bytes:
        return next(
            data
            for repository in self.hub.repositories.values()
            for files in repository.commits.values()
            for data in files.values()
            if hashlib.sha256(data).hexdigest() == digest
        )

    def _commit(self, repository: Repository, revision: str) -> str | None:
        commit = repository.refs.get(revision, revision)
        return commit if commit in repository.commits else None

    def _known_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _error(self, status: int, code: str = "") -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _digest(data: bytes, repository: Repository) -> str:
    if repository.large_storage:
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _sibling(path: str, data: bytes, repository: Repository) -> dict[str, object]:
    sibling: dict[str, object] = {"rfilename": path, "size": len(data), "blobId": "0" * 40}
    if repository.large_storage:
        sibling["lfs"] = {"sha256": _digest(data, repository), "size": len(data), "pointerSize": 134}
    else:
        sibling["blobId"] = _digest(data, repository)
    return sibling


@contextmanager
def running_hub() -> Iterator[HubStandIn]:
    """The two servers, on free ports of 127.0.0.1, as long as the block runs."""
    hub = HubStandIn()
    servers = []
    for kind in ("hub", "cdn"):
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub, "kind": kind}))
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        servers.append((server, thread))
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server, _thread in servers)
    try:
        yield hub
    finally:
        hub.release.set()
        for server, thread in servers:
            server.shutdown()
            server.server_close()
            thread.join()


@contextmanager
def pointed_at(hub: HubStandIn, home: Path) -> Iterator[Path]:
    """Let huggingface_hub in this process use the stand-in and a cache below `home`; the cache."""
    import huggingface_hub
    from huggingface_hub import constants

    from abcli.hub import transfer

    cache = home / "hub"
    with pytest.MonkeyPatch.context() as patch:
        # huggingface_hub reads the environment when it is imported, which other tests may have done.
        patch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        patch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.delenv("HF_TOKEN", raising=False)
        patch.setenv("NO_PROXY", "127.0.0.1")
        patch.setattr(transfer, "WAITS", (0.0, 0.0, 0.0))
        # The library waits seconds before it asks again.
        patch.setattr("huggingface_hub.utils._http.time.sleep", lambda _seconds: None)
        yield cache
    huggingface_hub.close_session()
