"""From a conversation and its options to what a model is asked, and from what it writes to an answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from abcli.chat.answer import Answer, Piece, finished_answer
from abcli.chat.calls.events import ContentText, Event, ThoughtText
from abcli.chat.calls.format import CallFormat
from abcli.chat.calls.grammar import call_grammar
from abcli.chat.calls.parser import AnswerParser
from abcli.chat.messages import Message, Tool, ToolCall
from abcli.chat.options import OPTIONS, ChatOptions, chat_options
from abcli.chat.template import ChatTemplate
from abcli.chat.tools import without_notes
from abcli.errors import GrammarError, UsageError
from abcli.generate import Answer as RunningAnswer
from abcli.generate import Piece as RunningPiece
from abcli.grammar.check import check
from abcli.grammar.constraint import KINDS, NAMES
from abcli.sampling import GenerationConfig, SamplingConfig, Steering, ThoughtLimit, generation_config

_KEPT = 64


@dataclass(frozen=True)
class Asked:
    """A prompt's tokens, how to decode its answer, and who reads that."""

    tokens: Sequence[int]
    generation: GenerationConfig
    reader: Callable[[], AnswerReader]


class Asker:
    """Asks one model through its chat template."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._grammar = lru_cache(_KEPT)(self._written_grammar)

    def ask(
        self,
        messages: Sequence[Message],
        options: ChatOptions,
        generation: GenerationConfig,
        *,
        continues: bool = False,
    ) -> Asked:
        """What is asked; with `continues` the last message is the beginning of the answer.

        Raises PromptError, TemplateError, and UsageError for tools beside a grammar or schema.
        """
        check_together(options, generation.sampling)
        template = self._template
        tokens = template.continued_tokens(messages, options) if continues else template.tokens(messages, options)
        return self.asked(tokens, options, generation)

    def asked(self, tokens: Sequence[int], options: ChatOptions, generation: GenerationConfig) -> Asked:
        """The same for a conversation that is tokens already."""
        sampling = generation.sampling
        form = self._template.call_format(options)
        opened = self._template.opens_thought(options)
        shown = self._template.tokens_in(_texts(form) + "\n".join(form.openers))
        limit = self._thought_limit(form, options, opened)
        kind = next((kind for kind in KINDS if getattr(sampling, kind)), None)
        check_together(options, sampling)
        if options.usable_tools:
            sampling = replace(sampling, lark=self._grammar(options, opened), schema_lenient=True)
        # Where all of an answer follows a grammar there is no thought in it, unless the grammar speaks of it.
        thoughtless = form.thoughts is None or (kind and form.thoughts.end not in getattr(sampling, kind))
        if options.reasoning_format == "none" or thoughtless:
            form, opened = replace(form, thoughts=None), False
        steering = Steering(shown, None if thoughtless else limit)
        steered = replace(generation, sampling=sampling, steering=steering)
        return Asked(tokens, steered, lambda: AnswerReader(form, options, thought_opened=opened))

    def _thought_limit(self, form: CallFormat, options: ChatOptions, opened: bool) -> ThoughtLimit | None:
        """What ends thoughts that have used up their budget."""
        thoughts, budget = form.thoughts, options.thinking_budget
        if budget < 0 or thoughts is None:
            return None
        written = self._template.written_tokens
        if form.channels is None:
            return ThoughtLimit(budget, opened, thoughts.begin, thoughts.end, written(f"\n{thoughts.end}\n\n"))
        # A thought is a message of its own: the next one's header follows.
        closing, saying = written(form.between), written(form.framing[0])
        return ThoughtLimit(budget, opened, thoughts.begin, thoughts.end, closing, saying)

    def _written_grammar(self, options: ChatOptions, opened: bool) -> str:
        tools, choice = [without_notes(tool) for tool in options.usable_tools], options.tool_choice
        chosen = next((tool for tool in tools if tool.name == choice), None)
        return call_grammar(
            self._template.call_format(options),
            tools,
            chosen or ("required" if choice == "required" else "auto"),
            options.parallel_tool_calls,
            self._template.special_tokens,
            thought_opened=opened,
        )


class AnswerReader:
    """Tells one answer apart into text, thought and calls as it comes."""

    def __init__(self, form: CallFormat | None, options: ChatOptions, *, thought_opened: bool = False) -> None:
        """Without a `form` all is text."""
        self._parser = (
            AnswerParser(form, options.usable_tools, thought_opened=thought_opened) if form is not None else None
        )
        thoughts = form.thoughts if form is not None else None
        self._tags = (thoughts.begin, thoughts.end) if thoughts else ("", "")
        self._keeps_thoughts = options.reasoning_format == "deepseek-legacy"
        self._thinking = False
        self._text, self._said, self._thought = "", "", ""

    @property
    def said(self) -> str:
        """What was said so far, without thoughts."""
        return self._said

    @property
    def thought(self) -> str:
        """What was thought so far."""
        return self._thought

    @property
    def calls(self) -> tuple[ToolCall, ...]:
        """The calls that are complete."""
        return self._parser.calls if self._parser is not None else ()

    def read(self, pieces: Iterator[RunningPiece]) -> Iterator[Piece]:
        """The pieces of an answer told apart; the last has the whole answer."""
        for piece in pieces:
            yield self.add(piece)

    def add(self, piece: RunningPiece) -> Piece:
        """What a piece adds."""
        running = piece.answer
        if running.finish_reason is None:
            return self._told(self._events(piece.text), running)
        told = self._told([*self._events(piece.text), *self._end(cut=running.finish_reason == "length")], running)
        return replace(told, answer=finished_answer(running, self._text, self._thought, self.calls))

    def whole(self, running: RunningAnswer) -> Answer:
        """The answer, all of which is there."""
        answer = self.add(RunningPiece(running, running.text)).answer
        assert answer is not None  # noqa: S101 - it is complete
        return answer

    def stop(self, running: RunningAnswer) -> None:
        """Nothing more comes, because the answer was broken off."""
        self._told(self._end(cut=True), running)

    def _end(self, *, cut: bool) -> list[Event]:
        return self._parser.finish(cut) if self._parser is not None else []

    def _events(self, text: str) -> list[Event]:
        return self._parser.feed(text) if self._parser is not None else [ContentText(text)]

    def _told(self, events: Sequence[Event], running: RunningAnswer) -> Piece:
        text, thought, calls = "", "", []
        for event in events:
            if isinstance(event, ThoughtText):
                thought += event.text
                text += self._kept(event.text)
            else:
                text += self._closed()
                if isinstance(event, ContentText):
                    text += event.text
                    self._said += event.text
                else:
                    calls.append(event)
        self._text += text
        self._thought += thought
        return Piece(text, reasoning=thought, events=tuple(calls), running=running)

    def _kept(self, thought: str) -> str:
        """A piece of a thought as the text has it."""
        if not self._keeps_thoughts:
            return ""
        begin = "" if self._thinking else self._tags[0]
        self._thinking = True
        return begin + thought

    def _closed(self) -> str:
        """The end of a thought that the text has."""
        end = self._tags[1] if self._thinking else ""
        self._thinking = False
        return end


def check_together(options: ChatOptions, sampling: SamplingConfig) -> None:
    """Raise UsageError for tools beside something else that the answer has to follow."""
    kind = next((kind for kind in KINDS if getattr(sampling, kind)), None)
    if kind is not None and options.usable_tools:
        raise UsageError(f"both tools and {NAMES[kind]} are given", "give only one of them", setting="tools")


def check_tools(tools: Sequence[Tool]) -> None:
    """Raise GrammarError, with the tool and the place, for a schema of arguments that cannot be used."""
    for tool in tools:
        schema = json.dumps(tool.parameters, ensure_ascii=False)
        try:
            check(SamplingConfig(json_schema=schema, schema_lenient=True))
        except GrammarError as error:
            raise GrammarError(f"the tool {tool.name} cannot be called: {error.message}", error.hint) from None


def plain_asked(tokens: Sequence[int], generation: GenerationConfig) -> Asked:
    """What is asked of a model without a chat template: the answer is all text."""
    return Asked(tokens, generation, lambda: AnswerReader(None, ChatOptions()))


def _texts(value: Any) -> str:
    """All texts in a format, which may contain control tokens."""
    if dataclasses.is_dataclass(value):
        return "\n".join(_texts(getattr(value, item.name)) for item in dataclasses.fields(value))
    if isinstance(value, tuple):
        return "\n".join(map(_texts, value))
    return value if isinstance(value, str) else ""


def split_settings(settings: Mapping[str, Any]) -> tuple[ChatOptions, GenerationConfig]:
    """Settings by their names as what a conversation's template is told, and how its answer is decoded.

    Raises UsageError and PromptError for those that are not known or make no sense.
    """
    own = {name: value for name, value in settings.items() if name in OPTIONS}
    others = {name: value for name, value in settings.items() if name not in OPTIONS}
    return chat_options(own, others.pop("options", None)), generation_config(**others)
