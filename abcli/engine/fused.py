"""The engine of one context: every bucket of every slot in one batch, so that the weights are read once per token."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import ExitStack
from math import log
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from abcli.config import PROMPT_CACHE_LIMIT, Buckets, ContextConfig
from abcli.engine.prompt_cache import CacheKey, PromptCache
from abcli.engine.protocol import Progress
from abcli.engine.slots import TILED_TOKENS, SlotEngine
from abcli.engine.stored import StoredPrompts
from abcli.engine.workers import available_cores
from abcli.errors import CancelledError, UnsupportedModelError
from abcli.native.compute_thread import compute_thread
from abcli.native.llama import version
from abcli.native.model import Model
from abcli.native.rotating.context import FusedContext, SlotPart

_HINT = "use `engine=contexts` with this model"
# What names the rank of compressed keys and values in a GGUF header.
_MLA_KEY = "attention.kv_lora_rank"
_EXPERTS_KEY = "expert_count"
# A further batch takes as long as about so many further tokens in the same one (135M, Q8_0, 2 cores: 20).
_BATCH_ROWS = 16


class FusedEngine(SlotEngine):
    """Implements `Engine` with one context whose rows are turned to each bucket's base as they are computed."""

    def __init__(
        self,
        model: Model,
        config: ContextConfig,
        buckets: Buckets,
        warn: Callable[[str], None] | None = None,
    ) -> None:
        """Make the context; the model stays the caller's and must outlive the engine.

        `warn` gets a line for what goes wrong with the prompt cache on disk.

        Raises UnsupportedModelError for a model that it cannot serve, with the reason, and NativeError if the context
        cannot be made.
        """
        super().__init__(config, buckets.bases, model.vocabulary_size)
        check_servable(model, config, len(buckets.bases))
        self._threads = config.threads or available_cores()
        self._all = range(len(buckets.bases))
        with ExitStack() as stack:
            self._pool = compute_thread()

            def make() -> None:
                self._leader, self._context, self.prefill_note = self._open(model, config, buckets)
                stack.callback(self._context.close)

            self._run(make)
            self._sharing = self.prefill_note.startswith("shared")
            self._piece = min(self._context.batch_size, self._context.ubatch_size)
            if config.prompt_cache is not None:
                warn = warn or (lambda _line: None)
                self._stored = self._open_stored(model, config, config.prompt_cache, warn)
            self._stack = stack.pop_all()

    def _open(self, model: Model, config: ContextConfig, buckets: Buckets) -> tuple[int, FusedContext, str]:
        """The leader's column, the context, and how prompts are computed, and why."""
        bases, base = buckets.bases, buckets.prefill_base
        note = _sharing_obstacle(model, config, len(bases))
        extra = None if note or base in bases else base
        if base not in bases and extra is None:
            base = bases[0]
        context = FusedContext(model, bases, config, base, self._threads, self._cancel, extra)
        leader = len(bases) if extra is not None else bases.index(base)
        if note:
            return leader, context, note
        with ExitStack() as stack:
            stack.push(context)
            obstacle = context.prove_sharing(leader)
            if not obstacle:
                stack.pop_all()
                return (
                    leader,
                    context,
                    f"shared prefill at base {base:g}; {context.turning_layers} layers follow the base",
                )
            note = f"exact prefill: {obstacle}"
            if extra is None:
                stack.pop_all()
                return leader, context, note
        return 0, FusedContext(model, bases, config, bases[0], self._threads, self._cancel), note

    def _step(self, tokens: Mapping[int, int], lengths: Mapping[int, int], *, careful: bool = False) -> None:
        """Neighbouring slots go into one batch; idle ones between them get a token that is dropped again."""
        buckets = len(self._bases)
        idle = {slot: len(held) for slot, held in enumerate(self._tokens) if len(held) < self._slot_cells}
        for slots in _runs(sorted(tokens), max(1, self._piece // buckets), idle, _BATCH_ROWS // buckets):
            any_token = tokens[slots[0]]
            parts = [
                SlotPart(slot, lengths.get(slot, idle.get(slot, 0)), (tokens.get(slot, any_token),)) for slot in slots
            ]
            try:
                self._compute(parts, self._all, [self._logits[slot] for slot in slots], careful=careful)
            finally:
                for slot in slots:
                    if slot not in tokens:
                        self._truncate_cells(slot, idle[slot])

    def _prefill_exact(self, slot: int, tokens: Sequence[int], on_progress: Progress | None) -> None:
        """Every bucket computes every token."""
        start, total = len(self._tokens[slot]), len(tokens)
        size = max(1, self._piece // len(self._bases))
        for offset in range(0, total, size):
            piece = tokens[offset : offset + size]
            done = offset + len(piece)
            self._compute([SlotPart(slot, start + offset, piece)], self._all, self._rows(slot, done == total))
            if on_progress is not None:
                on_progress(done, total)

    def _prefill_exact_together(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """Several buckets of one prompt fill a batch; the prompts of a single bucket share one."""
        for slots in self._groups(prompts) if len(self._bases) == 1 else [[slot] for slot in prompts]:
            if len(slots) == 1:
                self._prefill_exact(slots[0], prompts[slots[0]], None)
                continue
            parts = [SlotPart(slot, len(self._tokens[slot]), prompts[slot]) for slot in slots]
            rows = [self._logits[slot, 0] for slot in slots]
            self._run(lambda parts=parts, rows=rows: self._context.compute_side_by_side(parts, rows))  # type: ignore[misc]

    def _groups(self, prompts: Mapping[int, Sequence[int]]) -> Iterator[list[int]]:
        """Neighbouring slots whose prompts are so near in length that filling them up costs less than more batches."""
        group: list[int] = []
        longest = 0
        for slot in sorted(prompts):
            length = len(prompts[slot])
            rows = max(longest, length) * (len(group) + 1)
            fits = rows <= self._piece and len(self._tokens[slot]) + max(longest, length) <= self._slot_cells
            fits = fits and all(len(self._tokens[other]) + length <= self._slot_cells for other in group)
            near = rows <= longest * len(group) + length + _BATCH_ROWS
            near = near and (longest < TILED_TOKENS) == (length < TILED_TOKENS)
            if group and not (slot == group[-1] + 1 and fits and near):
                yield group
                group, longest = [], 0
            group.append(slot)
            longest = max(longest, length)
        yield group

    def _lead(self, slot: int, tokens: Sequence[int], on_done: Callable[[int], None]) -> None:
        """The leader computes piece by piece, and the others take each over."""
        start = len(self._tokens[slot])
        self._let_leader_catch_up(slot, start)
        others = [column for column in range(len(self._context.bases)) if column != self._leader]
        for offset in range(0, len(tokens), self._piece):
            part = SlotPart(slot, start + offset, tokens[offset : offset + self._piece])
            self._compute([part], [self._leader], None, careful=True)
            self._run(lambda part=part: self._context.share(slot, self._leader, others, part.position, part.tokens))  # type: ignore[misc]
            on_done(offset + len(part.tokens))

    def _lead_together(self, prompts: Mapping[int, Sequence[int]]) -> None:
        """One after the other: the leader's sequences are no neighbours, so that no batch takes several."""
        for slot, tokens in prompts.items():
            self._lead(slot, tokens, lambda _done: None)

    def _finish_shared(self, tokens: Mapping[int, int], lengths: Mapping[int, int]) -> None:
        """Careful: it proves that the others' cells lie where the keys were put."""
        self._step(tokens, lengths, careful=True)

    def _let_leader_catch_up(self, slot: int, length: int) -> None:
        """A leader that is no bucket takes over from the nearest bucket what was decoded without it."""
        bases, leader = self._context.bases, self._leader
        nearest = min(self._all, key=lambda column: abs(log(bases[column] / bases[leader])))
        held = self._context.length(self._context.sequence(slot, leader))
        for start in range(held, length, self._piece):
            tokens = self._tokens[slot][start : min(start + self._piece, length)]
            self._run(lambda start=start, tokens=tokens: self._context.share(slot, nearest, [leader], start, tokens))  # type: ignore[misc]

    def _rows(self, slot: int, wanted: bool) -> list[NDArray[np.float32]] | None:
        return [self._logits[slot]] if wanted else None

    def _compute(
        self,
        parts: Sequence[SlotPart],
        columns: Sequence[int],
        logits: Sequence[NDArray[np.float32]] | None,
        *,
        careful: bool = False,
    ) -> None:
        self._run(lambda: self._context.compute(parts, columns, logits, careful=careful))

    def _run(self, job: Callable[[], None]) -> None:
        """Run `job` on the thread that computes, unless a cancellation came before."""

        def guarded(_index: int) -> None:
            if self._cancel.is_set():
                raise CancelledError
            job()

        self._run_all(guarded, 1)

    def _truncate_cells(self, slot: int, length: int) -> int:
        sequences = [self._context.sequence(slot, column) for column in range(len(self._context.bases))]
        # Every sequence is asked: a generator would stop at the first refusal and leave the others longer.
        if all([self._context.truncate(sequence, length) for sequence in sequences]):  # noqa: C419
            return length
        for sequence in sequences:
            self._context.truncate(sequence, 0)
        return 0

    def _copy_cells(self, source: int, target: int) -> None:
        self._context.copy_slot(source, target)

    def _open_stored(
        self, model: Model, config: ContextConfig, directory: Path, warn: Callable[[str], None]
    ) -> StoredPrompts | None:
        """The prompts on the disk that fit this engine, if its caches can be filled from there at all."""
        if len(self._bases) > 1 and not self._sharing:
            warn(f"`prompt_cache` needs a shared prefill or a single bucket: {self.prefill_note}")
            return None
        key = CacheKey(
            model=model.checked.fingerprint,
            base=self._context.bases[self._leader],
            scaling=repr([rope.parameters for rope in self._context.observation.ropes]),
            cache_type_k=config.cache_type_k,
            cache_type_v=config.cache_type_v,
            flash_attention=config.flash_attention,
            build=f"{version()}, all layers in one cache",
            model_name=model.checked.name,
        )
        cache = PromptCache(directory, key, PROMPT_CACHE_LIMIT, warn)
        return StoredPrompts(cache, _FusedCells(self._context, self._leader, self._run), self._piece)


class _FusedCells:
    """What the leader's sequence holds, as bytes; the buckets' take it with their keys turned."""

    def __init__(self, context: FusedContext, leader: int, run: Callable[[Callable[[], None]], None]) -> None:
        """`run` calls what computes on the engine's thread."""
        self._context = context
        self._leader = leader
        self._run = run

    def read(self, slot: int, start: int, end: int) -> NDArray[np.uint8]:
        """See `Cells.read`."""
        return self._context.read_cells(slot, self._leader, start, end)

    def append(self, slot: int, start: int, tokens: Sequence[int], data: NDArray[np.uint8]) -> None:
        """See `Cells.append`."""
        others = [column for column in range(len(self._context.bases)) if column != self._leader]

        def give() -> None:
            self._context.write_cells(slot, self._leader, start, tokens, data)
            self._context.share(slot, self._leader, others, start, tokens)

        self._run(give)

    def truncate(self, slot: int, length: int) -> None:
        """See `Cells.truncate`."""
        for column in range(len(self._context.bases)):
            self._context.truncate(self._context.sequence(slot, column), length)


def check_servable(model: Model, config: ContextConfig, buckets: int) -> None:
    """Raise UnsupportedModelError, with the reason, for a model that one batch cannot serve under several bases."""
    if model.is_recurrent:
        reason = "keeps a recurrent state, of which the buckets of one batch cannot drop a part"
    elif model.has_rope and model.rotation is None:
        reason = "has positions of several parts (M-RoPE)"
    elif model.checked.header.integer(_MLA_KEY):
        reason = "keeps compressed keys and values (MLA)"
    elif buckets > 1 and not model.has_rope:
        reason = "does not use RoPE, so there is no base to vary"
    elif buckets > min(config.ubatch_size, config.batch_size):
        raise UnsupportedModelError(
            f"{buckets} buckets do not fit into a batch of {min(config.ubatch_size, config.batch_size)} tokens",
            "ask for larger batches (`batch_size`, `ubatch_size`) or fewer buckets",
        )
    else:
        return
    raise UnsupportedModelError(f"{model.path} ({model.architecture}) {reason}", _HINT)


def _sharing_obstacle(model: Model, config: ContextConfig, buckets: int) -> str:
    """Why prompts must be computed in every bucket as far as is known beforehand, as a note; empty if nothing."""
    if config.prefill == "exact" or buckets == 1:
        return "exact prefill"
    if model.checked.header.integer(_EXPERTS_KEY):
        # A graph that is left out leaves the choice of experts undefined, which llama.cpp reads to copy weights.
        return "exact prefill: the model has experts, and one batch cannot leave them out"
    return ""


def _runs(slots: Sequence[int], limit: int, fillers: Container[int], widest: int) -> Iterator[list[int]]:
    """Ascending slots as runs without gaps, at most `limit` long; gaps of up to `widest` `fillers` are filled."""
    run: list[int] = []
    for slot in slots:
        gap = range(run[-1] + 1, slot) if run else range(0)
        fits = len(run) + len(gap) < limit
        if run and not (fits and len(gap) <= widest and all(filler in fillers for filler in gap)):
            yield run
            run, gap = [], range(0)
        run += [*gap, slot]
    if run:
        yield run
