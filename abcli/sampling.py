"""How an answer is sampled: every setting once, with its names, range, default and meaning."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

from abcli.config import MergeRule
from abcli.errors import UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# llama.cpp reads this seed as "draw one"; abcli draws its own so that it can be shown.
NATIVE_RANDOM_SEED = 0xFFFFFFFF
DEFAULT_DRY_BREAKERS = ("\n", ":", '"', "*")
MAX_LAST_N = 1 << 24
MAX_BREAKERS = 64
MAX_BREAKER_BYTES = 40  # llama.cpp cuts longer ones off, maybe within a character
MAX_DRAFT = 32
_MAX_INT32 = 2**31 - 1
_SMALLEST_TEMPERATURE = 1e-6

# A probability; "auto": the usual one where that saves time.
GateSetting: TypeAlias = float | Literal["auto"] | None
# Tokens of a draft at most; "auto": as many as pay.
LookupLength: TypeAlias = int | Literal["auto"] | None


@dataclass(frozen=True)
class Setting:
    """What is known of one number: llama.cpp's flags for it, the first without dashes being its short name."""

    flags: tuple[str, ...]
    help: str
    least: float
    largest: float

    @property
    def short(self) -> str:
        """The name that llama.cpp's flag gives it, as a Python name."""
        return self.flags[0].lstrip("-").replace("-", "_")


def _setting(default: Any, flags: str, help: str, least: float, largest: float) -> Any:
    return field(default=default, metadata={"setting": Setting(tuple(flags.split()), help, least, largest)})


@dataclass(frozen=True)
class SamplingNumbers:
    """The numbers of llama.cpp's samplers, under its names and with its defaults (common/common.h).

    The bounds of the penalties keep float32 logits finite.
    """

    seed: int = _setting(-1, "--seed -s", "Random seed; -1: a new one each time.", -1, NATIVE_RANDOM_SEED - 1)
    temperature: float = _setting(0.8, "--temp", "Temperature; 0 takes the most likely token.", -1e6, 1e6)
    top_k: int = _setting(40, "--top-k", "Keep the k most likely tokens; 0: all.", -1, _MAX_INT32)
    top_p: float = _setting(0.95, "--top-p", "Keep tokens up to this total probability.", 0, 1)
    min_p: float = _setting(0.05, "--min-p", "Drop tokens less likely than this share of the likeliest.", 0, 1)
    typical_p: float = _setting(1.0, "--typical", "Locally typical sampling; 1: off.", 0, 1)
    top_n_sigma: float = _setting(-1.0, "--top-n-sigma", "Keep logits this near the best; -1: off.", -1, 1e6)
    xtc_probability: float = _setting(
        0.0, "--xtc-probability", "Chance to exclude the top choices (XTC); 0: off.", 0, 1
    )
    xtc_threshold: float = _setting(0.1, "--xtc-threshold", "Probability above which XTC excludes.", 0, 1)
    dry_multiplier: float = _setting(0.0, "--dry-multiplier", "Strength of the DRY repetition penalty; 0: off.", 0, 1e6)
    dry_base: float = _setting(1.75, "--dry-base", "Growth of the DRY penalty per token.", 1, 1e6)
    dry_allowed_length: int = _setting(2, "--dry-allowed-length", "Longest repetition DRY leaves alone.", 0, _MAX_INT32)
    dry_penalty_last_n: int = _setting(
        -1, "--dry-penalty-last-n", "Tokens DRY looks back; -1: the context.", -1, MAX_LAST_N
    )
    repeat_last_n: int = _setting(
        64, "--repeat-last-n", "Tokens the penalties look back; 0: none, -1: the context.", -1, MAX_LAST_N
    )
    repeat_penalty: float = _setting(
        1.0, "--repeat-penalty", "Divides the logits of repeated tokens; 1: off.", 1e-3, 1e3
    )
    frequency_penalty: float = _setting(0.0, "--frequency-penalty", "Subtracted per repetition; 0: off.", -1e3, 1e3)
    presence_penalty: float = _setting(0.0, "--presence-penalty", "Subtracted once if repeated; 0: off.", -1e3, 1e3)
    mirostat: int = _setting(0, "--mirostat", "2: Mirostat 2.0 instead of truncation; 0: off.", 0, 2)
    mirostat_tau: float = _setting(5.0, "--mirostat-ent", "Mirostat's target entropy (tau).", 0, 1e3)
    mirostat_eta: float = _setting(0.1, "--mirostat-lr", "Mirostat's learning rate (eta).", 0, 1e3)


@dataclass(frozen=True)
class SamplingConfig(SamplingNumbers):
    """How tokens are chosen, and what the answer has to follow.

    At most one of `grammar` (GBNF), `json_schema` (text), `regex` (ECMA-262, for the whole answer) and `lark` is given;
    `schema_lenient` leaves out what cannot be enforced of a schema.
    """

    dry_breakers: tuple[str, ...] = DEFAULT_DRY_BREAKERS
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str = ""
    json_schema: str = ""
    regex: str = ""
    lark: str = ""
    schema_lenient: bool = False


@dataclass(frozen=True)
class ThoughtLimit:
    """The most tokens of the thought with which an answer begins, and those that end it then.

    `opened`: the prompt's end has begun it; otherwise the answer does, with the text `begin`. `end` is what ends it.

    Where an answer is messages, some of which are thoughts, the limit is that of all of them together. A further one
    after it is ended at once, and `saying` are the tokens that then begin a message to the person.
    """

    tokens: int
    opened: bool
    begin: str
    end: str
    closing: tuple[int, ...]
    saying: tuple[int, ...] = ()


@dataclass(frozen=True)
class Steering:
    """What a chat's format asks of one answer: control tokens that are part of its text, and how long it may think."""

    shown_tokens: frozenset[int] = frozenset()
    thought: ThoughtLimit | None = None


@dataclass(frozen=True)
class Choice:
    """What one token was chosen from; the arrays are valid only while the observer is called."""

    token: int
    logits: NDArray[np.float32]
    """[buckets, vocabulary]; [1, vocabulary], the native bucket's, where it decided alone."""
    merged: NDArray[np.float32]
    """[vocabulary]: the merged logits, before penalties, grammar and sampling."""
    weights: NDArray[np.float64]
    """[buckets], or [1]: how much each row weighed; they sum to 1."""
    agreement: float | None
    """The probability mass (0..1) on which the buckets agree; None where one decided alone."""


@dataclass(frozen=True)
class GenerationConfig:
    """One answer: how to sample it and when to stop; -1 new tokens means until the context is full.

    Where the native bucket's likeliest token has more than the probability `gate`, that bucket decides alone; without a
    gate all buckets are asked for every token. `lookup` is the most tokens of a draft that is looked up in prompt and
    answer: as many as pay ("auto"), or None for no drafts. `merge` is the rule of this answer, without the model's
    weights; where there is none, the model's. `steering` is made for each answer, from its conversation, and no setting
    of anyone's. `observer` is called with each token's choice, the one that ends the answer included, while others
    wait; it must not raise.
    """

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    max_tokens: int = -1
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    gate: GateSetting = None
    merge: MergeRule | None = None
    lookup: LookupLength = None
    steering: Steering = field(default_factory=Steering)
    observer: Callable[[Choice], None] | None = field(default=None, repr=False, compare=False)


SETTINGS: Mapping[str, Setting] = {item.name: item.metadata["setting"] for item in dataclasses.fields(SamplingNumbers)}
"""The numbers by the names of their fields."""
_FIELDS = {setting.short: name for name, setting in SETTINGS.items()}
LIMITS = ("max_tokens", "stop", "ignore_eos", "gate", "lookup")
FIELDS: tuple[str, ...] = tuple(item.name for item in dataclasses.fields(SamplingConfig))


def field_of(name: str) -> str:
    """The field of SamplingConfig that a name means: its own, or that of llama.cpp's flag ("temp", "typical")."""
    return _FIELDS.get(name, name)


def check_sampling(config: SamplingConfig, vocabulary_size: int) -> None:
    """Raise UsageError for a setting that llama.cpp would misread, ignore or crash on."""
    for name, setting in SETTINGS.items():
        value = getattr(config, name)
        if not setting.least <= value <= setting.largest:  # NaN too
            hint = f"use a value from {setting.least:.10g} to {setting.largest:.10g}"
            raise UsageError(f"`{name}` {value} is not possible", hint, setting=name)
    if config.mirostat == 1:
        raise UsageError("`mirostat` 1 is not possible", "use 0 (off) or 2", setting="mirostat")
    if 0 < config.temperature < _SMALLEST_TEMPERATURE:
        raise UsageError(
            f"`temperature` {config.temperature} is too small",
            f"use 0 for greedy, or {_SMALLEST_TEMPERATURE:g} or more",
            setting="temperature",
        )
    _check_biases(config, vocabulary_size)
    if len(config.dry_breakers) > MAX_BREAKERS:
        raise UsageError(
            f"{len(config.dry_breakers)} DRY sequence breakers are too many",
            f"use at most {MAX_BREAKERS}",
            setting="dry_breakers",
        )
    for breaker in config.dry_breakers:
        encode_breaker(breaker)


def _check_biases(config: SamplingConfig, vocabulary_size: int) -> None:
    for token, bias in config.logit_bias:
        if not 0 <= token < vocabulary_size:
            raise UsageError(
                f"`logit_bias` names token {token}",
                f"this model has the tokens 0 to {vocabulary_size - 1}",
                setting="logit_bias",
            )
        if not (bias == -math.inf or abs(bias) <= 1e6):
            raise UsageError(
                f"`logit_bias` {bias} for token {token} is not possible",
                "use -inf, or a number up to 1e6",
                setting="logit_bias",
            )


def encode_breaker(breaker: str) -> bytes:
    """A DRY sequence breaker as llama.cpp takes it. Raises UsageError."""
    try:
        data = breaker.encode("utf-8")
    except UnicodeEncodeError:
        data = b""
    if not data or b"\0" in data or len(data) > MAX_BREAKER_BYTES:
        raise UsageError(
            f"the DRY sequence breaker {breaker!r} is not possible",
            f"use 1 to {MAX_BREAKER_BYTES} bytes of UTF-8 without NUL",
            setting="dry_breakers",
        )
    return data


def check_gate(value: Any) -> GateSetting:
    """A gate's probability, "auto", or None for None and "off". Raises UsageError for anything else."""
    if value is None or value == "off":
        return None
    if value == "auto":
        return "auto"
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise UsageError(
            f"`gate` {value!r:.80} is impossible", "choose a probability from 0 to 1, auto, or off", setting="gate"
        )
    return float(value)


def check_lookup(value: Any) -> LookupLength:
    """The longest draft, or None for None and "off". Raises UsageError for anything else."""
    if value is None or value == "off":
        return None
    if value == "auto" or (type(value) is int and 1 <= value <= MAX_DRAFT):
        return cast(LookupLength, value)
    raise UsageError(
        f"`lookup` {value!r:.80} is impossible", f"choose auto, off, or 1 to {MAX_DRAFT} tokens", setting="lookup"
    )


def parse_lookup(text: str) -> LookupLength:
    """What a text such as "auto" or "8" means for drafts. Raises UsageError."""
    return check_lookup(int(text) if text.strip().isdecimal() else text)


def parse_gate(text: str) -> GateSetting:
    """The gate that a text such as "0.9" or "off" means. Raises UsageError."""
    try:
        return check_gate(float(text))
    except ValueError:
        return check_gate(text)


def generation_config(
    sampling: SamplingConfig | None = None, generation: GenerationConfig | None = None, **settings: Any
) -> GenerationConfig:
    """How to answer: llama.cpp's sampler settings by name (`temperature` or `temp`, `top_k`, ...), `max_tokens`,
    `stop` (a text or several), `ignore_eos`, `gate` (a probability, or "off") and `observer`, on top of whole
    configurations. `json_schema` may be a mapping.

    Raises UsageError for a setting that is not known or has a value of another type.
    """
    base = generation or GenerationConfig()
    if sampling is not None:
        base = replace(base, sampling=sampling)
    limits: dict[str, Any] = {}
    numbers: dict[str, Any] = {}
    for name, value in settings.items():
        field = field_of(name)
        if name in LIMITS or name == "observer":
            limits[name] = (value,) if name == "stop" and isinstance(value, str) else value
        elif field in FIELDS:
            if field == "json_schema" and isinstance(value, (dict, bool)):
                value = json.dumps(value, ensure_ascii=False)
            numbers[field] = _number(name, value, getattr(SamplingConfig, field, None))
        else:
            known = ", ".join([*LIMITS, "observer", *FIELDS])
            raise UsageError(f"there is no setting `{name}`", f"choose one of: {known}", setting=name)
    if "stop" in limits:
        limits["stop"] = tuple(limits["stop"])
    if "gate" in limits:
        limits["gate"] = check_gate(limits["gate"])
    if "lookup" in limits:
        limits["lookup"] = check_lookup(limits["lookup"])
    most = limits.get("max_tokens", -1)
    if type(most) is not int or most < -1:
        raise UsageError(f"`max_tokens` {most!r} is impossible", "choose 0 or more, or -1", setting="max_tokens")
    return replace(base, sampling=replace(base.sampling, **numbers), **limits)


def as_float(number: int | float) -> float:
    """A number as a float, one that is too large for it as infinity."""
    if isinstance(number, float) or abs(number) <= sys.float_info.max:
        return float(number)
    return math.inf if number > 0 else -math.inf


def _number(name: str, value: Any, default: Any) -> Any:
    """`value`, which must be of the type of the setting's default."""
    if isinstance(default, float) and type(value) is int:
        value = as_float(value)
    if isinstance(default, (int, float, str)) and type(value) is not type(default):
        kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}[type(default)]
        raise UsageError(f"`{name}` is {value!r:.80}", f"make it {kind}", setting=name)
    return value
