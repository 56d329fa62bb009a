"""Turns a question into the tokens a model reads, and its answers into the tokens that are scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from abcli.chat.calls.format import CallFormat
from abcli.chat.known_templates import KNOWN_TEMPLATES
from abcli.chat.messages import Message, Tool
from abcli.chat.options import ChatOptions
from abcli.chat.template import ChatTemplate
from abcli.errors import TemplateError
from abcli.evals.questions import Question
from abcli.native.model import Model


@dataclass(frozen=True)
class TokenizedQuestion:
    """`prompt` ends with the answer's start; `continuations` has the right answer first, then the other candidates."""

    prompt: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]


class PromptMaker:
    """Makes prompts for one model: a chat turn if it has a chat template, else plain text."""

    def __init__(self, model: Model, template: ChatTemplate | None) -> None:
        """`template` is the model's, or the user's choice; None for a model without one."""
        self._model = model
        self._template = template

    @property
    def chats(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def count(self, text: str) -> int:
        """The number of tokens of `text` inside a prompt."""
        return len(self._model.tokenize(text, add_special=False, parse_special=False))

    def tokenize(self, question: Question) -> TokenizedQuestion:
        """The tokens of `question`. Raises PromptError and TemplateError."""
        if question.tools:
            return self._call(question)
        content = f"{question.context}\n\n{question.text}" if question.context else question.text
        if self._template is None:
            prompt = self._model.tokenize(f"{content}\n", add_special=True, parse_special=False)
        else:
            prompt = self._template.tokens([Message("user", content)])
        start = self._plain(question.answer_start)
        others = [text for text in question.candidates if text != question.answer]
        return TokenizedQuestion(
            (*prompt, *start),
            tuple(self._continuation(question.answer_start, start, text) for text in (question.answer, *others)),
        )

    def exchange(self, messages: Sequence[Message], answer: str) -> TokenizedQuestion:
        """The tokens of a conversation, and of the answer that is wanted. Raises PromptError and TemplateError."""
        if self._template is None and [message.role for message in messages] == ["user"]:
            prompt = self._model.tokenize(f"{messages[0].content}\n", add_special=True, parse_special=False)
        else:
            prompt = self._templated("to tell messages apart").tokens(messages)
        return TokenizedQuestion(tuple(prompt), (tuple(self._plain(answer)),))

    def call_format(self, tools: Sequence[Tool]) -> CallFormat:
        """How the model writes calls of `tools`. Raises TemplateError for a model without a chat template."""
        return self._templated().call_format(_calling(tools))

    def _call(self, question: Question) -> TokenizedQuestion:
        """A call of one of the tools, as `--tool-choice required` asks for it; scored are the name and what ends it."""
        template, options = self._templated(), _calling(question.tools)
        form = template.call_format(options)
        before, after = form.around_name
        if form.thoughts is not None and template.opens_thought(options):
            before = f"\n{form.thoughts.end}\n\n{before}"
        start = template.written_tokens(before)

        def named(name: str) -> tuple[int, ...]:
            whole = template.written_tokens(before + name + after)
            if whole[: len(start)] != start:
                whole = (*start, *template.written_tokens(name + after))
            return whole[len(start) : self._end_of(whole, len(start), name)]

        prompt = template.tokens([Message("user", question.text)], options)
        others = [name for name in question.candidates if name != question.answer]
        return TokenizedQuestion((*prompt, *start), tuple(map(named, (question.answer, *others))))

    def _end_of(self, tokens: Sequence[int], first: int, name: str) -> int:
        """Where the tokens of a name, from `first` on, end with one that is not of the name alone."""
        left = len(name.encode())
        for place in range(first, len(tokens)):
            left -= len(self._model.piece(tokens[place], special=True))
            if left < 0:
                return place + 1
        return len(tokens)

    def _templated(self, what: str = "to be told of tools") -> ChatTemplate:
        if self._template is None:
            raise TemplateError(
                f"{self._model.path.name} has no chat template, and so no way {what}",
                f"give `chat_template` with a file or one of: {', '.join(KNOWN_TEMPLATES)}",
            )
        return self._template

    def _continuation(self, beginning: str, start: list[int], text: str) -> tuple[int, ...]:
        whole = self._plain(beginning + text)
        if whole[: len(start)] == start and len(whole) > len(start):
            return tuple(whole[len(start) :])
        return tuple(self._plain(text))

    def _plain(self, text: str) -> list[int]:
        return self._model.tokenize(text, add_special=False, parse_special=False)


def _calling(tools: Sequence[Tool]) -> ChatOptions:
    """A call at once: what a model thinks before it would have to be written by it."""
    return ChatOptions(tuple(tools), "required", thinking="off")
