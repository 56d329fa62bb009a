"""The one loop that turns prompts into answers: slots, merging, sampling, stopping, text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from abcli.config import MergeRule
from abcli.engine.engine import Engine, Gate, Progress
from abcli.engine.workers import available_cores
from abcli.errors import AbcliError, CancelledError, ContextFullError, PromptError
from abcli.lookup import Budget, Lookup
from abcli.merge import Merged, Merger
from abcli.native.owner import Owner
from abcli.protocols import Sampler, Tokenizer
from abcli.sampling import Choice, GenerationConfig, SamplingConfig
from abcli.text_stream import TextStream
from abcli.thought_limit import LimitedSampler

FinishReason = Literal["stop", "length"]
# The weights of a single row.
_ALONE = np.ones(1)


@dataclass
class Statistics:
    """Counts in tokens and times in seconds of one answer."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    steps: int = 0
    """How many tokens were chosen, the one that ended the answer included."""
    asked_steps: int = 0
    """For how many of them all buckets were asked; none with a single one."""
    agreement_sum: float = 0.0
    drafted_tokens: int = 0
    guessed_tokens: int = 0
    """How many of the drafts' tokens were right."""

    @property
    def prefilled_tokens(self) -> int:
        """The prompt's tokens that had to be computed."""
        return self.prompt_tokens - self.cached_tokens

    @property
    def agreement(self) -> float:
        """The mean share (0..1) of probability mass on which the buckets agree, where all were asked."""
        return self.agreement_sum / self.asked_steps if self.asked_steps else 1.0

    @property
    def asked(self) -> float:
        """The share (0..1) of the tokens for which all buckets were asked."""
        return self.asked_steps / self.steps if self.steps else 0.0


@dataclass
class Answer:
    """An answer as it grows; `finish_reason` is None until it is complete, `stopped_by` the stop string that ended it.

    `error` is why its sampler could not go on, e.g. a grammar that leaves no token: nothing follows then.
    """

    slot: int
    seed: int
    statistics: Statistics
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    spans: list[tuple[str, float | None]] = field(default_factory=list)
    """What each step added to the text, and on how much the buckets agreed there, None where one decided alone."""
    finish_reason: FinishReason | None = None
    stopped_by: str = ""
    error: AbcliError | None = None


@dataclass(frozen=True)
class Piece:
    """What one step added to an answer; no text while a character or stop string is incomplete."""

    answer: Answer
    text: str


@dataclass
class _Running:
    """An answer in progress with what is needed to continue it."""

    answer: Answer
    config: GenerationConfig
    sampler: Sampler
    stream: TextStream
    on_progress: Progress | None
    begin: float
    computed: int
    """How many of the prompt's tokens had to be computed."""
    left: int
    """How many of them are yet to be computed; none once the answer has begun."""
    lookup: Lookup | None
    """Where drafts come from, if it has any."""
    next_token: int = -1
    agreement: float | None = None
    """The buckets' agreement about it."""
    unsure: bool = False
    """Whether the native bucket is known not to decide on what comes after the next token."""


class Generator(Owner):
    """Answers prompts in the slots of an engine, all in progress together; one thread at a time."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        make_sampler: Callable[[SamplingConfig], Sampler],
        merge_rule: MergeRule = "confidence",
        pool_weights: Sequence[float] = (),
        usual_gate: float | None = None,
    ) -> None:
        """`make_sampler` gives each answer a sampler of its own; the generator closes it.

        `pool_weights` are those of the merge rule `pool`, and `usual_gate` is what the gate "auto" stands for.
        """
        self._engine = engine
        self._tokenizer = tokenizer
        self._make_sampler = make_sampler
        self._rule = merge_rule
        self._pool_weights = tuple(pool_weights)
        # The other cores may still be busy: threads of the graph wait for the next one at full speed for a while.
        threads = max(1, available_cores() // 2)
        self._merger = Merger(len(engine.bases), engine.vocabulary_size, threads)
        self._usual_gate = usual_gate
        self._budget = Budget()
        self._running: dict[int, _Running] = {}
        self._cancelled = False

    def close(self) -> None:
        """Drop every answer in progress and free its sampler."""
        for slot in list(self._running):
            self.drop(slot)

    def cancel(self) -> None:
        """Make the running step, or else the next one, raise CancelledError; safe in a signal handler."""
        self._cancelled = True
        self._engine.cancel()

    def start(
        self,
        slot: int,
        prompt: Sequence[int],
        config: GenerationConfig,
        on_progress: Progress | None = None,
    ) -> Answer:
        """Let the steps to come compute `prompt` in `slot` and answer it; what the slot holds of it is reused.

        The answer that grows; one that is in progress there is dropped. `on_progress` is told of each piece.
        Raises ContextFullError, CancelledError, NativeError, PromptError for an empty prompt, and what making the
        sampler raises; nothing is then in progress in the slot.
        """
        if not prompt:
            raise PromptError("the prompt is empty", "type some text")
        if len(prompt) > self._engine.context_size:
            raise ContextFullError(len(prompt), self._engine.context_size)
        self.drop(slot)
        if not self._running:
            self._cancelled = False
        begin = perf_counter()
        stream = TextStream(config.stop)
        sampler = self._make_sampler(config.sampling)
        if config.steering.thought is not None:
            piece = partial(self._tokenizer.piece, special=True)
            sampler = LimitedSampler(sampler, config.steering.thought, piece)
        with ExitStack() as stack:
            stack.callback(sampler.close)
            sampler.accept_prompt(prompt)
            shared = common_prefix(self._engine.tokens(slot), prompt)
            # The logits after the last token are needed, so at least that one is computed again.
            kept = self._engine.truncate(slot, min(shared, len(prompt) - 1))
            left = self._engine.begin(slot, prompt[kept:])
            stack.pop_all()
        answer = Answer(slot, sampler.seed, Statistics(len(prompt), len(prompt) - left))
        lookup = Lookup() if config.lookup is not None and self._engine.forgets else None
        self._budget.begin()
        self._running[slot] = _Running(answer, config, sampler, stream, on_progress, begin, left, left, lookup)
        return answer

    def step(self) -> list[Piece]:
        """Decode a token of every answer in progress, and a piece of the prompts that wait; what each answer gained.

        That is nothing for one whose prompt still waits; an answer's first token comes with the end of its prompt.
        Empty too if nothing is in progress. Raises CancelledError and NativeError, and what a prompt's `on_progress`
        raises; the answers then stay in progress until dropped. What goes wrong in sampling is the `error` of that
        answer alone.
        """
        with self._heeding_cancel():
            if (piece := self._try_draft()) is not None:
                return [piece]
            begin = perf_counter()
            waiting = [item for item in self._running.values() if item.left]
            tokens = {slot: item.next_token for slot, item in self._running.items() if not item.left}
            # What is merged where it is computed leaves neither the buckets' logits nor all of the merged ones.
            all_logits = any(
                item.sampler.may_choose_any or item.config.observer or item.config.merge not in (None, self._rule)
                for item in self._running.values()
            )
            rule = None if all_logits else self._rule
            logits = self._engine.step(tokens, rule, self._gates()) if self._running else {}
        gaining = [self._running[slot] for slot in logits]
        for item in gaining:
            if item.left:
                item.answer.statistics.prefill_seconds = perf_counter() - item.begin
            self._sample(item, logits[item.answer.slot])
        seconds = perf_counter() - begin
        if len(tokens) == 1 and not waiting:
            self._budget.chosen(seconds)
        for slot in tokens:
            self._running[slot].unsure = False
            self._running[slot].answer.statistics.decode_seconds += seconds
        pieces = [self._emit(item) for item in gaining]
        for item in waiting:
            before, item.left = item.left, self._engine.waiting(item.answer.slot)
            if item.on_progress is not None and item.left != before:
                item.on_progress(item.computed - item.left, item.computed)
        return pieces

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
            answer = self.start(slot, prompt, config, on_progress)
            while answer.finish_reason is None:
                for piece in self.step():
                    if answer.error is not None:
                        raise answer.error
                    yield piece
        finally:
            self.drop(slot)

    def merged(self, logits: NDArray[np.float32], rule: MergeRule | None = None) -> Merged:
        """What `rule`, or else the usual one, makes of logits [buckets, vocab], until the next step."""
        if rule is None:
            return self._merger.merge(logits, self._rule, self._pool_weights)
        return self._merger.merge(logits, rule)

    def drop(self, slot: int) -> None:
        """Stop the answer in `slot`, if any, or computing its prompt; what the engine's slot holds stays for reuse."""
        running = self._running.pop(slot, None)
        if running is not None:
            self._engine.drop(slot)
            running.sampler.close()

    @contextmanager
    def _heeding_cancel(self) -> Iterator[None]:
        """Raise CancelledError once for a `cancel` before the block, or within."""
        if self._cancelled:
            self._cancelled = False
            raise CancelledError
        try:
            yield
        except CancelledError:
            self._cancelled = False
            raise

    def _try_draft(self) -> Piece | None:
        """What an answer gained that has a draft; None if there is none, or nothing was gained.

        Only an answer that is alone: several make a batch as they are.
        """
        running = next(iter(self._running.values()), None)
        if running is None or len(self._running) > 1 or running.left or running.lookup is None:
            return None
        config, slot = running.config, running.answer.slot
        held = self._engine.tokens(slot)
        gate = self._gates().get(slot)
        # The answer's last token comes without a draft.
        room = self._engine.context_size - len(held) - 2
        left = room if config.max_tokens < 0 else config.max_tokens - running.answer.statistics.completion_tokens - 1
        most = self._budget.tokens if config.lookup == "auto" else config.lookup
        outputs = self._engine.outputs if gate is None else self._engine.native_outputs
        longest = 0 if running.unsure else min(room, left, outputs - 1, most or 0)
        draft = running.lookup.draft([*held, running.next_token], longest)
        return self._verify(running, draft, gate) if draft else None

    def _verify(self, running: _Running, draft: Sequence[int], gate: Gate | None) -> Piece | None:
        """Compute the next token and a draft behind it at once, and choose as long as the draft is what is chosen."""
        begin, slot, statistics = perf_counter(), running.answer.slot, running.answer.statistics
        start, tokens = len(self._engine.tokens(slot)), [running.next_token, *draft]
        rows = self._engine.read({slot: tokens}, alone=gate is not None)[slot]
        kept, text = 0, ""
        for token, logits in zip(tokens, rows, strict=True):
            if token != running.next_token or running.answer.finish_reason or running.answer.error:
                break
            if gate is not None and not gate(logits[0]):
                running.unsure = True
                break
            kept += 1
            self._sample(running, logits)
            text += self._emit(running).text
        self._engine.truncate(slot, start + kept)
        seconds = perf_counter() - begin
        statistics.decode_seconds += seconds
        statistics.drafted_tokens += len(draft)
        statistics.guessed_tokens += max(0, kept - 1)
        self._budget.tried(len(draft), kept - 1, seconds)
        return Piece(running.answer, text) if kept else None

    def _gates(self) -> dict[int, Gate]:
        """What lets the native bucket decide alone, by slot; at 1 it never does."""
        gates: dict[int, Gate] = {}
        for slot, item in self._running.items():
            gate = item.config.gate if item.config.gate != "auto" else self._usual_gate
            if gate is not None and gate < 1 and len(self._engine.bases) > 1 and not item.unsure:
                gates[slot] = partial(self._decides, item, gate)
        return gates

    @staticmethod
    def _decides(running: _Running, gate: float, logits: NDArray[np.float32]) -> bool:
        """Whether the native bucket's logits [vocab] are sure enough of the next token."""
        if running.config.max_tokens == 0:
            return True
        try:
            return running.sampler.confidence(logits) > gate
        except AbcliError:
            # Sampling meets it again, where it concerns this answer alone.
            return True

    def _sample(self, running: _Running, logits: NDArray[np.float32]) -> None:
        """Choose the next token; what goes wrong concerns this answer and must not end the others."""
        try:
            self._choose(running, logits)
        except AbcliError as error:
            running.answer.error = error

    def _choose(self, running: _Running, logits: NDArray[np.float32]) -> None:
        if running.config.max_tokens == 0:
            return
        statistics = running.answer.statistics
        statistics.steps += 1
        # One row is all there is, or merged already; the sampler refuses numbers that are none.
        chosen, weights, agreement = logits[0], _ALONE, self._engine.agreement(running.answer.slot)
        if len(logits) > 1:
            merged = self.merged(logits, running.config.merge)
            chosen, weights, agreement = merged.logits, merged.weights, merged.agreement
        running.agreement = agreement
        if agreement is not None:
            statistics.agreement_sum += agreement
            statistics.asked_steps += 1
        running.next_token = running.sampler.sample(chosen)
        if running.config.observer is not None:
            running.config.observer(Choice(running.next_token, logits, chosen, weights, agreement))

    def _emit(self, running: _Running) -> Piece:
        """Turn the token just sampled into text and finish the answer if it is the last one."""
        answer, token = running.answer, running.next_token
        if answer.error is not None:
            self.drop(answer.slot)
            return Piece(answer, "")
        text = ""
        if running.config.max_tokens == 0:
            answer.finish_reason = "length"
        elif self._tokenizer.is_end(token) and not running.config.ignore_eos:
            answer.finish_reason = "stop"
        else:
            answer.tokens.append(token)
            answer.statistics.completion_tokens += 1
            shown = token in running.config.steering.shown_tokens
            text = running.stream.feed(self._tokenizer.piece(token, special=shown))
            if running.stream.stopped or running.sampler.finished:
                answer.finish_reason = "stop"
            elif answer.statistics.completion_tokens == running.config.max_tokens or (
                len(self._engine.tokens(answer.slot)) >= self._engine.context_size
            ):
                answer.finish_reason = "length"
        if answer.finish_reason is not None:
            text += running.stream.feed(b"", final=True)
            answer.stopped_by = running.stream.stopped_by
            self.drop(answer.slot)
        if text:
            answer.text += text
            answer.spans.append((text, running.agreement))
        return Piece(answer, text)


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """The number of tokens with which both sequences begin."""
    same, end = 0, min(len(left), len(right))
    # Whole slices are compared much faster than tokens one by one.
    while same < end:
        middle = (same + end + 1) // 2
        if list(left[same:middle]) == list(right[same:middle]):
            same = middle
        else:
            end = middle - 1
    return same
