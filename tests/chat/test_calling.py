"""A chat whose model calls tools, on a screen: a model that recites, a person who types, programs that run."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import pytest

from abcli.chat.asking import Asker
from abcli.chat.controller import Chat
from abcli.chat.options import chat_options
from abcli.chat.session_format import Session
from abcli.chat.template import ChatTemplate
from abcli.engine.engine import Progress
from abcli.errors import AbcliError, CancelledError, NativeError, PromptError
from abcli.generate import Answer, Piece, Statistics
from abcli.native.model import Model
from abcli.sampling import GenerationConfig, SamplingConfig
from abcli.tools.outcome import Outcome, Runner, Stopped
from abcli.ui.chat_screen import ChatScreen
from abcli.ui.lines import Entry
from abcli.ui.terminal import Terminal
from abcli.ui.tool_desk import REFUSED, ToolDesk

CALL = '<tool_call>\n{"name": "look", "arguments": {"key": "a"}}\n</tool_call>'
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Reciting:
    """Stands for a model: gives its answers one after the other, the last again and again."""

    context_size = 4096

    def __init__(self, model: Model, *answers: str | AbcliError) -> None:
        self._model = model
        self._answers = list(answers)
        self.asked: list[list[int]] = []

    def held(self, slot: int) -> Sequence[int]:
        return []

    def piece(self, token: int) -> bytes:
        return self._model.piece(token)

    def check(self, sampling: SamplingConfig) -> None:
        pass

    def decode(
        self, tokens: Sequence[int], config: GenerationConfig, on_progress: Progress | None, slot: int | None
    ) -> Iterator[Piece]:
        self.asked.append(list(tokens))
        answer = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        running = Answer(0, 1, Statistics())
        if isinstance(answer, AbcliError):
            yield Piece(running, "")
            raise answer
        for end in range(1, len(answer) + 1):
            running.text = answer[:end]
            running.finish_reason = "stop" if end == len(answer) else None
            yield Piece(running, answer[end - 1])


class Typed:
    """Stands for a person: types what is given, then nothing."""

    def __init__(self, *lines: str | type[BaseException]) -> None:
        self._lines = list(lines)
        self.questions: list[str] = []

    def line(self, *, continued: bool) -> str:
        return self.answer("> ")

    def answer(self, question: str) -> str:
        self.questions.append(question)
        line = self._lines.pop(0) if self._lines else EOFError
        if isinstance(line, str):
            return line
        raise line


class Running:
    """Stands for a tool."""

    description = "look it up"

    def __init__(self, outcome: Outcome | AbcliError) -> None:
        self._outcome = outcome
        self.runs = 0

    def run(self, call: object, stopped: Stopped) -> Outcome:
        self.runs += 1
        if isinstance(self._outcome, AbcliError):
            raise self._outcome
        return self._outcome


class Bench:
    def __init__(self, model: Model, answers: Sequence[str | AbcliError], typed: Typed, **runners: Runner) -> None:
        self.model = Reciting(model, *answers)
        template = ChatTemplate(CHATML, model)
        options = chat_options({"tools": [{"name": "look", "parameters": {"properties": {"key": {"type": "string"}}}}]})
        self.chat = Chat(self.model, template, Asker(template), GenerationConfig(), options)
        self.output, self.errors = io.StringIO(), io.StringIO()
        terminal = Terminal(self.output, self.errors)
        self.desk = ToolDesk(terminal, typed, runners, max_rounds=3)
        self.screen = ChatScreen(
            terminal,
            typed,
            self.chat,
            lambda: None,
            None,
            Session(""),
            desk=self.desk,
            buckets=1,
            interactive=True,
            show_statistics=False,
        )

    @property
    def said(self) -> list[tuple[str, str]]:
        return [(message.role, message.content) for message in self.chat.conversation.messages]


def test_a_person_gives_the_result(bpe: Model) -> None:
    typed = Typed("What is a?", "It is <|im_end|> 3.", "/exit")
    bench = Bench(bpe, [CALL, "Three."], typed)
    bench.screen.loop()
    assert typed.questions == ["> ", "result of look> ", "> "]
    assert bench.said == [
        ("user", "What is a?"),
        ("assistant", ""),
        ("tool", "It is <|im_end|> 3."),
        ("assistant", "Three."),
    ]
    assert bench.output.getvalue() == "Three.\n"
    assert 'calls look {"key": "a"}' in bench.errors.getvalue()
    # What the tool printed is no control token for the model.
    assert bench.model.asked[1].count(bpe.control_tokens["<|im_end|>"]) == 4
    assert b"is <|im_end|> 3." in b"".join(bpe.piece(token, special=True) for token in bench.model.asked[1])


@pytest.mark.parametrize(
    ("typed", "runs", "result"), [(["y"], 1, "Sunny."), (["what?", "N"], 0, REFUSED), (["always"], 1, "Sunny.")]
)
def test_a_tool_runs_if_the_person_says_so(bpe: Model, typed: list[str], runs: int, result: str) -> None:
    person, tool = Typed("Go.", *typed), Running(Outcome("Sunny."))
    bench = Bench(bpe, [CALL, "Done."], person, look=tool)
    bench.screen.loop()
    assert (tool.runs, bench.said[2]) == (runs, ("tool", result))
    assert "run it? y/n/always> " in person.questions


def test_always_is_asked_once_and_rounds_end(bpe: Model) -> None:
    person, tool = Typed("Go.", "always", "Go on."), Running(Outcome("Sunny."))
    bench = Bench(bpe, [CALL], person, look=tool)
    bench.screen.loop()
    assert tool.runs == 6
    assert person.questions.count("run it? y/n/always> ") == 1
    assert "stopped after 3 rounds of calls: --max-rounds" in bench.errors.getvalue()
    assert ("tool", "There is no result.") in bench.said


def test_a_tool_that_fails_is_told_to_the_model(bpe: Model) -> None:
    bench = Bench(bpe, [CALL, "Sorry."], Typed("Go.", "y"), look=Running(Outcome("error: no key", "no key")))
    bench.screen.loop()
    assert "look failed: no key" in bench.errors.getvalue()
    assert bench.said[2:] == [("tool", "error: no key"), ("assistant", "Sorry.")]


@pytest.mark.parametrize("stop", [Running(CancelledError()), None])
def test_ctrl_c_stops_the_tool_and_keeps_the_chat(bpe: Model, stop: Runner | None) -> None:
    typed = Typed("Go.", "y", "More.") if stop else Typed("Go.", KeyboardInterrupt, "More.")
    bench = Bench(bpe, [CALL, "Yes."], typed, **({"look": stop} if stop else {}))
    bench.screen.loop()
    assert "stopped" in bench.errors.getvalue()
    assert bench.said[1:] == [
        ("assistant", ""),
        ("tool", "There is no result."),
        ("user", "More."),
        ("assistant", "Yes."),
    ]


def test_an_answer_that_fails_leaves_the_calls_pending(bpe: Model) -> None:
    bench = Bench(bpe, [CALL, NativeError("broken"), "Yes."], Typed("Go.", "3", "/regen"))
    bench.screen.loop()
    assert "error: broken" in bench.errors.getvalue()
    assert bench.said == [("user", "Go."), ("assistant", "Yes.")]


def test_an_input_that_ends_before_a_result(bpe: Model) -> None:
    bench = Bench(bpe, [CALL], Typed())
    with pytest.raises(PromptError, match="there is nothing to read for: result of look"):
        bench.screen.handle(Entry("Go.", is_block=False))


def test_thoughts_are_folded(bpe: Model) -> None:
    bench = Bench(bpe, ["<think>\nLet me see.\n</think>\n\nYes."], Typed("/thoughts", "Go.", "/thoughts"))
    bench.screen.loop()
    told = bench.errors.getvalue().splitlines()
    assert told == ["nothing was thought yet", "thinking ...", "(thought in 3 words: /thoughts)", "Let me see."]
    assert bench.output.getvalue() == "Yes.\n"
