"""Whether it saves time here to let the native bucket decide alone where it is sure; found out once, by measuring."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from statistics import median
from time import perf_counter

from abcli.config import ContextConfig
from abcli.engine.choose import TRIAL_SECONDS, recall, remember, remembered, speed_circumstances
from abcli.engine.engine import NO_GATES, Engine, Gate
from abcli.engine.make import Kind
from abcli.engine.patience import OutOfTimeError, Patience
from abcli.gguf.checked import CheckedModel

# So large a share of the tokens may be unsure: as in answers out of a text at most, less than in prose.
_USUAL_SHARE = 0.7
_PROMPT_TOKENS = 32
_SECONDS = 0.8
_ROUNDS = 3
# In a round: tokens of which the native bucket is sure, one of which it isn't, and one that all compute at once.
_SURE_STEPS = 2


@dataclass(frozen=True)
class GateCosts:
    """Seconds of a step in which the native bucket decides alone, in which it is unsure, and without a gate."""

    sure: float
    unsure: float
    ungated: float

    @property
    def pays(self) -> bool:
        """Whether a gate saves time on texts of which the usual share is unsure."""
        return self.sure + _USUAL_SHARE * (self.unsure - self.sure) < self.ungated


def paying_gate(
    model: CheckedModel, engine: Engine, kind: Kind, config: ContextConfig, gate: float, say: Callable[[str], None]
) -> float | None:
    """`gate` where it saves time with an engine that holds nothing yet, else none.

    What has been found out before is not found out again. None too if it takes too long or Ctrl-C (KeyboardInterrupt)
    skips it; the slot used is empty afterwards.
    """
    if len(engine.bases) == 1:
        return None
    name = remembered("gate", [*speed_circumstances(model, config, len(engine.bases)), kind])
    costs = None
    if (known := recall(name)) is not None:
        with suppress(KeyError, TypeError, ValueError):
            costs = GateCosts(*(float(known[field]) for field in ("sure", "unsure", "ungated")))
    if costs is None:
        say("measuring whether a gate saves time (once for this model and number of buckets); Ctrl-C skips it")
        try:
            costs = measure_gate(engine, Patience("measuring the gate", TRIAL_SECONDS))
        except (OutOfTimeError, KeyboardInterrupt):
            return None
        remember(name, asdict(costs))
    return gate if costs.pays else None


def measure_gate(engine: Engine, patience: Patience) -> GateCosts:
    """Decode in slot 0, for about a second, with and without a gate. Raises OutOfTimeError and NativeError."""
    token = engine.vocabulary_size // 2
    sure: Mapping[int, Gate] = {0: lambda _logits: True}
    unsure: Mapping[int, Gate] = {0: lambda _logits: False}
    kinds = [*[("sure", sure)] * _SURE_STEPS, ("unsure", unsure), ("ungated", NO_GATES)]
    times: dict[str, list[float]] = {name: [] for name, _ in kinds}
    begin = perf_counter()
    try:
        with patience.cancelling(engine.cancel):
            engine.prefill(0, [token] * min(_PROMPT_TOKENS, engine.context_size // 2))
            # The first round is not counted: memory is planned in it.
            while len(engine.tokens(0)) + len(kinds) <= engine.context_size:
                for name, gates in kinds:
                    patience.check()
                    start = perf_counter()
                    engine.step({0: token}, gates=gates)
                    times[name].append(perf_counter() - start)
                if perf_counter() - begin > _SECONDS and len(times["unsure"]) > _ROUNDS:
                    break
    finally:
        engine.truncate(0, 0)
    first = {"sure": _SURE_STEPS}
    return GateCosts(**{name: median(found[first.get(name, 1) :] or found) for name, found in times.items()})
