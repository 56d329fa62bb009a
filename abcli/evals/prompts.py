"""Turns a question into the tokens a model reads, and its answers into the tokens that are scored."""

from __future__ import annotations

from dataclasses import dataclass

from abcli.chat.messages import Message
from abcli.chat.template import ChatTemplate
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

    def count(self, text: str) -> int:
        """The number of tokens of `text` inside a prompt."""
        return len(self._model.tokenize(text, add_special=False, parse_special=False))

    def tokenize(self, question: Question) -> TokenizedQuestion:
        """The tokens of `question`. Raises PromptError and TemplateError."""
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

    def _continuation(self, beginning: str, start: list[int], text: str) -> tuple[int, ...]:
        whole = self._plain(beginning + text)
        if whole[: len(start)] == start and len(whole) > len(start):
            return tuple(whole[len(start) :])
        return tuple(self._plain(text))

    def _plain(self, text: str) -> list[int]:
        return self._model.tokenize(text, add_special=False, parse_special=False)
