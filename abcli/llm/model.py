"""A model that answers: from texts and conversations to text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Generator as Generating
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property, partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from abcli.chat.answer import Answer, Piece
from abcli.chat.asking import Asked, Asker, plain_asked, split_settings
from abcli.chat.continuation import continued
from abcli.chat.conversation import Overflow
from abcli.chat.many import answer_many
from abcli.chat.message_format import Prompt, as_messages
from abcli.chat.messages import Message
from abcli.chat.options import ChatOptions
from abcli.chat.template import ChatTemplate, load_template
from abcli.chat.template import template_source as source_of
from abcli.engine.engine import Engine, Progress
from abcli.engine.memory import Prediction
from abcli.engine.opening import open_engine
from abcli.errors import PromptError, UsageError
from abcli.generate import Generator, common_prefix
from abcli.generate import Piece as RunningPiece
from abcli.gguf.checked import CheckedModel
from abcli.grammar.check import check
from abcli.grammar.constraint import constraint_of
from abcli.likelihood import Scorer, TokenScore, pair_tokens, windows
from abcli.native.llama import CancelFlag
from abcli.native.owner import Owner
from abcli.native.sampler import SamplerChain
from abcli.prepare import Prepared, Warn
from abcli.sampling import Choice, GateSetting, GenerationConfig, SamplingConfig, check_sampling
from abcli.trace.recorder import Recorder
from abcli.trace.trace import Trace
from abcli.trace.tracing import Tracer
from abcli.turn import Turn

if TYPE_CHECKING:
    from abcli.chat.controller import Chat
    from abcli.native.model import Model


class LLM(Owner):
    """A loaded model that answers, with its buckets.

    Any thread may use it: while one computes, the others wait. `cancel` may be called from any thread or signal handler
    at any time. Close it, or use it as a context manager: everything native is freed then.
    """

    def __init__(
        self,
        prepared: Prepared,
        *,
        chat_template: str | None = None,
        template_source: str | None = None,
        gate: GateSetting = None,
        warn: Warn = lambda _line: None,
        say: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Load the model. The chat template is the model's own, `chat_template` (a known name or a file), or a source.

        Answers whose settings name no gate have `gate`. `warn` gets a line for what goes wrong without harm, `say` one
        for what takes its time.

        Raises TemplateError, ModelFileError, UnsupportedModelError, OutOfMemoryError and NativeError.
        """
        self.buckets = prepared.buckets
        self.profile = prepared.profile
        # One that is not there is found before the model is loaded, and not with the first question.
        self._template_source = template_source if chat_template is None else source_of(chat_template)
        self._gate = gate
        self._turn = Turn()
        self._warn = warn
        self._remarks: set[str] = set()
        self._tracing = CancelFlag()
        with ExitStack() as stack:
            opened = stack.enter_context(open_engine(prepared.model, prepared.context, prepared.buckets, warn, say))
            self.engine: Engine = opened.engine
            """The engine that decodes; for what stands right above it, such as batches."""
            self._native = opened.model
            self.memory: Prediction = opened.memory
            self.load_seconds = opened.load_seconds
            self.engine_choice = opened.engine_choice
            make_sampler = partial(SamplerChain, opened.model, context_size=opened.engine.context_size)
            buckets = prepared.buckets
            self.generator = stack.enter_context(
                Generator(opened.engine, opened.model, make_sampler, buckets.merge, buckets.weights, opened.gate)
            )
            self._tracer = Tracer(opened.model, opened.engine, prepared.context, buckets)
            self._stack = stack.pop_all()

    def close(self) -> None:
        """Free everything; a computation of another thread is cancelled first. A second call does nothing."""
        self.cancel()
        with self._turn.last():
            self._stack.close()

    def cancel(self) -> None:
        """Make what is computed now raise CancelledError soon; without anything, do nothing."""
        if self._turn.taken:
            self._tracing.set()
            self.generator.cancel()

    @property
    def model(self) -> CheckedModel:
        """What the model's files say."""
        return self._native.checked

    @property
    def native(self) -> Model:
        """The loaded model; for what stands beside llama.cpp itself. Raises UsageError once it is closed."""
        with self._turn.text():
            return self._native

    @property
    def description(self) -> str:
        """The model in llama.cpp's words."""
        return self._native.description

    @property
    def bases(self) -> tuple[float, ...]:
        """The RoPE base of each bucket."""
        return self.engine.bases

    @property
    def context_size(self) -> int:
        """The number of tokens that prompt and answer may have together."""
        return self.engine.context_size

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens the model knows."""
        return self.engine.vocabulary_size

    @property
    def shares_prefill(self) -> bool:
        """Whether long prompts are computed once for all buckets."""
        return self.engine.sharing.shared

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template. Raises TemplateError if there is none, or if it cannot be read or compiled."""
        if self._template_source is not None:
            return ChatTemplate(self._template_source, self._native, self._warn)
        return load_template(self._native, None, self._warn)

    @cached_property
    def asker(self) -> Asker:
        """Puts conversations to the model through its chat template. Raises TemplateError as `template`."""
        return Asker(self.template)

    def generate(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        trace: bool = False,
        on_progress: Progress | None = None,
        **settings: Any,
    ) -> Answer:
        """The answer to a prompt or a conversation; see `generation_config` and `ChatOptions` for the settings.

        `tools` are `Tool`s, mappings as OpenAI's clients write them, or Python functions with type hints. With `raw`
        the text is continued as it is, without a chat template. With `trace` the answer has one: what each bucket saw;
        it takes a pass over prompt and answer of its own. `on_progress` gets (tokens done, tokens in all) while the
        prompt is computed. Raises PromptError, TemplateError, UsageError, GrammarError, ContextFullError,
        CancelledError and NativeError.
        """
        answer: Answer | None = None
        for piece in self.stream(prompt, raw=raw, trace=trace, on_progress=on_progress, **settings):
            answer = piece.answer
        assert answer is not None  # noqa: S101 - the last piece has it
        return answer

    def stream(
        self,
        prompt: Prompt,
        *,
        raw: bool = False,
        trace: bool = False,
        on_progress: Progress | None = None,
        **settings: Any,
    ) -> Iterator[Piece]:
        """The answer piece by piece, as `generate`; the last piece has the whole. Closing it early is allowed."""
        options, config = self.split(settings)
        yield from self.answer(self.ask(prompt, options, config, raw=raw), on_progress, trace=trace)

    def ask(
        self,
        prompt: Prompt,
        options: ChatOptions | None = None,
        config: GenerationConfig | None = None,
        *,
        raw: bool = False,
        parse_special: bool = False,
        held: Sequence[int] = (),
        continues: bool = False,
    ) -> Asked:
        """What `answer` answers: a prompt's tokens, how to decode its answer, and who reads it. Raises as `generate`.

        With `raw` and `parse_special` control tokens in the text are read as such. A conversation is spelled in the
        tokens of `held`, which a slot holds, as far as these stand for the same text. With `continues` its last message
        is the beginning of the answer.
        """
        config = config or GenerationConfig()
        if raw:
            if options is not None and options != ChatOptions():
                raise UsageError("a raw text has no place for tools and thoughts", "give messages", setting="raw")
            return plain_asked(self.prompt_tokens(prompt, raw=True, parse_special=parse_special), config)
        messages = as_messages(prompt)
        with self._turn.text():
            asked = self.asker.ask(messages, options or ChatOptions(), config, continues=continues)
            return replace(asked, tokens=continued(tuple(held), asked.tokens, self._native.piece)) if held else asked

    def answer(
        self,
        asked: Asked,
        on_progress: Progress | None = None,
        *,
        trace: bool = False,
        on_trace: Progress | None = None,
    ) -> Generating[Piece, None, None]:
        """The answer to what is asked, piece by piece; raises as `generate`.

        With `trace` the whole answer has one; `on_trace` gets (buckets done, buckets) while attention is read.
        """
        if not trace:
            yield from asked.reader().read(self.decode(asked.tokens, asked.generation, on_progress))
            return
        recorder, told = self._tracer.recorder(), asked.generation.observer

        def observe(choice: Choice) -> None:
            recorder(choice)
            if told is not None:
                told(choice)

        generation = replace(asked.generation, observer=observe)
        for piece in asked.reader().read(self.decode(asked.tokens, generation, on_progress)):
            if piece.answer is None:
                yield piece
        if piece.answer is not None and piece.running is not None:
            found = self._finished(recorder, asked.tokens, piece.running.slot, on_trace)
            yield replace(piece, answer=replace(piece.answer, trace=found))

    def trace(
        self, prompt: Sequence[int], answer: Sequence[int], on_trace: Progress | None = None, slot: int = 0
    ) -> Trace:
        """What the buckets see of an answer's tokens that follow those of a prompt; they are decoded again in `slot`.

        Raises ContextFullError, CancelledError and NativeError.
        """
        with self._turn.take():
            recorder = self._tracer.replay(prompt, answer, slot)
        return self._finished(recorder, prompt, slot, on_trace)

    def _finished(self, recorder: Recorder, prompt: Sequence[int], slot: int, on_trace: Progress | None) -> Trace:
        with self._turn.take():
            self._tracing.clear()
            return self._tracer.finish(recorder, prompt, slot, self._tracing, on_trace or (lambda _done, _total: None))

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        raw: bool = False,
        on_done: Callable[[int], object] = lambda _done: None,
        **settings: Any,
    ) -> list[Answer]:
        """The answers to many prompts, in their order, decoded together in as many slots as the model was loaded with.

        A prompt is taken from `prompts` when a slot is free for it. `on_done` is called with the number of answers
        after each. Raises as `generate` does, for the first prompt that fails; the others are given up then.
        """
        options, config = self.split(settings)
        asked = (self.ask(prompt, options, config, raw=raw) for prompt in prompts)
        found: dict[int, Answer] = {}
        for place, answer in self.answer_many(asked):
            found[place] = answer
            on_done(len(found))
        return [found[place] for place in sorted(found)]

    def answer_many(self, asked: Iterable[Asked]) -> Iterator[tuple[int, Answer]]:
        """The answers to what is asked, each with its place there, as they are finished; raises as `generate_many`."""

        def checked() -> Iterator[Asked]:
            for item in asked:
                self.check(item.generation.sampling)
                yield item

        with self._turn.take():
            yield from answer_many(checked(), self.generator, self.engine.slots, self._nearest)

    def chat(
        self,
        system: str | None = None,
        messages: Sequence[Message | Mapping[str, Any]] = (),
        *,
        overflow: Overflow = "error",
        **settings: Any,
    ) -> Chat:
        """A conversation that keeps what was said; its `send` answers a message.

        With `overflow="shift"` the oldest turns are left out when the context is full. Raises TemplateError if the
        model has no chat template, PromptError and UsageError.
        """
        from abcli.chat.controller import Chat

        options, generation = self.split(settings)
        chat = Chat(self, self.template, self.asker, generation, options, overflow=overflow)
        chat.conversation.replace(as_messages(messages) if messages else [])
        if system is not None:
            chat.conversation.system = system
        return chat

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """The tokens of `text`; control tokens in it are text unless `parse_special`. Raises PromptError."""
        with self._turn.text():
            return self._native.tokenize(text, add_special=add_special, parse_special=parse_special)

    def piece(self, token: int) -> bytes:
        """The bytes that a token stands for; nothing for control tokens."""
        self._check_tokens([token])
        with self._turn.text():
            return self._native.piece(token)

    @cached_property
    def pieces(self) -> Sequence[bytes]:
        """The bytes that each token of the vocabulary stands for; the first use takes its time."""
        return [self.piece(token) for token in range(self.vocabulary_size)]

    def prompt_tokens(self, prompt: Prompt, *, raw: bool = False, parse_special: bool = False) -> list[int]:
        """The tokens of a prompt or conversation as the model reads them. Raises PromptError and TemplateError."""
        if raw:
            if not isinstance(prompt, str):
                raise UsageError("messages cannot be continued raw", "give a text", setting="raw")
            return self.tokenize(prompt, parse_special=parse_special)
        messages = as_messages(prompt)
        with self._turn.text():
            return self.template.tokens(messages)

    def render(self, prompt: Prompt, options: ChatOptions | None = None, *, add_generation_prompt: bool = True) -> str:
        """The text that the chat template makes of a prompt or conversation; `add_generation_prompt` opens an answer.

        Raises PromptError and TemplateError.
        """
        messages = as_messages(prompt)
        with self._turn.text():
            return self.template.render(messages, options or ChatOptions(), add_generation_prompt=add_generation_prompt)

    @property
    def special_texts(self) -> tuple[str, str]:
        """The texts of the tokens that begin and end a sequence; empty where there is none."""
        with self._turn.text():
            return self._native.bos_text, self._native.eos_text

    def logits(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """The logits (float32 [buckets, vocabulary]) after `tokens`, of which there must be one or more.

        Raises ContextFullError, CancelledError and NativeError.
        """
        if not tokens:
            raise PromptError("there are no tokens", "give one or more")
        self._check_tokens(tokens)
        with self._turn.take():
            slot = self._nearest(tokens, range(self.engine.slots))
            kept = self.engine.truncate(slot, min(common_prefix(self.engine.tokens(slot), tokens), len(tokens) - 1))
            return self.engine.prefill(slot, tokens[kept:]).copy()

    def score(
        self,
        pairs: Iterable[tuple[str | Sequence[int], str | Sequence[int]]],
        *,
        top: int = 0,
        on_done: Callable[[int], object] = lambda _done: None,
    ) -> list[tuple[TokenScore, ...]]:
        """How likely each token of the continuation of each (context, continuation) is, in as many slots as there are.

        Both are texts or tokens. Texts are tokenised together, and white space at the end of a context counts as the
        continuation's; an empty context stands for the token that begins texts. All buckets are asked for every token,
        whatever the gate. `top` likeliest tokens are told at each place. `on_done` gets the number of pairs done.

        Raises PromptError, ContextFullError before anything is computed, CancelledError and NativeError.
        """
        asked = [self._scored(*pair) for pair in pairs]
        with self._turn.take():
            return Scorer(self.engine, self.generator.merged, top).score(asked, on_done)

    def score_text(self, text: str | Sequence[int], *, overlap: int = 1, top: int = 0) -> tuple[TokenScore, ...]:
        """How likely each token of a text is after those before it, the first after the token that begins texts.

        A text longer than the context is read in windows, in which each token has at least `overlap` tokens before it.
        Raises as `score`, and UsageError for an `overlap` that leaves no place.
        """
        if not 1 <= overlap < self.context_size:
            raise UsageError(f"`overlap={overlap}` is impossible", f"choose 1 to {self.context_size - 1}")
        tokens = self.tokenize(text, add_special=False) if isinstance(text, str) else text
        parts = windows([self.first_token, *tokens], self.context_size, overlap)
        return tuple(score for part in self.score(parts, top=top) for score in part)

    @property
    def first_token(self) -> int:
        """The token that begins texts: the model's BOS, or without one its EOS."""
        with self._turn.text():
            return self._native.first_token

    def check(self, sampling: SamplingConfig) -> None:
        """Raise UsageError for sampler settings that this model cannot have, GrammarError for a schema or grammar.

        What is not enforced of a schema is a warning, once. A schema, regular expression or Lark grammar is compiled
        for the model, so that no time is lost when an answer to it begins.
        """
        check_sampling(sampling, self.vocabulary_size)
        for remark in check(sampling):
            if remark not in self._remarks:
                self._remarks.add(remark)
                self._warn(remark)
        constraint = constraint_of(sampling)
        if constraint is not None and constraint.kind != "grammar":
            self._native.matcher(constraint)

    def decode(
        self,
        tokens: Sequence[int],
        config: GenerationConfig,
        on_progress: Progress | None = None,
        slot: int | None = None,
    ) -> Iterator[RunningPiece]:
        """The pieces of the answer to `tokens`, as it grows, in `slot`, or the one that holds most of them."""
        self.check(config.sampling)
        with self._turn.take():
            if slot is None:
                slot = self._nearest(tokens, range(self.engine.slots))
            yield from self.generator.stream(slot, tokens, config, on_progress)

    def _scored(self, context: str | Sequence[int], continuation: str | Sequence[int]) -> tuple[list[int], list[int]]:
        """The tokens of a pair. Raises PromptError."""
        tokens = pair_tokens(self.tokenize, context, continuation)
        self._check_tokens(chain(*tokens))
        return tokens[0] or [self.first_token], tokens[1]

    def _check_tokens(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if not 0 <= token < self.vocabulary_size:
                raise PromptError(f"token {token} is not in the vocabulary", f"it ends at {self.vocabulary_size - 1}")

    def split(self, settings: Mapping[str, Any]) -> tuple[ChatOptions, GenerationConfig]:
        """Settings by name as `ask` takes them, with the model's gate where they leave it open."""
        usual = {} if "generation" in settings else {"gate": self._gate}
        return split_settings({**usual, **settings})

    def held(self, slot: int) -> Sequence[int]:
        """The tokens that the engine's slot holds."""
        return self.engine.tokens(slot)

    def _nearest(self, tokens: Sequence[int], slots: Sequence[int]) -> int:
        """The slot that holds most of the beginning of `tokens`; of those that hold none of it, an empty one."""
        held = {slot: self.engine.tokens(slot) for slot in slots}
        return max(slots, key=lambda slot: (common_prefix(held[slot], tokens), -len(held[slot]), -slot))
