"""A calibrated profile and its JSON form, strict about what it accepts."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from itertools import chain
from typing import Any

from abcli.config import MERGE_RULES, PREFILL_MODES, BucketConfig, HeadNumbers, MergeRule, PrefillMode, Tuning
from abcli.errors import AbcliError, ProfileError, UsageError
from abcli.merge import check_pool_weights
from abcli.rope.bases import choose_bases
from abcli.strict_json import (
    FormatError,
    check_version,
    items,
    mapping,
    mappings,
    number,
    numbers,
    one_of,
    parsed,
    refused,
    text,
    whole,
)

FORMAT_VERSION = 1
MAX_BYTES = 1 << 20
MAX_NAME = 64
MAX_GAIN = 100.0
MAX_HEAD_MULTIPLIER = 1000.0
# What stands for "no profile" on the command line.
NO_PROFILE = "none"

_MAX_TEXT = 500
_MAX_SCORES = 100
_MAX_COUNT = 2**31 - 1
_HINT = "calibrate the model again, or fetch the profile again"
# What a profile need not have, as values of JSON.
_OPTIONAL: Mapping[str, Any] = {"gains": [], "head_multipliers": [], "gate": None, "everyday": None}
# Lower case only: some file systems take "A" and "a" for one name.
_NAME = re.compile(rf"[a-z0-9_][a-z0-9_.-]{{0,{MAX_NAME - 1}}}")
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Difference:
    """The mean difference, question by question, of a configuration's NLL to the native base's; below 0 is better.

    In nats per token; `low` and `high` are the ends of its 95 % interval.
    """

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """What one configuration ("native", "spread6", ...) reached on the held-out questions.

    NLL is the negative log-likelihood of the right answers in nats per token: `mean_nll` is its mean over the
    questions, `worst_depth_nll` that over the questions of the depth where it is highest. `accuracy` is the share of
    right answers, 0 to 1. `difference` is None for the native base itself.
    """

    configuration: str
    mean_nll: float
    accuracy: float
    worst_depth_nll: float
    difference: Difference | None = None


@dataclass(frozen=True)
class Everyday:
    """What a tuned profile leaves as it was, on texts and prompts that were not used to find it.

    The losses are those of `text_tokens` tokens of plain text, in nats per token; of the greedy answers to `prompts`
    everyday prompts `equal` are the same with the profile, and so many repeat themselves without it and with it.
    """

    text_tokens: int
    native_loss: float
    tuned_loss: float
    prompts: int
    equal: int
    native_repeating: int
    tuned_repeating: int


@dataclass(frozen=True)
class Evidence:
    """Why a profile should help: scores on `questions` questions that were not used to find it."""

    questions: int
    configuration: str
    """The one among the scores that is the profile itself."""
    scores: tuple[Score, ...]

    @property
    def own(self) -> Score:
        """The score of the profile itself. Raises StopIteration if there is none, which no stored profile allows."""
        return next(score for score in self.scores if score.configuration == self.configuration)


@dataclass(frozen=True)
class Profile:
    """A bucket set calibrated for one model.

    `fingerprint` is the hex of abcli.gguf.fingerprint, `model` the file's name for people, `length` the tokens of
    the contexts it was calibrated on, `created` a time in UTC (ISO 8601). `prefill_base` None is the native base.
    `weights` are those of the merge rule `pool`, empty for equal ones and for other rules. `gains` are factors on the
    outputs of the model's attention heads, `head_multipliers` on the base of its heads of keys; they are empty where
    all are 1. `gate` is the lowest that costs nothing that can be measured on its task, 1 if none does; None if that
    was not found out. `everyday` is there where heads are tuned.
    `chosen` is the time at which the user made it the model's default, empty if never.
    """

    name: str
    fingerprint: str
    model: str
    architecture: str
    native_base: float
    bases: tuple[float, ...]
    merge: MergeRule
    weights: tuple[float, ...]
    prefill: PrefillMode
    prefill_base: float | None
    task: str
    length: int
    created: str
    abcli_version: str
    evidence: Evidence
    chosen: str = ""
    gains: HeadNumbers = ()
    gate: float | None = None
    everyday: Everyday | None = None
    head_multipliers: HeadNumbers = ()

    @property
    def tuning(self) -> Tuning:
        """What it changes in the model's heads."""
        return Tuning(self.gains, self.head_multipliers)


def utc_now() -> str:
    """The time in UTC, ISO 8601, to the microsecond: profiles made in one second must have an order."""
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def check_name(name: str) -> str:
    """`name` if a profile may be called so. Raises UsageError."""
    if not _NAME.fullmatch(name) or name == NO_PROFILE:
        raise UsageError(
            f"{name!r:.120} cannot be the name of a profile",
            f"use up to {MAX_NAME} small letters, digits, '-', '_' and '.', beginning with a letter or digit, "
            f"but not {NO_PROFILE!r}",
        )
    return name


def encode(profile: Profile) -> bytes:
    """`profile` as JSON in UTF-8. Raises ProfileError for values that `decode` would refuse."""
    values = {"format": FORMAT_VERSION, **dataclasses.asdict(profile)}
    for key in _OPTIONAL:
        if not values[key]:
            del values[key]
    origin = f"the profile {profile.name!r:.120}"
    try:
        data = (json.dumps(values, ensure_ascii=False, indent=1) + "\n").encode("utf-8")
    except (UnicodeEncodeError, TypeError) as error:
        raise ProfileError(f"{origin} cannot be written: {error}", "correct its values") from None
    decode(data, origin)
    return data


def decode(data: bytes, origin: str) -> Profile:
    """The profile in the JSON text `data`, its bases rounded to float32.

    Raises ProfileError, which begins with `origin`, for anything that is not a sound profile of this format.
    """
    if len(data) > MAX_BYTES:
        raise ProfileError(f"{origin} is larger than {MAX_BYTES:,} bytes", "name a file that abcli has written")
    with _of(origin):
        return _profile(parsed(data))


def from_values(values: object, origin: str) -> Profile:
    """The profile in parsed JSON. Raises ProfileError as `decode` does."""
    with _of(origin):
        return _profile(values)


@contextmanager
def _of(origin: str) -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise ProfileError(f"{origin} {error}", _HINT) from None


def moment(text: str) -> datetime:
    """The time in a profile's `created` or `chosen`; the empty text is earlier than any. Raises ValueError."""
    return datetime.fromisoformat(text) if text else datetime.min.replace(tzinfo=timezone.utc)


def _profile(values: object) -> Profile:
    if not isinstance(values, dict) or "format" not in values:
        raise FormatError("is not a profile of abcli")
    check_version(values["format"], FORMAT_VERSION, "profile")
    values = {**_OPTIONAL, **values}
    _check_keys(values, Profile, "", extra={"format"})
    fingerprint, merge = text(values, "fingerprint"), one_of(values, "merge", MERGE_RULES)
    if not _FINGERPRINT.fullmatch(fingerprint):
        raise refused("fingerprint", fingerprint)
    native_base = number(values, "native_base")
    prefill_base = None
    if values["prefill_base"] is not None:
        (prefill_base,) = _bases((number(values, "prefill_base"),), native_base, "prefill_base")
    bases = _bases(numbers(values, "bases"), native_base, "bases")
    return Profile(
        name=_name(values),
        fingerprint=fingerprint,
        model=_text(values, "model"),
        architecture=_text(values, "architecture"),
        native_base=native_base,
        bases=bases,
        merge=merge,
        weights=_weights(values, len(bases) if merge == "pool" else 0),
        prefill=one_of(values, "prefill", PREFILL_MODES),
        prefill_base=prefill_base,
        task=_text(values, "task"),
        length=whole(values, "length", 1, _MAX_COUNT),
        created=_time(values, "created"),
        abcli_version=_text(values, "abcli_version"),
        evidence=_evidence(_object(values, "evidence", Evidence)),
        chosen=_time(values, "chosen") if values["chosen"] != "" else "",
        gains=_head_numbers(values, "gains", 0.0, MAX_GAIN),
        gate=_gate(values),
        everyday=None if values["everyday"] is None else _everyday(_object(values, "everyday", Everyday)),
        head_multipliers=_head_numbers(values, "head_multipliers", 1 / MAX_HEAD_MULTIPLIER, MAX_HEAD_MULTIPLIER),
    )


def _evidence(values: Mapping[str, Any]) -> Evidence:
    found = mappings(values, "scores")
    if len(found) > _MAX_SCORES:
        raise FormatError(f"is damaged: {len(found):,} scores are more than {_MAX_SCORES}")
    scores = tuple(map(_score, found))
    names = [score.configuration for score in scores]
    own = _text(values, "configuration")
    if len(set(names)) != len(names):
        raise FormatError("is damaged: a configuration has two scores")
    if own not in names:
        raise FormatError(f"is damaged: there is no score for its own configuration {own!r:.40}")
    return Evidence(whole(values, "questions", 1, _MAX_COUNT), own, scores)


def _everyday(values: Mapping[str, Any]) -> Everyday:
    prompts = whole(values, "prompts", 1, _MAX_COUNT)
    return Everyday(
        whole(values, "text_tokens", 1, _MAX_COUNT),
        number(values, "native_loss"),
        number(values, "tuned_loss"),
        prompts,
        *(whole(values, key, 0, prompts) for key in ("equal", "native_repeating", "tuned_repeating")),
    )


def _score(values: Mapping[str, Any]) -> Score:
    _check_keys(values, Score, "scores: ")
    difference = None
    if values["difference"] is not None:
        ends = _object(values, "difference", Difference)
        difference = Difference(*(number(ends, key) for key in ("mean", "low", "high")))
        if difference.low > difference.high:
            raise refused("low", difference.low)
    accuracy = number(values, "accuracy")
    if not 0 <= accuracy <= 1:
        raise refused("accuracy", accuracy)
    return Score(
        _text(values, "configuration"),
        number(values, "mean_nll"),
        accuracy,
        number(values, "worst_depth_nll"),
        difference,
    )


def _bases(bases: tuple[float, ...], native_base: float, key: str) -> tuple[float, ...]:
    if not bases:
        raise FormatError(f"is damaged: {key} is empty")
    try:
        return choose_bases(BucketConfig(bases=bases), native_base)
    except AbcliError as error:
        raise FormatError(f"is damaged: {key}: {error.message}") from None


def _weights(values: Mapping[str, Any], buckets: int) -> tuple[float, ...]:
    """The weights of `buckets` buckets; 0 buckets may have none."""
    weights = numbers(values, "weights")
    try:
        check_pool_weights(weights, buckets)
    except UsageError as error:
        raise FormatError(f"is damaged: {error.message}") from None
    return weights


def _head_numbers(values: Mapping[str, Any], key: str, least: float, most: float) -> HeadNumbers:
    found = tuple(numbers({key: layer}, key) for layer in items(values, key))
    for one in chain(*found):
        if not least <= one <= most:
            raise refused(key, one)
    return found


def _gate(values: Mapping[str, Any]) -> float | None:
    if values["gate"] is None:
        return None
    gate = number(values, "gate")
    if not 0 < gate <= 1:
        raise refused("gate", gate)
    return gate


def _name(values: Mapping[str, Any]) -> str:
    try:
        return check_name(text(values, "name"))
    except UsageError as error:
        raise FormatError(f"is damaged: {error.message}") from None


def _object(values: Mapping[str, Any], key: str, shape: type) -> dict[str, Any]:
    """An object with exactly the fields of the dataclass `shape`."""
    found = mapping(values, key)
    _check_keys(found, shape, f"{key}: ")
    return found


def _check_keys(values: Mapping[str, Any], shape: Any, where: str, extra: set[str] | None = None) -> None:
    expected = {field.name for field in dataclasses.fields(shape)} | (extra or set())
    for key in sorted(expected - values.keys()):
        raise FormatError(f"is damaged: {where}{key} is missing")
    for key in sorted(values.keys() - expected):
        raise FormatError(f"is damaged: {where}{key!r:.40} is unknown")


def _text(values: Mapping[str, Any], key: str) -> str:
    found = text(values, key)
    if not 0 < len(found) <= _MAX_TEXT:
        raise FormatError(f"is damaged: {key} has {len(found):,} characters")
    return found


def _time(values: Mapping[str, Any], key: str) -> str:
    found = _text(values, key)
    try:
        offset = moment(found).utcoffset()
    except ValueError:
        raise refused(key, found) from None
    if offset != timedelta(0):
        raise FormatError(f"is damaged: {key} is {found!r:.40}, which is not a time in UTC")
    return found
