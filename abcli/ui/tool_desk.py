"""Where calls of tools are shown, allowed or refused, run, or answered by the person."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from abcli.chat.messages import ToolCall
from abcli.errors import CancelledError, PromptError
from abcli.tools.outcome import Outcome, Runner
from abcli.ui.lines import LineReader
from abcli.ui.terminal import Terminal, on_interrupt

REFUSED = "The user does not want this call to be made."
_ANSWERS = {"y": "yes", "yes": "yes", "n": "no", "no": "no", "a": "always", "always": "always"}
_SHOWN_CHARACTERS = 2_000


class ToolDesk:
    """Gets the results of calls from the programs and servers that run them, else from the person."""

    def __init__(
        self,
        terminal: Terminal,
        reader: LineReader,
        runners: Mapping[str, Runner],
        *,
        ask_first: bool = True,
        max_rounds: int,
    ) -> None:
        """`ask_first`: nothing is run before the person has said so; `max_rounds` of calls follow one message."""
        self.max_rounds = max_rounds
        self._terminal = terminal
        self._reader = reader
        self._runners = runners
        self._ask_first = ask_first
        self._always: set[str] = set()

    def results(self, calls: Sequence[ToolCall]) -> list[str]:
        """The result of each call. Raises CancelledError if the person stops it, PromptError at the input's end."""
        return [self._result(call) for call in calls]

    def _result(self, call: ToolCall) -> str:
        self._terminal.note(f"calls {call.name} {_shown(call.arguments)}")
        runner = self._runners.get(call.name)
        if runner is None:
            return self._typed(f"result of {call.name}> ")
        if not self._allowed(call.name, runner):
            return REFUSED
        outcome = self._ran(runner, call)
        if outcome.problem:
            self._terminal.warn(f"{call.name} failed: {outcome.problem}")
        else:
            self._terminal.note(f"{call.name}: {_shown(outcome.text)}")
        return outcome.text

    def _ran(self, runner: Runner, call: ToolCall) -> Outcome:
        stopped = False

        def stop() -> None:
            nonlocal stopped
            stopped = True

        with on_interrupt(stop), self._terminal.working(f"running {call.name}"):
            return runner.run(call, lambda: stopped)

    def _allowed(self, name: str, runner: Runner) -> bool:
        if not self._ask_first or name in self._always:
            return True
        self._terminal.note(f"it would run: {runner.description}")
        while True:
            typed = self._typed("run it? y/n/always> ").strip().lower()
            answer = _ANSWERS.get(typed)
            if answer == "always":
                self._always.add(name)
            if answer is not None:
                return answer != "no"
            self._terminal.note("type y, n or always; Ctrl-C stops")

    def _typed(self, question: str) -> str:
        try:
            return self._reader.answer(question)
        except KeyboardInterrupt:
            raise CancelledError from None
        except EOFError:
            raise PromptError(f"there is nothing to read for: {question}", "give every call a result") from None


def _shown(text: str) -> str:
    """Arguments or a result on few lines; JSON without its line ends."""
    try:
        text = json.dumps(json.loads(text), ensure_ascii=False)
    except (ValueError, RecursionError):
        text = text.strip()
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
