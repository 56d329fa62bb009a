"""Which engine to use: whether the fused one is right for a model here, and whether it is the faster one.

Both are found out at first use and remembered in a small file each, unless that takes too long or Ctrl-C skips it.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from time import perf_counter, time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abcli.atomic import write_atomically
from abcli.config import Buckets, ContextConfig, engines_directory
from abcli.engine.fused import check_servable
from abcli.engine.make import Kind, make_engine
from abcli.engine.patience import OutOfTimeError, Patience
from abcli.engine.workers import available_cores
from abcli.errors import AbcliError, UnsupportedModelError
from abcli.gguf.checked import CheckedModel
from abcli.native.compute_thread import run_on_compute_thread
from abcli.native.llama import CancelFlag, devices, version
from abcli.native.model import Model
from abcli.native.rotating.context import FusedContext, SlotPart
from abcli.native.rotating.keys import PROBE_POSITION, agree

# Raised when the probe comes to look at more.
PROBE_VERSION = 3
# The text stands where a wrong angle shows; its last tokens come one by one.
_TEXT = "The history of the lighthouse begins with fires that were lit on hills, for the sailors to steer by at night."
_TEXT_TOKENS = 20
_SINGLE_TOKENS = 4
_PROBE_CONTEXT = 256
# Largest mean KL divergence: a little on exact weights, a few times what rounding alone does on quantised ones.
_LEAST_DIVERGENCE = 1e-4
_MOST_DIVERGENCE = 0.1
_FLOORS = 4.0
# A base so near that only rounding tells it from the true one.
_NUDGE = 1 + 1e-5
# How long the comparison of speeds goes on, and how many rounds it takes at least.
_SECONDS = 0.8
_ROUNDS = 3
_WARM_STEPS = 2
# The wall time that both may take together, and how long it is then left alone.
TRIAL_SECONDS = 3.0
_RETRY_SECONDS = 24 * 3600

Logs = NDArray[np.float64]


@dataclass(frozen=True)
class Verdict:
    """Whether the fused engine gives what plain contexts give: mean KL divergence per bucket, and that of rounding."""

    divergences: tuple[float, ...]
    floor: float
    reason: str

    @property
    def sound(self) -> bool:
        """Whether it may be used."""
        return not self.reason


@dataclass(frozen=True)
class Speeds:
    """Steps per second of both engines, at the beginning of a context."""

    fused: float
    contexts: float


@dataclass(frozen=True)
class Choice:
    """The engine to use, and why, in a few words."""

    kind: Kind
    reason: str


Verify = Callable[[Model, ContextConfig, Sequence[float]], Verdict]
Measure = Callable[[Model, ContextConfig, Buckets], Speeds]


def choose(
    model: Model,
    config: ContextConfig,
    buckets: Buckets,
    verify: Verify | None = None,
    measure: Measure | None = None,
    say: Callable[[str], None] = lambda _text: None,
    seconds: float = TRIAL_SECONDS,
) -> Choice:
    """The engine for `config.engine`; what has been found out before is not found out again, `say` is told what is.

    "auto" takes contexts where the fused engine cannot serve, is not right, or is not faster, and, until another day,
    where that is not found out within `seconds` or Ctrl-C (KeyboardInterrupt) skips it. "fused" takes all the time it
    needs, and raises UnsupportedModelError with the reason instead.
    """
    if config.engine == "contexts":
        return Choice("contexts", "as asked for")
    single = len(set(buckets.bases)) == 1
    if config.engine == "auto" and single and (config.slots == 1 or len(buckets.bases) > 1):
        return Choice("contexts", "there is one bucket")
    patience = Patience("trying the fused engine", math.inf if config.engine == "fused" else seconds)
    try:
        check_servable(model, config, len(buckets.bases))
        if single:
            # Nothing is turned, so there is nothing to verify, nor would a verdict say anything of other bases.
            asked = config.engine == "fused"
            why = "as asked for" if asked else "there is one bucket, and each slot has cells of its own to pass over"
            return Choice("fused", why)
        if patience.seconds < math.inf:
            say = partial(_say_what_is_not_put_off, model.checked, config, len(buckets.bases), say)
        verdict = _verdict(model, config, buckets.bases, verify or partial(verify_fused, patience=patience), say)
        if not verdict.sound:
            raise UnsupportedModelError(f"the fused engine refuses itself: {verdict.reason}", "use `engine=contexts`")
        if config.engine == "fused":
            return Choice("fused", "as asked for")
        speeds = _speeds(model, config, buckets, measure or partial(measure_engines, patience=patience), say)
    except (AbcliError, KeyboardInterrupt) as error:
        if config.engine == "fused":
            raise
        if isinstance(error, (OutOfTimeError, KeyboardInterrupt)):
            remember(_put_off_name(model.checked, config, len(buckets.bases)), {"at": time()})
        return Choice("contexts", error.message if isinstance(error, AbcliError) else "the trial was skipped")
    kind: Kind = "fused" if speeds.fused > speeds.contexts else "contexts"
    return Choice(kind, f"measured: {speeds.fused:.3g} steps/s fused, {speeds.contexts:.3g} in contexts")


def forget_speeds(model: CheckedModel, config: ContextConfig, buckets: int) -> None:
    """Let the next `choose` for `config` measure which engine is faster; what was remembered is dropped."""
    # A file that cannot be removed only means that the old choice stays.
    with suppress(OSError):
        _speeds_name(model, config, buckets).unlink(missing_ok=True)
        _put_off_name(model, config, buckets).unlink(missing_ok=True)


def verify_fused(
    model: Model, config: ContextConfig, bases: Sequence[float], patience: Patience | None = None
) -> Verdict:
    """Compare a short text in the fused context with a plain context per base.

    Raises what making them raises, and AbcliError if that takes longer than `patience` has.

    The first token attends to nothing else, so that its keys depend on its position alone and tell the angle itself,
    in every layer; the divergence tells whether queries and keys fit together. The floor is what a base that is equal
    but for rounding gives, or another batch shape, whichever is more.
    """
    cancel = CancelFlag()
    with (patience or Patience("the comparison")).cancelling(cancel.set):
        return run_on_compute_thread(lambda: _compare(model, config, bases, cancel), cancel.set)


def _compare(model: Model, config: ContextConfig, bases: Sequence[float], cancel: CancelFlag) -> Verdict:
    small = replace(
        config,
        context_size=_PROBE_CONTEXT,
        slots=1,
        batch_size=max(64, _TEXT_TOKENS * len(bases)),
        ubatch_size=max(64, _TEXT_TOKENS * len(bases)),
    )
    native = float(np.float32(model.native_base))
    own = native if native in bases else bases[0]

    def context(*columns: float, base: float) -> FusedContext:
        return FusedContext(model, columns, small, base, config.threads or available_cores(), cancel)

    with context(*bases, base=own) as fused:
        ours = _text(model, fused)
        keys = [fused.keys_at(column, 0) for column in range(len(bases))]
    theirs = {}
    for base in dict.fromkeys(bases):
        with context(base, base=base) as plain:
            theirs[base] = _text(model, plain)[:, 0]
            wrong = _wrong_layer(plain.keys_at(0, 0), [keys[i] for i, b in enumerate(bases) if b == base])
            if wrong is not None:
                return Verdict((), 0.0, f"the keys of layer {wrong} are not those of a context with base {base:g}")
            if base == own:
                singly = _text(model, plain, pieces=_TEXT_TOKENS)[:, 0]
    with context(own * _NUDGE, base=own * _NUDGE) as nudged:
        floors = [_divergence(theirs[own], logits) for logits in (_text(model, nudged)[:, 0], singly)]
    divergences = tuple(_divergence(theirs[base], ours[:, bucket]) for bucket, base in enumerate(bases))
    limit = min(_FLOORS * max(floors) + _LEAST_DIVERGENCE, _MOST_DIVERGENCE)
    # Not a number is not below the limit either.
    worst = float(np.max(divergences))
    sound = worst <= limit
    reason = "" if sound else f"its KL divergence from plain contexts is {worst:.2g}, the limit here is {limit:.2g}"
    return Verdict(divergences, max(floors), reason)


def measure_engines(model: Model, config: ContextConfig, buckets: Buckets, patience: Patience | None = None) -> Speeds:
    """Decode a few tokens with both engines in turn, for about a second. Raises as `verify_fused`."""
    patience = patience or Patience("the measurement")
    small = replace(config, context_size=_PROBE_CONTEXT, prefill="exact", prompt_cache=None)
    tokens = dict.fromkeys(range(config.slots), model.vocabulary_size // 2)
    with ExitStack() as stack:
        kinds: tuple[Kind, Kind] = ("fused", "contexts")
        engines = [stack.enter_context(make_engine(kind, model, small, buckets)) for kind in kinds]
        for engine in engines:
            stack.enter_context(patience.cancelling(engine.cancel))
        times: list[list[float]] = [[] for _ in engines]
        for engine in engines:
            for _ in range(_WARM_STEPS):
                patience.check()
                engine.step(tokens)
        begin = perf_counter()
        for _ in range(_PROBE_CONTEXT - _WARM_STEPS):
            for engine, taken in zip(engines, times, strict=True):
                patience.check()
                start = perf_counter()
                engine.step(tokens)
                taken.append(perf_counter() - start)
            if perf_counter() - begin > _SECONDS and len(times[0]) >= _ROUNDS:
                break
    fused, contexts = (1 / statistics.median(taken) for taken in times)
    return Speeds(fused, contexts)


def _verdict(
    model: Model, config: ContextConfig, bases: Sequence[float], verify: Verify, say: Callable[[str], None]
) -> Verdict:
    name = remembered("verdict", _circumstances(model.checked, config))
    known = recall(name)
    if known is not None:
        with suppress(KeyError, TypeError, ValueError):
            divergences = tuple(float(number) for number in known["divergences"])
            return Verdict(divergences, float(known["floor"]), str(known["reason"]))
    say("trying the fused engine (once for this model)")
    verdict = verify(model, config, bases)
    remember(name, asdict(verdict))
    return verdict


def _speeds(
    model: Model, config: ContextConfig, buckets: Buckets, measure: Measure, say: Callable[[str], None]
) -> Speeds:
    name = _speeds_name(model.checked, config, len(buckets.bases))
    known = recall(name)
    if known is not None:
        with suppress(KeyError, TypeError, ValueError):
            return Speeds(float(known["fused"]), float(known["contexts"]))
    say("measuring which engine is faster (once for this model and number of buckets)")
    speeds = measure(model, config, buckets)
    remember(name, asdict(speeds))
    return speeds


def _say_what_is_not_put_off(
    model: CheckedModel, config: ContextConfig, buckets: int, say: Callable[[str], None], what: str
) -> None:
    """Say what is to be found out now. Raises AbcliError if it took too long, or was skipped, within the last day."""
    known = recall(_put_off_name(model, config, buckets)) or {}
    with suppress(KeyError, TypeError, ValueError):
        if 0 <= time() - float(known["at"]) < _RETRY_SECONDS:
            raise AbcliError("the fused engine was not tried to the end here; another day once more")
    say(f"{what}; Ctrl-C skips it")


def _speeds_name(model: CheckedModel, config: ContextConfig, buckets: int) -> Path:
    return remembered("speeds", speed_circumstances(model, config, buckets))


def _put_off_name(model: CheckedModel, config: ContextConfig, buckets: int) -> Path:
    return remembered("put-off", speed_circumstances(model, config, buckets))


def speed_circumstances(model: CheckedModel, config: ContextConfig, buckets: int) -> list[object]:
    """All on which speed depends."""
    return [*_circumstances(model, config), config.threads or available_cores(), buckets, config.slots]


def _circumstances(model: CheckedModel, config: ContextConfig) -> list[object]:
    """All but the number of buckets on which right and fast depend."""
    return [
        PROBE_VERSION,
        model.fingerprint,
        version(),
        [(device.name, device.description) for device in devices()],
        model.config.gpu_layers,
        config.flash_attention,
        config.cache_type_k,
        config.cache_type_v,
    ]


def remembered(kind: str, circumstances: Sequence[object]) -> Path:
    """The file that keeps what was found out of one kind under some circumstances."""
    digest = hashlib.sha256(json.dumps(circumstances).encode()).hexdigest()
    return engines_directory() / f"{kind}-{digest[:40]}.json"


def recall(path: Path) -> dict[str, Any] | None:
    """What such a file says, None if there is none that can be read."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    return None


def remember(path: Path, found: Mapping[str, object]) -> None:
    """Keep what was found out, where that is possible."""
    # A full or read-only disk only means that it is found out again next time.
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(found).encode())


def _text(model: Model, context: FusedContext, pieces: int = 1) -> Logs:
    """Log-probabilities float64 [positions, buckets, vocabulary] of the last tokens of a text, computed afresh.

    All but the last tokens are computed in `pieces` pieces.
    """
    columns = range(context.buckets)
    tokens = model.tokenize(_TEXT, add_special=True, parse_special=False)[:_TEXT_TOKENS]
    tokens += [model.vocabulary_size // 2] * (_TEXT_TOKENS - len(tokens))
    for column in columns:
        context.truncate(context.sequence(0, column), 0)
    head = _TEXT_TOKENS - _SINGLE_TOKENS
    ends = sorted({head * (piece + 1) // pieces for piece in range(pieces)} | set(range(head, _TEXT_TOKENS + 1)))
    found = []
    start = 0
    for end in ends:
        if end == start:
            continue
        logits = np.empty((len(columns), model.vocabulary_size), np.float32)
        context.compute([SlotPart(0, PROBE_POSITION + start, tokens[start:end])], columns, [list(logits)])
        if end >= head:
            found.append(logits.astype(np.float64))
        start = end
    stacked = np.array(found)
    stacked -= stacked.max(axis=-1, keepdims=True)
    return np.asarray(stacked - np.log(np.exp(stacked).sum(axis=-1, keepdims=True)))


def _divergence(left: Logs, right: Logs) -> float:
    """Mean KL(left || right) over the positions, in nats."""
    return float((np.exp(left) * (left - right)).sum(axis=-1).mean())


def _wrong_layer(
    wanted: Mapping[int, NDArray[np.float32]], found: Sequence[Mapping[int, NDArray[np.float32]]]
) -> int | None:
    """The first layer in which a bucket's key of the first token is another one."""
    for layer in sorted(wanted):
        if not all(agree(keys[layer], wanted[layer]) for keys in found):
            return layer
    return None
