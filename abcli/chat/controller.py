"""A chat: a conversation, the slot it is decoded in, and the session file it is saved to."""

from __future__ import annotations

from collections.abc import Generator as Generating
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from abcli.chat.answer import Answer, Piece
from abcli.chat.asking import Asker
from abcli.chat.continuation import continued
from abcli.chat.conversation import Conversation, Fitted, Overflow, fit
from abcli.chat.messages import Message, ToolCall
from abcli.chat.options import ChatOptions, chat_options
from abcli.chat.session import Session
from abcli.chat.template import ChatTemplate
from abcli.engine.engine import Progress
from abcli.errors import ContextFullError, PromptError, UsageError
from abcli.generate import Piece as RunningPiece
from abcli.grammar.constraint import KINDS
from abcli.sampling import SETTINGS, GenerationConfig, SamplingConfig, field_of, parse_gate, parse_lookup
from abcli.trace.trace import Trace

# An answer as it grows; closing it early keeps in the conversation what there is.
Pieces = Generating[Piece, None, None]

_SLOT = 0
_OPTIONS = ("thinking", "thinking_budget", "reasoning_effort", "reasoning_format", "tool_choice")


class Decoder(Protocol):
    """What a chat needs of a model."""

    @property
    def context_size(self) -> int:
        """The tokens the context can hold."""

    def held(self, slot: int) -> Sequence[int]:
        """The tokens that a slot holds."""

    def decode(
        self, tokens: Sequence[int], config: GenerationConfig, on_progress: Progress | None, slot: int | None
    ) -> Iterator[RunningPiece]:
        """The pieces of the answer to `tokens`."""

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; nothing for control tokens."""

    def trace(self, prompt: Sequence[int], answer: Sequence[int], on_trace: Progress | None, slot: int) -> Trace:
        """What the buckets see of an answer that follows a prompt."""

    def check(self, sampling: SamplingConfig) -> None:
        """Raise UsageError or GrammarError for settings that no sampler can have."""


class Chat:
    """Asks, undoes, regenerates; knows nothing of terminals. Errors leave the conversation as it was."""

    def __init__(
        self,
        decoder: Decoder,
        template: ChatTemplate,
        asker: Asker,
        generation: GenerationConfig,
        options: ChatOptions,
        *,
        overflow: Overflow = "error",
    ) -> None:
        self._decoder = decoder
        self._template = template
        self._asker = asker
        self.generation = generation
        self.options = options
        self.overflow = overflow
        self.conversation = Conversation()
        self.dropped_turns = 0
        self.answered = False
        """Whether the last answer, or what there is of it, is in the conversation."""
        self._last: tuple[Sequence[int], Sequence[int]] | None = None

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
        return _last(self.ask(text))

    def send_results(self, results: Sequence[str]) -> Answer:
        """The whole answer to what came of the calls; raises as `reply` does."""
        return _last(self.reply(results))

    @property
    def pending_calls(self) -> tuple[ToolCall, ...]:
        """The calls of the last answer that wait for results."""
        return self.conversation.pending_calls

    def ask(self, text: str, on_progress: Progress | None = None) -> Pieces:
        """Answer `text`; if nothing at all came of it, the conversation is as before.

        What was generated before an interruption stays in the conversation. Raises PromptError, TemplateError,
        ContextFullError, CancelledError, NativeError.
        """
        if not text.strip():
            raise PromptError("the message is empty", "type some text")
        before = self.conversation.messages
        self.conversation.add_user(text)
        yield from self._answer(before, on_progress, self.options)

    def reply(self, results: Sequence[str], on_progress: Progress | None = None) -> Pieces:
        """Answer what came of the pending calls, in their order; if nothing came of it, they are pending again.

        Raises UsageError for another number of results, else as `ask`.
        """
        if not results or len(results) != len(self.pending_calls):
            pending = len(self.pending_calls)
            raise UsageError(f"{pending} calls wait for results, not {len(results)}", "give one result for each")
        before = self.conversation.messages
        self.conversation.add_results(results)
        forced = self.options.tool_choice not in ("auto", "none")
        # What had to be called has been called.
        options = replace(self.options, tool_choice="auto") if forced else self.options
        yield from self._answer(before, on_progress, options)

    def regenerate(self, on_progress: Progress | None = None) -> Pieces:
        """Answer the last message once more; the old answer comes back if nothing replaces it.

        Raises UsageError if there is nothing to answer, else as `ask`.
        """
        if not self.conversation.turns:
            raise UsageError("there is no answer to regenerate", "ask something first")
        before = list(self.conversation.messages)
        self.conversation.regenerate()
        yield from self._answer(before, on_progress, self.options)

    def trace(self, on_trace: Progress | None = None) -> Trace:
        """What the buckets see of the last answer; its tokens are decoded again.

        `on_trace` gets (buckets done, buckets). Raises UsageError if there is no answer, else as `ask`.
        """
        if self._last is None:
            raise UsageError("there is no answer to trace", "ask something first")
        prompt, answer = self._last
        return self._decoder.trace(prompt, answer, on_trace, _SLOT)

    def _answer(self, before: Sequence[Message], on_progress: Progress | None, options: ChatOptions) -> Pieces:
        """Answer the conversation, which is that of `before` again if nothing comes of it."""
        self.answered = False
        try:
            fitted = self._fit(options)
            self.dropped_turns = fitted.dropped_turns
            tokens = continued(self._decoder.held(_SLOT), fitted.tokens, self._decoder.piece)
            asked = self._asker.asked(tokens, options, self.generation)
            reader = asked.reader()
            running = None
            try:
                for piece in self._decoder.decode(tokens, asked.generation, on_progress, _SLOT):
                    running = piece.answer
                    yield reader.add(piece)
            finally:
                if running is not None and running.tokens:
                    self._last = tokens, running.tokens
                if running is not None and running.finish_reason is None:
                    reader.stop(running)
                self.answered = bool(reader.said or reader.thought or reader.calls)
                if self.answered:
                    self.conversation.add_assistant(reader.said, reader.thought, reader.calls)
        finally:
            if not self.answered:
                self.conversation.replace(before)

    def _fit(self, options: ChatOptions) -> Fitted:
        reserve, limit = 1, self.generation.max_tokens
        if self.overflow == "shift":
            quarter = self.context_size // 4
            reserve = min(limit, quarter) if limit > 0 else quarter
        messages = self.conversation.messages
        try:
            template = _Told(self._template, options)
            return fit(messages, template, self.context_size, reserve, self.overflow, self.dropped_turns)
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
        options = {name: getattr(self.options, name) for name in _OPTIONS}
        generation = self.generation
        limits = {
            "predict": generation.max_tokens,
            "gate": "off"
            if generation.gate is None
            else format(generation.gate, "" if generation.gate == "auto" else "g"),
            "lookup": str(generation.lookup or "off"),
        }
        return {"system": self.conversation.system or "", **limits, **options, **values}

    def set(self, name: str, text: str) -> None:
        """Change one setting for the answers to come. Raises UsageError for a wrong name or value."""
        name = name.lstrip("-").replace("-", "_")
        current = self.settings()
        if name not in current:
            raise UsageError(f"there is no setting {name!r}", f"choose one of: {', '.join(current)}")
        if name == "system":
            self.conversation.system = text or None
            return
        if name == "gate":
            self.generation = replace(self.generation, gate=parse_gate(text))
            return
        if name == "lookup":
            self.generation = replace(self.generation, lookup=parse_lookup(text))
            return
        value = _parsed(name, text, type(current[name]))
        if name == "predict":
            if not isinstance(value, int) or value < -1:
                raise UsageError(f"predict {value} is impossible", "choose 0 or more, or -1")
            self.generation = replace(self.generation, max_tokens=value)
            return
        if name in _OPTIONS:
            self.options = chat_options({name: value}, self.options)
            return
        changes: dict[str, Any] = {field_of(name): value}
        if name in KINDS:  # one takes the place of another
            changes = {**dict.fromkeys(KINDS, ""), **changes}
        sampling = replace(self.generation.sampling, **changes)
        self._decoder.check(sampling)
        self.generation = replace(self.generation, sampling=sampling)

    def store(self, session: Session) -> Session:
        """`session` with the conversation and settings as they are now."""
        return replace(session, messages=list(self.conversation.messages), sampling=self.generation.sampling)

    def restore(self, session: Session) -> None:
        """Continue the conversation of `session`; the settings stay."""
        self.conversation.replace(session.messages)
        self.dropped_turns = 0


@dataclass(frozen=True)
class _Told:
    """A template with the options of a chat."""

    template: ChatTemplate
    options: ChatOptions

    def tokens(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """See `ChatTemplate.tokens`."""
        return self.template.tokens(messages, self.options, add_generation_prompt=add_generation_prompt)


def _last(pieces: Pieces) -> Answer:
    """The whole answer."""
    answer: Answer | None = None
    for piece in pieces:
        answer = piece.answer
    assert answer is not None  # noqa: S101 - the last piece has it
    return answer


def _parsed(name: str, text: str, kind: type) -> object:
    if kind is bool:
        if text not in ("true", "false"):
            raise UsageError(f"{name} {text!r} is neither true nor false", f"write it like /set {name} true")
        return text == "true"
    try:
        return kind(text)
    except ValueError:
        raise UsageError(f"{name} {text!r} is not a number", f"write it like /set {name} 1") from None
