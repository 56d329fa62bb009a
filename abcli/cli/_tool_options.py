"""The flags of `abcli chat` about who runs the calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

from abcli.chat.asking import check_tools
from abcli.chat.messages import Tool
from abcli.chat.options import ChatOptions, chat_options
from abcli.cli._flags import flag
from abcli.cli._options import check_argument
from abcli.errors import GrammarError, UsageError
from abcli.tools.outcome import Runner
from abcli.tools.program import parse_programs
from abcli.ui.terminal import Terminal

if TYPE_CHECKING:
    from abcli.tools.mcp_server import McpServer

_MAX_SECONDS = 24 * 3600


@dataclass(frozen=True)
class ToolRunFlags:
    """Who runs the calls of tools; without, the person is asked for each result."""

    panel: ClassVar[str] = "Running tools"

    tool_exec: Annotated[
        list[str] | None,
        flag(
            "Program that runs the calls of a tool: arguments on its standard input, as JSON; repeatable.",
            "--tool-exec",
            metavar="NAME=PROGRAM",
        ),
    ] = None
    mcp: Annotated[
        list[str] | None,
        flag(
            "Start a Model Context Protocol server whose tools may be called; repeatable; needs the extra 'mcp'.",
            "--mcp",
            metavar="COMMAND",
        ),
    ] = None
    yes: Annotated[bool, flag("Run calls without asking first.", "--yes", "-y")] = False
    tool_timeout: Annotated[float, flag("Seconds that a call may take.", "--tool-timeout")] = 60.0
    max_rounds: Annotated[int, flag("Rounds of calls that may follow one message.", "--max-rounds")] = 10

    def check(self, *, interactive: bool) -> None:
        """Raise UsageError for what makes no sense."""
        if not 0 < self.tool_timeout <= _MAX_SECONDS:
            raise UsageError(f"--tool-timeout {self.tool_timeout:g} is impossible", f"choose up to {_MAX_SECONDS}")
        if self.max_rounds < 1:
            raise UsageError(f"--max-rounds {self.max_rounds} is impossible", "choose 1 or more")
        if (self.tool_exec or self.mcp) and not self.yes and not interactive:
            raise UsageError("in a script nobody can be asked whether a tool may run", "add --yes")

    def servers(self, stack: ExitStack, terminal: Terminal) -> list[McpServer]:
        """The servers, which run until the stack closes. Raises UsageError and ToolServerError."""
        found = []
        for text in self.mcp or ():
            # Slow to import, and few have a server.
            from abcli.tools.mcp_server import McpServer

            command = check_argument(text, "--mcp")
            with terminal.working(f"starting {command}"):
                found.append(stack.enter_context(McpServer(command, self.tool_timeout)))
        return found

    def offered(self, servers: Sequence[McpServer], terminal: Terminal) -> ChatOptions:
        """Options with the servers' tools; one whose schema cannot be used is left out, with a warning."""
        tools = []
        for tool in (tool for server in servers for tool in server.tools):
            try:
                check_tools([tool])
                tools.append(tool)
            except GrammarError as error:
                terminal.warn(f"{error.message}, so it is left out")
        return chat_options({"tools": tools})

    def runners(self, tools: Sequence[Tool], servers: Sequence[McpServer]) -> dict[str, Runner]:
        """Who runs the calls of which tool. Raises UsageError for a program of no tool."""
        found: dict[str, Runner] = {tool.name: server for server in servers for tool in server.tools}
        texts = [check_argument(text, "--tool-exec") for text in self.tool_exec or ()]
        return found | parse_programs(texts, [tool.name for tool in tools], self.tool_timeout)
