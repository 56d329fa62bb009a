"""Tools of a server that speaks the Model Context Protocol over its standard input and output."""

from __future__ import annotations

import json
import shlex
import shutil
import tempfile
from collections.abc import AsyncIterator
from concurrent.futures import Future, TimeoutError
from contextlib import ExitStack, asynccontextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from abcli.chat.messages import Tool, ToolCall
from abcli.chat.tools import MAX_TOOLS, read_tool
from abcli.errors import CancelledError, ToolServerError, UsageError
from abcli.tools.outcome import MAX_OUTPUT_BYTES, Outcome, Stopped, bounded

if TYPE_CHECKING:
    from mcp import ClientSession, StdioServerParameters

_LOOK_SECONDS = 0.05
_SHOWN_CHARACTERS = 300


class McpServer:
    """A running server, which may be anything: it gets so many seconds for an answer, and no more of the output counts
    than a model can read. Close it, or use it as a context manager.
    """

    def __init__(self, command_line: str, seconds: float) -> None:
        """Start the server and ask for its tools.

        Raises UsageError for a command that is none or if the extra "mcp" is missing, ToolServerError for a server that
        does not answer as it should.
        """
        words = _words(command_line)
        try:
            from anyio.from_thread import start_blocking_portal
            from mcp import StdioServerParameters
        except ImportError as error:
            raise UsageError(
                f"`mcp` needs the package mcp, which cannot be loaded: {error}", "pip install 'abcli[mcp]'"
            ) from None
        self.description = shlex.join(words)
        self._seconds = seconds
        parameters = StdioServerParameters(command=words[0], args=words[1:], encoding_error_handler="replace")
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            try:
                with ExitStack() as stack:
                    self._portal = stack.enter_context(start_blocking_portal())
                    opening = self._portal.wrap_async_context_manager(_session(parameters, errors, seconds))
                    self._session = stack.enter_context(opening)
                    found = self._portal.call(_listed, self._session, seconds)
                    self.tools = tuple(map(_tool, found))
                    self._stack = stack.pop_all()
            except Exception as error:  # whatever the server makes the client's package raise
                raise ToolServerError(
                    f"{self.description} cannot be used: {_reason(error)}", _last_words(errors)
                ) from None

    tools: tuple[Tool, ...]
    """What the server offers."""

    def __enter__(self) -> McpServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server; a second call does nothing."""
        # Of a server that is broken nothing is left to be ended.
        with suppress(Exception):
            self._stack.close()

    def run(self, call: ToolCall, stopped: Stopped) -> Outcome:
        """See `abcli.tools.outcome.Runner`; a server that fails, is gone or too slow gives an outcome that says so."""
        future = self._portal.start_task_soon(
            _called, self._session, call.name, json.loads(call.arguments), self._seconds
        )
        try:
            return _outcome(_waited(future, stopped))
        except CancelledError:
            future.cancel()
            raise
        except Exception as error:  # whatever the server makes the client's package raise
            problem = _reason(error)
            return Outcome(f"error: {problem}", problem)


@asynccontextmanager
async def _session(parameters: StdioServerParameters, errors: TextIO, seconds: float) -> AsyncIterator[ClientSession]:
    from anyio import fail_after
    from mcp import ClientSession, stdio_client

    async with stdio_client(parameters, errors) as (read, write), ClientSession(read, write) as session:
        with fail_after(seconds):
            await session.initialize()
        yield session


async def _listed(session: ClientSession, seconds: float) -> list[Any]:
    """All tools of the server, which may be given on several pages."""
    from anyio import fail_after
    from mcp.types import PaginatedRequestParams

    found: list[Any] = []
    with fail_after(seconds):
        page = await session.list_tools()
        found += page.tools
        while page.next_cursor and len(found) <= MAX_TOOLS:
            page = await session.list_tools(params=PaginatedRequestParams(cursor=page.next_cursor))
            found += page.tools
    return found


async def _called(session: ClientSession, name: str, arguments: dict[str, Any], seconds: float) -> Any:
    from anyio import fail_after

    with fail_after(seconds):
        return await session.call_tool(name, arguments)


def _waited(future: Future[Any], stopped: Stopped) -> Any:
    while True:
        try:
            return future.result(_LOOK_SECONDS)
        except TimeoutError:
            # Python 3.11 and later raise the same for what took too long there.
            if future.done():
                raise
            if stopped():
                raise CancelledError from None


def _outcome(result: Any) -> Outcome:
    """What a server's answer says, as text."""
    parts = [getattr(part, "text", None) or f"({part.type})" for part in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    text = bounded("\n".join(parts).encode("utf-8", "replace")) or "(no output)"
    return Outcome(f"error: {text}", text.splitlines()[0][:_SHOWN_CHARACTERS]) if result.is_error else Outcome(text)


def _tool(item: Any) -> Tool:
    return read_tool({"name": item.name, "description": item.description, "parameters": item.input_schema}, item.name)


def _last_words(errors: TextIO) -> str:
    """A hint: what the server itself said last."""
    errors.seek(0)
    said = errors.read(MAX_OUTPUT_BYTES).strip().splitlines()
    return f"it said: {said[-1][:_SHOWN_CHARACTERS]}" if said else "run it by itself to see what it does"


def _words(command_line: str) -> list[str]:
    try:
        words = shlex.split(command_line)
    except ValueError as error:
        raise UsageError(f"`mcp` {command_line!r:.80} cannot be read: {error}", "check its quotes") from None
    if not words or shutil.which(words[0]) is None:
        raise UsageError(f"there is no program {(words or [''])[0]!r:.80}", "give its path, and check its permissions")
    return words


def _reason(error: BaseException) -> str:
    """What went wrong, on one line; a group of errors is what its first is."""
    while isinstance(inner := getattr(error, "exceptions", None), (list, tuple)) and inner:
        error = inner[0]
    if isinstance(error, TimeoutError):
        return "it did not answer in time"
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
