"""The flags about tools, thoughts and what else a chat template shall know."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

from abcli.chat.asking import check_tools
from abcli.chat.options import ChatOptions, ReasoningFormat, Thinking, chat_options
from abcli.chat.tools import read_tools_file
from abcli.cli._flags import flag
from abcli.cli._options import check_argument

_DEFAULTS = ChatOptions()


@dataclass(frozen=True)
class ChatFlags:
    """Which tools a model may call, whether it thinks, and what its template is told."""

    panel: ClassVar[str] = "Tools and thoughts"

    tools: Annotated[
        Path | None, flag("JSON file with the functions that may be called, as OpenAI's clients write them.", "--tools")
    ] = None
    tool_choice: Annotated[
        str, flag("auto, none, required, or the name of the tool to call.", "--tool-choice", metavar="CHOICE")
    ] = _DEFAULTS.tool_choice
    parallel_tool_calls: Annotated[
        bool, flag("More than one call in an answer.", "--parallel-tool-calls/--no-parallel-tool-calls")
    ] = _DEFAULTS.parallel_tool_calls
    thinking: Annotated[
        Thinking, flag("Whether the model thinks first, where its template leaves that open.", "--thinking")
    ] = _DEFAULTS.thinking
    thinking_budget: Annotated[
        int, flag("Most tokens of a thought; -1: no limit.", "--thinking-budget", "--reasoning-budget")
    ] = _DEFAULTS.thinking_budget
    reasoning_effort: Annotated[
        str, flag("How hard to think, for templates that know it.", "--reasoning-effort", metavar="WORD")
    ] = _DEFAULTS.reasoning_effort
    reasoning_format: Annotated[
        ReasoningFormat,
        flag(
            "Where thoughts go: apart (auto, deepseek), left in the text (none), or both (deepseek-legacy).",
            "--reasoning-format",
        ),
    ] = _DEFAULTS.reasoning_format
    chat_template_kwargs: Annotated[
        str, flag("Variables for the chat template, as a JSON object.", "--chat-template-kwargs", metavar="JSON")
    ] = _DEFAULTS.chat_template_kwargs

    def options(self, further: ChatOptions = _DEFAULTS) -> ChatOptions:
        """The options, on top of `further`; the file of tools is read. Raises UsageError, PromptError
        and GrammarError."""
        settings: dict[str, Any] = {
            "parallel_tool_calls": self.parallel_tool_calls,
            "thinking": self.thinking,
            "thinking_budget": self.thinking_budget,
            "reasoning_format": self.reasoning_format,
            "chat_template_kwargs": check_argument(self.chat_template_kwargs, "--chat-template-kwargs"),
            "tool_choice": check_argument(self.tool_choice, "--tool-choice"),
        }
        if self.reasoning_effort:
            settings["reasoning_effort"] = check_argument(self.reasoning_effort, "--reasoning-effort")
        if self.tools is not None:
            settings["tools"] = (*further.tools, *read_tools_file(self.tools))
        options = chat_options(settings, further)
        check_tools(options.tools)
        return options
