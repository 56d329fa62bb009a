"""A chat: a conversation, the slot it is decoded in, and the session file it is saved to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from collections.abc import Generator as Generating
from dataclasses import replace
from typing import Any, Protocol

from abcli.answer import Answer, finished_answer
from abcli.chat.continuation import continued
from abcli.chat.conversation import Conversation, Fitted, Overflow, fit
from abcli.chat.session import Session
from abcli.chat.template import ChatTemplate
from abcli.chat.thoughts import split_thought
from abcli.engine.engine import Progress
from abcli.errors import ContextFullError, PromptError, UsageError
from abcli.generate import Piece
from abcli.grammar.constraint import KINDS
from abcli.sampling import SETTINGS, GenerationConfig, SamplingConfig, field_of

# An answer as it grows; closing it early keeps in the conversation what there is.
Pieces = Generating[Piece, None, None]

_SLOT = 0


class Decoder(Protocol):
    """What a chat needs of a model."""

    @property
    def context_size(self) -> int:
        """The tokens the context can hold."""

    def held(self, slot: int) -> Sequence[int]:
        """The tokens that a slot holds."""

    def decode(
        self, tokens: Sequence[int], config: GenerationConfig, on_progress: Progress | None, slot: int | None
    ) -> Iterator[Piece]:
        """The pieces of the answer to `tokens`."""


class Chat:
    """Asks, undoes, regenerates; knows nothing of terminals. Errors leave the conversation as it was."""

    def __init__(
        self,
        decoder: Decoder,
        template: ChatTemplate,
        piece: Callable[[int], bytes],
        generation: GenerationConfig,
        check_sampling: Callable[[SamplingConfig], None],
        *,
        overflow: Overflow = "error",
    ) -> None:
        """`piece` gives a token's bytes; `check_sampling` raises UsageError for settings no sampler can have."""
        self._decoder = decoder
        self._template = template
        self._piece = piece
        self._check_sampling = check_sampling
        self.generation = generation
        self.overflow = overflow
        self.conversation = Conversation()
        self.dropped_turns = 0

    @property
    def used_tokens(self) -> int:
        """The tokens of the conversation that the context holds now."""
        return len(self._decoder.held(_SLOT))

    @property
    def context_size(self) -> int:
        """The tokens the context can hold."""
        return self._decoder.context_size

    def send(self, text: str) -> Answer:
        """The whole answer to `text`; raises as `ask` does."""
        for piece in self.ask(text):
            answer = piece.answer
        return finished_answer(answer)

    def ask(self, text: str, on_progress: Progress | None = None) -> Pieces:
        """Answer `text`; if nothing at all came of it, the conversation is as before.

        What was generated before an interruption stays in the conversation. Raises PromptError, TemplateError,
        ContextFullError, CancelledError, NativeError.
        """
        if not text.strip():
            raise PromptError("the message is empty", "type some text")
        self.conversation.add_user(text)
        try:
            yield from self._answer(on_progress)
        finally:
            if self.conversation.messages[-1].role == "user":
                self.conversation.undo()

    def regenerate(self, on_progress: Progress | None = None) -> Pieces:
        """Answer the last message once more; the old answer comes back if nothing replaces it.

        Raises UsageError if there is nothing to answer, else as `ask`.
        """
        if not self.conversation.turns:
            raise UsageError("there is no answer to regenerate", "ask something first")
        before = list(self.conversation.messages)
        self.conversation.regenerate()
        try:
            yield from self._answer(on_progress)
        finally:
            if self.conversation.messages[-1].role == "user":
                self.conversation.replace(before)

    def _answer(self, on_progress: Progress | None) -> Pieces:
        fitted = self._fit()
        self.dropped_turns = fitted.dropped_turns
        tokens = continued(self._decoder.held(_SLOT), fitted.tokens, self._piece)
        answer = None
        try:
            for piece in self._decoder.decode(tokens, self.generation, on_progress, _SLOT):
                answer = piece.answer
                yield piece
        finally:
            if answer is not None and answer.text:
                thought, text = split_thought(answer.text, opened=self._template.opens_thought())
                self.conversation.add_assistant(text, thought)

    def _fit(self) -> Fitted:
        reserve, limit = 1, self.generation.max_tokens
        if self.overflow == "shift":
            quarter = self.context_size // 4
            reserve = min(limit, quarter) if limit > 0 else quarter
        messages = self.conversation.messages
        try:
            return fit(messages, self._template, self.context_size, reserve, self.overflow, self.dropped_turns)
        except ContextFullError as error:
            advice = "shorten the message, or start with a larger `ctx_size`"
            if self.overflow == "error" and self.conversation.turns > 1:
                advice = "/clear begins anew; or start with `overflow=shift` or a larger `ctx_size`"
            raise ContextFullError(error.used, error.available, advice) from None

    def settings(self) -> dict[str, object]:
        """What `/set` can change, by the names of the flags, with the values now in force."""
        sampling = self.generation.sampling
        values: dict[str, object] = {setting.short: getattr(sampling, name) for name, setting in SETTINGS.items()}
        for name in (*KINDS, "schema_lenient"):
            values[name] = getattr(sampling, name)
        return {"system": self.conversation.system or "", "predict": self.generation.max_tokens, **values}

    def set(self, name: str, text: str) -> None:
        """Change one setting for the answers to come. Raises UsageError for a wrong name or value."""
        name = name.lstrip("-").replace("-", "_")
        current = self.settings()
        if name not in current:
            raise UsageError(f"there is no setting {name!r}", f"choose one of: {', '.join(current)}")
        if name == "system":
            self.conversation.system = text or None
            return
        value = _parsed(name, text, type(current[name]))
        if name == "predict":
            if not isinstance(value, int) or value < -1:
                raise UsageError(f"predict {value} is impossible", "choose 0 or more, or -1")
            self.generation = replace(self.generation, max_tokens=value)
            return
        changes: dict[str, Any] = {field_of(name): value}
        if name in KINDS:  # one takes the place of another
            changes = {**dict.fromkeys(KINDS, ""), **changes}
        sampling = replace(self.generation.sampling, **changes)
        self._check_sampling(sampling)
        self.generation = replace(self.generation, sampling=sampling)

    def store(self, session: Session) -> Session:
        """`session` with the conversation and settings as they are now."""
        return replace(session, messages=list(self.conversation.messages), sampling=self.generation.sampling)

    def restore(self, session: Session) -> None:
        """Continue the conversation of `session`; the settings stay."""
        self.conversation.replace(session.messages)
        self.dropped_turns = 0


def _parsed(name: str, text: str, kind: type) -> object:
    if kind is bool:
        if text not in ("true", "false"):
            raise UsageError(f"{name} {text!r} is neither true nor false", f"write it like /set {name} true")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"{name} {text!r} is not a number", f"write it like /set {name} 1") from None
