"""Makes what is measured of one loaded model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from abcli.bench.contenders import EnginePlayer, Player, RawPlayer, Text, sized
from abcli.bench.plan import BenchSettings, Contender, EngineKind, PromptPhase
from abcli.bench.resident import Memory, measure_memory
from abcli.config import CONTEXT_STEP, BucketConfig, Buckets, ContextConfig
from abcli.engine.choose import Speeds, choose, forget_speeds
from abcli.engine.make import make_engine
from abcli.engine.memory import Room, free_room, predict
from abcli.engine.opening import check_buckets
from abcli.errors import AbcliError, OutOfMemoryError
from abcli.gguf.checked import CheckedModel
from abcli.native.crash_probe import ensure_loadable
from abcli.native.model import Model
from abcli.rope.bases import resolve_buckets
from abcli.text import gibibytes


@dataclass(frozen=True)
class AutoChoice:
    """What the engine "auto" takes, and why; `remembered` from an earlier measurement, or decided by this one."""

    engine: EngineKind
    reason: str
    remembered: bool = False


class Workshop(Protocol):
    """Where contenders come from; what a benchmark needs to know of a model."""

    def bases(self, buckets: int) -> tuple[float, ...]:
        """The RoPE bases of so many buckets."""

    def refusal(self, contender: Contender) -> str:
        """Why this model cannot be served that way; empty if it can."""

    def check_room(self, contenders: Iterable[Contender], prompts: PromptPhase) -> None:
        """Raise OutOfMemoryError if they are predicted not to fit into memory side by side."""

    def open(self, contender: Contender, prompts: PromptPhase) -> AbstractContextManager[Player]:
        """Make a contender for the time of a block. Raises UnsupportedModelError and NativeError."""

    def memory(self, contender: Contender) -> Memory:
        """The memory of an engine, measured where that is possible."""

    def choice(self, buckets: int, seconds: Mapping[EngineKind, float]) -> AutoChoice | None:
        """What the engine "auto" takes now, given seconds per token of the engines; None if they don't decide it."""


class ModelWorkshop:
    """Implements `Workshop` with llama.cpp."""

    def __init__(self, model: Model, config: ContextConfig, settings: BenchSettings, room: Room) -> None:
        """Check and probe the fused engine as the engine "fused" would; the model stays the caller's.

        The context size follows from `settings`. `room` is what was free before the model was loaded.
        """
        self.model = model
        self._settings = settings
        self._text = Text.random(settings.prompt_tokens, settings.new_tokens, model.vocabulary_size)
        self._config = sized(config, self._text)
        self._room = room
        # Most buckets first: what the probe finds out is remembered for any number.
        self._refusals = {contender: self._find_refusal(contender) for contender in reversed(settings.contenders)}

    def bases(self, buckets: int) -> tuple[float, ...]:
        """See `Workshop.bases`."""
        return self._buckets(buckets).bases

    def refusal(self, contender: Contender) -> str:
        """See `Workshop.refusal`."""
        return self._refusals[contender]

    def check_room(self, contenders: Iterable[Contender], prompts: PromptPhase) -> None:
        """See `Workshop.check_room`."""
        if not self._config.force:
            set_ups = [(self._context(one, prompts), self._buckets(one.buckets)) for one in contenders]
            check_together(self.model.checked, set_ups, self._room)

    @contextmanager
    def open(self, contender: Contender, prompts: PromptPhase) -> Iterator[Player]:
        """See `Workshop.open`."""
        config, buckets = self._context(contender, prompts), self._buckets(contender.buckets)
        if contender.kind == "raw":
            with RawPlayer(self.model, config, contender.buckets, self._text) as player:
                yield player
            return
        with make_engine(contender.kind, self.model, config, buckets) as engine:
            yield EnginePlayer(engine, self._text)

    def memory(self, contender: Contender) -> Memory:
        """See `Workshop.memory`."""
        config = replace(self._context(contender), context_size=self._settings.context_size)
        buckets = self._buckets(contender.buckets)
        return measure_memory(self.model.checked, config, buckets, max(1, self._settings.prompt_tokens))

    def choice(self, buckets: int, seconds: Mapping[EngineKind, float]) -> AutoChoice | None:
        """See `Workshop.choice`."""
        refused = bool(self._refusals.get(Contender(buckets, "fused"), ""))
        if buckets > 1 and not refused and set(seconds) != {"contexts", "fused"}:
            return None
        asked = False

        def measured(*_: object) -> Speeds:
            nonlocal asked
            asked = True
            return Speeds(1 / seconds["fused"], 1 / seconds["contexts"])

        config = replace(self._context(Contender(buckets, "fused")), engine="auto")
        found = choose(self.model, config, self._buckets(buckets), measure=measured, seconds=math.inf)
        decided = buckets == 1 or refused or asked
        return AutoChoice(found.kind, found.reason, remembered=not decided)

    def forget_choices(self) -> None:
        """Forget which engine was found faster before, so that `choice` decides anew."""
        for buckets in self._settings.buckets:
            forget_speeds(self.model.checked, self._context(Contender(buckets, "fused")), buckets)

    def _buckets(self, count: int) -> Buckets:
        return resolve_buckets(BucketConfig(count), self.model.checked.header.native_base)

    def _context(self, contender: Contender, prompts: PromptPhase = "shared") -> ContextConfig:
        raw = contender.kind == "raw"
        return replace(
            self._config,
            engine="contexts" if contender.kind == "contexts" else "fused",
            prefill="exact" if raw else prompts,
        )

    def _find_refusal(self, contender: Contender) -> str:
        try:
            check_buckets(self.model, contender.buckets)
            if contender.kind == "fused":
                choose(self.model, self._context(contender), self._buckets(contender.buckets))
        except AbcliError as error:
            return error.message
        return ""


@contextmanager
def open_workshop(checked: CheckedModel, config: ContextConfig, settings: BenchSettings) -> Iterator[ModelWorkshop]:
    """Load a model for a benchmark; all is freed after the block.

    Raises ModelFileError, UnsupportedModelError and OutOfMemoryError.
    """
    room = free_room(checked.config.gpu_layers)
    one = resolve_buckets(BucketConfig(count=1), checked.header.native_base)
    if not config.force:
        check_together(checked, [(replace(config, context_size=CONTEXT_STEP), one)], room)
    ensure_loadable(checked)
    with Model(checked) as model:
        yield ModelWorkshop(model, config, settings, room)


def check_together(checked: CheckedModel, set_ups: Sequence[tuple[ContextConfig, Buckets]], room: Room) -> None:
    """Raise OutOfMemoryError if one or more engines on one model are predicted not to fit into `room` together."""
    predictions = [predict(checked, context, buckets) for context, buckets in set_ups]
    weights = predictions[0].item("weights")
    host = weights.host + sum(prediction.host - weights.host for prediction in predictions)
    device = weights.device + sum(prediction.device - weights.device for prediction in predictions)
    if host <= room.host and device <= room.device:
        return
    on_device = host <= room.host
    needed, free, where = (device, room.device, " on the device") if on_device else (host, room.host, "")
    raise OutOfMemoryError(
        f"what is measured side by side needs {gibibytes(needed)} of memory{where}, but {gibibytes(free)} are free",
        "ask for fewer buckets, a shorter prompt (`n_prompt`), smaller batches (`ubatch_size`) or one engine "
        "(`engine`); `force` tries it as it is",
    )
