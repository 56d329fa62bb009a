"""The one loop that turns prompts into answers: slots, merging, sampling, stopping, text."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from types import TracebackType
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from abcli.config import GenerationConfig, MergeRule, SamplingConfig
from abcli.engine.protocol import Engine, Progress
from abcli.errors import AbcliError, CancelledError, ContextFullError, NativeError, PromptError, UsageError
from abcli.merge import Merger

FinishReason = Literal["stop", "length"]


class Tokenizer(Protocol):
    """What the loop needs to know of a vocabulary."""

    def piece(self, token: int) -> bytes:
        """The bytes a token stands for."""

    def is_end(self, token: int) -> bool:
        """Whether the token ends an answer."""


class Sampler(Protocol):
    """Chooses tokens; one per answer."""

    @property
    def seed(self) -> int:
        """The seed that is really used."""

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """Let penalties see the prompt."""

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose a token from logits [vocab] and remember it."""

    def close(self) -> None:
        """Free what the sampler holds."""


@dataclass
class Statistics:
    """Counts in tokens and times in seconds of one answer."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    agreement_sum: float = 0.0
    agreement_count: int = 0

    @property
    def prefilled_tokens(self) -> int:
        """The prompt's tokens that had to be computed."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def agreement(self) -> float:
        """The mean share (0..1) of probability mass on which the buckets agree."""
        return self.agreement_sum / self.agreement_count if self.agreement_count else 1.0


@dataclass
class Answer:
    """An answer as it grows; `finish_reason` is None until it is complete.

    `error` is why its sampler could not go on, e.g. a grammar that leaves no token: nothing follows then.
    """

    slot: int
    seed: int
    statistics: Statistics
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: AbcliError | None = None


@dataclass(frozen=True)
class Piece:
    """What one step added to an answer; no text while a character or stop string is incomplete."""

    answer: Answer
    text: str


class TextStream:
    """Bytes in, text out: decodes UTF-8 across tokens and holds back what may become a stop string.

    A character of which the end never comes is left out; bytes that cannot be UTF-8 become U+FFFD.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        """`stop` lists the strings that end the text; they are not part of it."""
        if any(not text for text in stop):
            raise UsageError("a stop string is empty", "give --stop some text")
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes, *, final: bool = False) -> str:
        """The text that is certain after `data`; with `final`, all of it. Empty once `stopped`."""
        if self.stopped:
            return ""
        self._held += self._decode(data)
        found = [index for index in (self._held.find(text) for text in self._stop) if index >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)], ""
            return certain
        keep = 0 if final else self._possible_stop()
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def _possible_stop(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = max((len(text) for text in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            if any(text.startswith(self._held[-length:]) for text in self._stop):
                return length
        return 0


@dataclass
class _Running:
    """An answer in progress with what is needed to continue it."""

    answer: Answer
    config: GenerationConfig
    sampler: Sampler
    stream: TextStream
    next_token: int
    resources: ExitStack


class Generator:
    """Decodes answers in the slots of an engine, all running ones together; one thread at a time."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        make_sampler: Callable[[SamplingConfig], Sampler],
        merge_rule: MergeRule = "confidence",
        pool_weights: Sequence[float] = (),
    ) -> None:
        """`make_sampler` gives each answer a sampler of its own; the generator closes it.

        `pool_weights` are those of the merge rule `pool`.
        """
        self._engine = engine
        self._tokenizer = tokenizer
        self._make_sampler = make_sampler
        self._rule = merge_rule
        self._pool_weights = tuple(pool_weights)
        self._merger = Merger(len(engine.bases), engine.vocabulary_size)
        self._running: dict[int, _Running] = {}
        self._cancelled = False

    def __enter__(self) -> Generator:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Drop every answer in progress and free its sampler."""
        for slot in list(self._running):
            self.drop(slot)

    def cancel(self) -> None:
        """Make the running or next `start` or `step` raise CancelledError; safe in a signal handler."""
        self._cancelled = True
        self._engine.cancel()

    @property
    def active(self) -> int:
        """The number of answers in progress."""
        return len(self._running)

    def start(
        self,
        slot: int,
        prompt: Sequence[int],
        config: GenerationConfig,
        on_progress: Progress | None = None,
    ) -> Piece:
        """Prefill `prompt` in `slot`, reusing what the slot already holds of it, and sample the first token.

        Raises ContextFullError, CancelledError, NativeError, PromptError for an empty prompt, and what the
        sampler's construction raises. The slot then holds a beginning of the prompt. What goes wrong in sampling
        is the answer's `error`.
        """
        self._cancelled = False
        with ExitStack() as stack:
            running = self._prepare(slot, prompt, config, stack)
            begin = perf_counter()
            cached = self._keep_shared(slot, prompt)
            logits = self._engine.prefill(slot, prompt[cached:], self._watched(on_progress))
            statistics = running.answer.statistics
            statistics.cached_tokens = len(prompt) - self._engine.computed_tokens
            statistics.prefill_seconds = perf_counter() - begin
            return self._begin(running, prompt, logits)

    def start_together(
        self, requests: Sequence[tuple[int, Sequence[int], GenerationConfig]]
    ) -> list[Piece | AbcliError]:
        """Begin several (slot, prompt, settings) as `start` does, their prompts computed together; each one's outcome.

        An outcome is an error where the request's prompt or settings are wrong; nothing runs in its slot then. Raises
        CancelledError and NativeError. The engine's prompt cache is not asked.
        """
        self._cancelled = False
        with ExitStack() as stack:
            outcomes: list[_Running | AbcliError] = []
            for slot, prompt, config in requests:
                try:
                    outcomes.append(self._prepare(slot, prompt, config, stack))
                except NativeError:
                    raise
                except AbcliError as error:
                    outcomes.append(error)
            begin = perf_counter()
            left = {}
            for (slot, prompt, _config), outcome in zip(requests, outcomes, strict=True):
                if isinstance(outcome, _Running):
                    cached = self._keep_shared(slot, prompt)
                    outcome.answer.statistics.cached_tokens = cached
                    left[slot] = prompt[cached:]
            logits = dict(zip(left, self._engine.prefill_together(left), strict=True)) if left else {}
            seconds = perf_counter() - begin
            pieces: list[Piece | AbcliError] = []
            for (slot, prompt, _config), outcome in zip(requests, outcomes, strict=True):
                if isinstance(outcome, AbcliError):
                    pieces.append(outcome)
                    continue
                outcome.answer.statistics.prefill_seconds = seconds
                pieces.append(self._begin(outcome, prompt, logits[slot]))
            return pieces

    def _prepare(self, slot: int, prompt: Sequence[int], config: GenerationConfig, stack: ExitStack) -> _Running:
        """An answer of which nothing is computed yet; `stack` frees its sampler."""
        if not prompt:
            raise PromptError("the prompt is empty", "type some text")
        if len(prompt) > self._engine.context_size:
            raise ContextFullError(len(prompt), self._engine.context_size)
        self.drop(slot)
        stream = TextStream(config.stop)
        sampler = self._make_sampler(config.sampling)
        resources = stack.enter_context(ExitStack())
        resources.callback(sampler.close)
        answer = Answer(slot, sampler.seed, Statistics(len(prompt)))
        return _Running(answer, config, sampler, stream, -1, resources)

    def _keep_shared(self, slot: int, prompt: Sequence[int]) -> int:
        """Leave in the slot what it holds of the prompt; the number of tokens."""
        shared = common_prefix(self._engine.tokens(slot), prompt)
        # The logits after the last token are needed, so at least that one is computed again.
        return self._engine.truncate(slot, min(shared, len(prompt) - 1))

    def _begin(self, running: _Running, prompt: Sequence[int], logits: NDArray[np.float32]) -> Piece:
        """Sample the first token; an answer that goes on keeps its resources from then on."""
        running.sampler.accept_prompt(prompt)
        if running.config.max_tokens == 0:
            running.answer.finish_reason = "length"
            return Piece(running.answer, "")
        running.resources = running.resources.pop_all()
        self._running[running.answer.slot] = running
        self._sample(running, logits)
        return self._emit(running)

    def step(self) -> list[Piece]:
        """Decode one token of every answer in progress; what each gained. Empty when none is left.

        Raises CancelledError and NativeError; the answers then stay in progress until dropped. What goes wrong in
        sampling is the `error` of that answer alone.
        """
        if self._cancelled:
            raise CancelledError
        if not self._running:
            return []
        begin = perf_counter()
        running = list(self._running.values())
        logits = self._engine.step({item.answer.slot: item.next_token for item in running})
        for item, rows in zip(running, logits, strict=True):
            self._sample(item, rows)
        seconds = perf_counter() - begin
        for item in running:
            item.answer.statistics.decode_seconds += seconds
        return [self._emit(item) for item in running]

    def stream(
        self,
        slot: int,
        prompt: Sequence[int],
        config: GenerationConfig,
        on_progress: Progress | None = None,
    ) -> Iterator[Piece]:
        """The pieces of one answer, for a caller with a single prompt; other slots must be idle.

        Raises as `start` and `step` do, and the answer's `error`.
        """
        try:
            piece = self.start(slot, prompt, config, on_progress)
            while piece.answer.error is None:
                yield piece
                if piece.answer.finish_reason is not None:
                    return
                (piece,) = self.step()
            raise piece.answer.error
        finally:
            self.drop(slot)

    def drop(self, slot: int) -> None:
        """Stop the answer in `slot`, if any; what the engine's slot holds stays for reuse."""
        running = self._running.pop(slot, None)
        if running is not None:
            running.resources.close()

    def _watched(self, on_progress: Progress | None) -> Progress:
        """`on_progress` that also notices a `cancel` that came while the engine was between two pieces."""

        def progress(done: int, total: int) -> None:
            if self._cancelled:
                raise CancelledError
            if on_progress is not None:
                on_progress(done, total)

        return progress

    def _sample(self, running: _Running, logits: NDArray[np.float32]) -> None:
        """Choose the next token; what goes wrong concerns this answer and must not end the others."""
        try:
            self._choose(running, logits)
        except AbcliError as error:
            running.answer.error = error

    def _choose(self, running: _Running, logits: NDArray[np.float32]) -> None:
        if len(logits) == 1:  # nothing to merge; the sampler refuses numbers that are none
            running.next_token = running.sampler.sample(logits[0])
            return
        merged = self._merger.merge(logits, self._rule, self._pool_weights)
        statistics = running.answer.statistics
        statistics.agreement_sum += merged.agreement
        statistics.agreement_count += 1
        running.next_token = running.sampler.sample(merged.logits)

    def _emit(self, running: _Running) -> Piece:
        """Turn the token just sampled into text and finish the answer if it is the last one."""
        answer, token = running.answer, running.next_token
        if answer.error is not None:
            self.drop(answer.slot)
            return Piece(answer, "")
        text = ""
        if self._tokenizer.is_end(token) and not running.config.ignore_eos:
            answer.finish_reason = "stop"
        else:
            answer.tokens.append(token)
            answer.statistics.completion_tokens += 1
            text = running.stream.feed(self._tokenizer.piece(token))
            if running.stream.stopped:
                answer.finish_reason = "stop"
            elif answer.statistics.completion_tokens == running.config.max_tokens or self._is_full(answer.slot):
                answer.finish_reason = "length"
        if answer.finish_reason is not None:
            text += running.stream.feed(b"", final=True)
            self.drop(answer.slot)
        answer.text += text
        return Piece(answer, text)

    def _is_full(self, slot: int) -> bool:
        return len(self._engine.tokens(slot)) >= self._engine.context_size


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """The number of tokens with which both sequences begin."""
    length = min(len(left), len(right))
    if list(left[:length]) == list(right[:length]):
        return length
    return next(index for index in range(length) if left[index] != right[index])
