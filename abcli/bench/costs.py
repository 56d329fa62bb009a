"""What sets of buckets cost as `run` has them: tokens per second, measured side by side, and memory, predicted."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace

from abcli.bench.contenders import EnginePlayer, Text, sized
from abcli.bench.rounds import Rounds, Spread, Turn, take_turns
from abcli.bench.workshop import check_together
from abcli.config import UNTUNED, Buckets, ContextConfig, PrefillMode, Tuning
from abcli.engine.choose import choose
from abcli.engine.engine import Engine
from abcli.engine.make import make_engine
from abcli.engine.memory import free_room, predict
from abcli.gguf.checked import CheckedModel
from abcli.merge import Merger
from abcli.native.crash_probe import ensure_loadable
from abcli.native.model import Model
from abcli.text import StageProgress

_NEW_TOKENS = 8
_ROUNDS = 6


@dataclass(frozen=True)
class Costed:
    """What is to be costed: buckets, how they read prompts, and how the model's heads are tuned."""

    buckets: Buckets
    prefill: PrefillMode = "auto"
    tuning: Tuning = UNTUNED

    @property
    def kind(self) -> tuple[object, ...]:
        """All that speed and memory depend on: which bases they are makes no difference."""
        buckets = self.buckets
        tuned = bool(self.tuning.gains), bool(self.tuning.multipliers)
        return len(buckets.bases), buckets.prefill_base in buckets.bases, buckets.merge, self.prefill, *tuned


@dataclass(frozen=True)
class Cost:
    """Tokens per second after a prompt, merged, and the bytes of memory that model and engine are predicted to take."""

    speed: Spread
    memory: int


def measure_costs(
    checked: CheckedModel,
    config: ContextConfig,
    sets: Mapping[str, Costed],
    prompt_tokens: int,
    progress: StageProgress = lambda _what, _done, _total: None,
) -> dict[str, Cost]:
    """The costs of `sets`, by their names, after a random prompt of `prompt_tokens`; one kind is measured once.

    The model is loaded for it. Raises OutOfMemoryError where they do not fit side by side, and as loading and decoding.
    """
    kinds = {one.kind: one for one in sets.values()}
    text = Text.random(prompt_tokens, _NEW_TOKENS, checked.header.vocabulary_size)
    set_ups = {kind: (sized(replace(config, prefill=one.prefill), text), one.buckets) for kind, one in kinds.items()}
    if not config.force:
        check_together(checked, list(set_ups.values()), free_room(checked.config.gpu_layers))
    ensure_loadable(checked)
    memory, players = {}, {}
    with ExitStack() as stack:
        models = {
            tuning: stack.enter_context(Model(checked.with_tuning(tuning)))
            for tuning in {one.tuning for one in kinds.values()}
        }
        for done, (kind, (context, buckets)) in enumerate(set_ups.items()):
            progress("reading prompts", done, len(kinds))
            model = models[kinds[kind].tuning]
            chosen = choose(model, context, buckets).kind
            memory[kind] = predict(checked, replace(context, engine=chosen), buckets).total
            engine = stack.enter_context(make_engine(chosen, model, context, buckets))
            players[kind] = _MergingPlayer(engine, text, buckets)
            players[kind].read()
            players[kind].decode()
        found: Rounds[tuple[object, ...]] = Rounds()
        turns = {kind: Turn(player.decode, _NEW_TOKENS, player.rewind) for kind, player in players.items()}
        done, total = 0, _ROUNDS * len(turns)

        def on_turn() -> None:
            nonlocal done
            progress("measuring speeds", done := done + 1, total)

        take_turns(turns, _ROUNDS, found, on_turn)
    speeds = {kind: Spread.of([1 / seconds for seconds in found.seconds(kind)]) for kind in kinds}
    return {name: Cost(speeds[one.kind], memory[one.kind]) for name, one in sets.items()}


class _MergingPlayer(EnginePlayer):
    """An engine whose buckets are merged at each step, and the likeliest token found."""

    def __init__(self, engine: Engine, text: Text, buckets: Buckets) -> None:
        super().__init__(engine, text)
        self._buckets = buckets
        self._merger = Merger(len(buckets.bases), engine.vocabulary_size)

    def decode(self) -> None:
        """See `Player.decode`."""
        for token in self._text.answer:
            logits = self._engine.step({0: token})[0]
            if len(logits) > 1:
                logits = self._merger.merge(logits, self._buckets.merge, self._buckets.weights).logits
            logits.argmax()
