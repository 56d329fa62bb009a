"""The flags of `abcli chat` about who runs the calls of tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from abcli.chat.messages import Tool
from abcli.cli._flags import flag
from abcli.cli._options import check_argument
from abcli.errors import UsageError
from abcli.tools.outcome import Runner
from abcli.tools.program import parse_programs

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
    yes: Annotated[bool, flag("Run calls without asking first.", "--yes", "-y")] = False
    tool_timeout: Annotated[float, flag("Seconds that a call may take.", "--tool-timeout")] = 60.0
    max_rounds: Annotated[int, flag("Rounds of calls that may follow one message.", "--max-rounds")] = 10

    def runners(self, tools: tuple[Tool, ...], *, interactive: bool) -> dict[str, Runner]:
        """Who runs the calls of which tool. Raises UsageError for what makes no sense."""
        if not 0 < self.tool_timeout <= _MAX_SECONDS:
            raise UsageError(f"--tool-timeout {self.tool_timeout:g} is impossible", f"choose up to {_MAX_SECONDS}")
        if self.max_rounds < 1:
            raise UsageError(f"--max-rounds {self.max_rounds} is impossible", "choose 1 or more")
        texts = [check_argument(text, "--tool-exec") for text in self.tool_exec or ()]
        if texts and not self.yes and not interactive:
            raise UsageError("in a script nobody can be asked whether a tool may run", "add --yes")
        return dict(parse_programs(texts, [tool.name for tool in tools], self.tool_timeout))
