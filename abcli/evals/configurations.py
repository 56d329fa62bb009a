"""The bucket sets that an evaluation compares, and how they are written."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from abcli.config import (
    MAX_BUCKETS,
    MERGE_RULES,
    PREFILL_MODES,
    BucketConfig,
    HeadNumbers,
    MergeRule,
    PrefillMode,
    Spread,
    Tuning,
)
from abcli.errors import UsageError
from abcli.merge import check_pool_weights
from abcli.profiles.profile import Profile
from abcli.rope.bases import choose_bases, parse_numbers

_SPREAD = re.compile(r"(spread|paper)(\d{1,3})", re.ASCII)
_EXAMPLES = 'write native, spread6, paper6, profile, profile=NAME or "bases=50000,100000;merge=mean"'


@dataclass(frozen=True)
class Configuration:
    """Buckets as a user would ask for them; `prefill_base` None is the native base."""

    name: str
    bases: tuple[float, ...]
    merge: MergeRule = "confidence"
    prefill: PrefillMode = "auto"
    prefill_base: float | None = None
    weights: tuple[float, ...] = ()
    """Of the merge rule `pool`."""
    gains: HeadNumbers = ()
    head_multipliers: HeadNumbers = ()

    @property
    def tuning(self) -> Tuning:
        """What is changed in the model's heads."""
        return Tuning(self.gains, self.head_multipliers)


def parse_configuration(text: str, native_base: float, find_profile: Callable[[str | None], Profile]) -> Configuration:
    """The configuration that `text` describes, for a model trained with `native_base`; its name is `text`.

    `native` is one bucket; `spreadN` and `paperN` are N buckets of that spread; `profile` or `profile=NAME` is a
    calibrated set, for which `find_profile` is asked; else `bases=` or `multipliers=`, or one of the names before,
    followed by any of `merge=`, `weights=`, `prefill=` and `prefill-base=`, each once, separated by semicolons. What
    a profile says of weights and of a prefill base is dropped where another rule or an exact prefill replaces it.
    Raises UsageError, and what `find_profile` raises.
    """
    first, *others = (part.strip() for part in text.split(";"))
    found = _start(first, native_base, find_profile)
    seen: set[str] = set()
    for part in others:
        key, _, value = (piece.strip() for piece in part.partition("="))
        if not value:
            raise UsageError(f"`compare` {text!r:.120}: {part!r:.60} has no value", _EXAMPLES)
        if key in seen:
            raise UsageError(f"`compare` {text!r:.120}: {key} is given twice", "drop one")
        seen.add(key)
        found = _changed(found, text, key, value, native_base)
    if found.merge != "pool":
        if "weights" in seen:
            raise UsageError(f"`compare` {text!r:.120}: weights need merge=pool", "the other rules find theirs")
        found = replace(found, weights=())
    if found.prefill == "exact":
        if "prefill-base" in seen:
            raise UsageError(f"`compare` {text!r:.120}: an exact prefill has no base of its own", "drop prefill-base")
        found = replace(found, prefill_base=None)
    check_pool_weights(found.weights, len(found.bases))
    return replace(found, name=text)


def _start(text: str, native_base: float, find_profile: Callable[[str | None], Profile]) -> Configuration:
    key, equals, value = (piece.strip() for piece in text.partition("="))
    if key == "profile" and (value or not equals):
        profile = find_profile(value if equals else None)
        return Configuration(
            text,
            profile.bases,
            profile.merge,
            profile.prefill,
            profile.prefill_base,
            profile.weights,
            profile.gains,
            profile.head_multipliers,
        )
    if text == "native":
        return Configuration(text, choose_bases(BucketConfig(count=1), native_base))
    if key == "bases" and equals:
        return Configuration(text, choose_bases(BucketConfig(bases=parse_numbers(value, "bases")), native_base))
    if key == "multipliers" and equals:
        multipliers = parse_numbers(value, "multipliers")
        return Configuration(text, choose_bases(BucketConfig(multipliers=multipliers), native_base))
    match = _SPREAD.fullmatch(text)
    if match is None:
        raise UsageError(f"unknown configuration {text!r:.120}", _EXAMPLES)
    count = int(match[2])
    if not 1 <= count <= MAX_BUCKETS:
        raise UsageError(f"{text}: {count} buckets are impossible", f"choose 1 to {MAX_BUCKETS}")
    spread: Spread = "symmetric" if match[1] == "spread" else "paper"
    return Configuration(text, choose_bases(BucketConfig(count=count, spread=spread), native_base))


def _changed(found: Configuration, text: str, key: str, value: str, native_base: float) -> Configuration:
    if key == "merge":
        for rule in MERGE_RULES:
            if rule == value:
                return replace(found, merge=rule)
        raise UsageError(f"`compare` {text!r:.120}: unknown merge rule {value!r:.60}", f"use {', '.join(MERGE_RULES)}")
    if key == "weights":
        return replace(found, weights=parse_numbers(value, "weights"))
    if key == "prefill":
        for mode in PREFILL_MODES:
            if mode == value:
                return replace(found, prefill=mode)
        raise UsageError(f"`compare` {text!r:.120}: unknown prefill {value!r:.60}", f"use {', '.join(PREFILL_MODES)}")
    if key == "prefill-base":
        bases = choose_bases(BucketConfig(bases=parse_numbers(value, "prefill-base")), native_base)
        if len(bases) > 1:
            raise UsageError(f"`compare` {text!r:.120}: {len(bases)} prefill bases are given", "give one")
        return replace(found, prefill_base=bases[0])
    raise UsageError(
        f"`compare` {text!r:.120}: unknown setting {key!r:.60}", "use merge, weights, prefill and prefill-base"
    )
