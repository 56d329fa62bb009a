"""Makes what is measured of one loaded model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from abcli.bench.contenders import EnginePlayer, Player, RawPlayer, Text, sized
from abcli.bench.plan import BenchSettings, Contender, EngineKind, PromptPhase
from abcli.bench.resident import Memory, measure_memory
from abcli.config import BucketConfig, EngineConfig
from abcli.engine.choose import Speeds, choose, forget_speeds
from abcli.engine.make import make_engine
from abcli.engine.memory import CONTEXT_STEP, Room, free_room, gibibytes, predict
from abcli.engine.opening import check_buckets
from abcli.errors import AbcliError, OutOfMemoryError
from abcli.gguf.header import Header
from abcli.native.crash_probe import ensure_loadable
from abcli.native.model import Model
from abcli.rope.bases import choose_bases


@dataclass(frozen=True)
class AutoChoice:
    """What `--engine auto` takes, and why; `remembered` from an earlier measurement, or decided by this one."""

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
        """What `--engine auto` takes now, given seconds per token of the engines; None if they don't decide it."""


class ModelWorkshop:
    """Implements `Workshop` with llama.cpp."""

    def __init__(self, model: Model, header: Header, config: EngineConfig, settings: BenchSettings, room: Room) -> None:
        """Check and probe the fused engine as `--engine fused` would; the model stays the caller's.

        `config.bases` and `config.context_size` are ignored. `room` is what was free before the model was loaded.
        """
        self.model = model
        self.header = header
        self._settings = settings
        self._text = Text.random(settings.prompt_tokens, settings.new_tokens, model.vocabulary_size)
        self._config = sized(config, self._text)
        self._room = room
        # Most buckets first: what the probe finds out is remembered for any number.
        self._refusals = {contender: self._find_refusal(contender) for contender in reversed(settings.contenders)}

    def bases(self, buckets: int) -> tuple[float, ...]:
        """See `Workshop.bases`."""
        return choose_bases(BucketConfig(count=buckets), self.header.native_base)

    def refusal(self, contender: Contender) -> str:
        """See `Workshop.refusal`."""
        return self._refusals[contender]

    def check_room(self, contenders: Iterable[Contender], prompts: PromptPhase) -> None:
        """See `Workshop.check_room`."""
        if not self._config.force:
            configs = [self._engine_config(contender, prompts) for contender in contenders]
            check_together(configs, self.header, self._room)

    @contextmanager
    def open(self, contender: Contender, prompts: PromptPhase) -> Iterator[Player]:
        """See `Workshop.open`."""
        config = self._engine_config(contender, prompts)
        if contender.kind == "raw":
            with RawPlayer(self.model, config, self._text) as player:
                yield player
            return
        with make_engine(contender.kind, self.model, config, self.header) as engine:
            yield EnginePlayer(engine, self._text)

    def memory(self, contender: Contender) -> Memory:
        """See `Workshop.memory`."""
        config = replace(self._engine_config(contender), context_size=self._settings.context_size)
        return measure_memory(config, self.header, max(1, self._settings.prompt_tokens))

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

        config = replace(self._engine_config(Contender(buckets, "fused")), engine="auto")
        found = choose(self.model, config, self.header, measure=measured)
        decided = buckets == 1 or refused or asked
        return AutoChoice(found.kind, found.reason, remembered=not decided)

    def forget_choices(self) -> None:
        """Forget which engine was found faster before, so that `choice` decides anew."""
        for buckets in self._settings.buckets:
            forget_speeds(self._engine_config(Contender(buckets, "fused")), self.header)

    def _engine_config(self, contender: Contender, prompts: PromptPhase = "shared") -> EngineConfig:
        raw = contender.kind == "raw"
        return replace(
            self._config,
            bases=self.bases(contender.buckets),
            engine="contexts" if contender.kind == "contexts" else "fused",
            prefill="exact" if raw else prompts,
        )

    def _find_refusal(self, contender: Contender) -> str:
        config = self._engine_config(contender)
        try:
            check_buckets(self.model, contender.buckets)
            if contender.kind == "fused":
                choose(self.model, config, self.header)
        except AbcliError as error:
            return error.message
        return ""


@contextmanager
def open_workshop(config: EngineConfig, header: Header, settings: BenchSettings) -> Iterator[ModelWorkshop]:
    """Load `config.model`, whose checked `header` it is, for a benchmark; all is freed after the block.

    Raises ModelFileError, UnsupportedModelError and OutOfMemoryError.
    """
    room = free_room(config)
    bases = choose_bases(BucketConfig(count=1), header.native_base)
    if not config.force:
        check_together([replace(config, bases=bases, context_size=CONTEXT_STEP)], header, room)
    ensure_loadable(config.model, header)
    with Model(config.model, config.gpu_layers, header.adapters) as model:
        yield ModelWorkshop(model, header, config, settings, room)


def check_together(configs: Sequence[EngineConfig], header: Header, room: Room) -> None:
    """Raise OutOfMemoryError if one or more engines on one model are predicted not to fit into `room` together."""
    predictions = [predict(config, header) for config in configs]
    weights = predictions[0].item("weights")
    host = weights.host + sum(prediction.host - weights.host for prediction in predictions)
    device = weights.device + sum(prediction.device - weights.device for prediction in predictions)
    if host <= room.host and device <= room.device:
        return
    on_device = host <= room.host
    needed, free, where = (device, room.device, " on the device") if on_device else (host, room.host, "")
    raise OutOfMemoryError(
        f"what is measured side by side needs {gibibytes(needed)} of memory{where}, but {gibibytes(free)} are free",
        "ask for fewer buckets, a shorter prompt (--n-prompt), smaller batches (--ubatch-size) or one engine "
        "(--engine); --force tries it as it is",
    )
