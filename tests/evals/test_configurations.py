"""How configurations are written, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.config import MERGE_RULES, BucketConfig
from abcli.errors import AbcliError, ProfileError, UsageError
from abcli.evals.configurations import Configuration, parse_configuration
from abcli.profiles.profile import Profile
from abcli.rope.bases import choose_bases
from tests.profiles.samples import SAMPLE, profile

NATIVE = 1e4
SPREAD3 = choose_bases(BucketConfig(count=3), NATIVE)
POOLED = profile("pooled", merge="pool", weights=(1.4, -0.6, 0.2), prefill="auto", prefill_base=None)
WHOLE = Configuration("", (NATIVE,))


def find_profile(name: str | None) -> Profile:
    known = {None: SAMPLE, "mine": POOLED}
    if name not in known:
        raise ProfileError(f"no profile {name}")
    return known[name]


def parse(text: str) -> Configuration:
    return parse_configuration(text, NATIVE, find_profile)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("native", WHOLE),
        ("spread1", WHOLE),
        ("paper1", WHOLE),
        ("spread3", replace(WHOLE, bases=SPREAD3)),
        ("paper6", replace(WHOLE, bases=(10000.0, 17500.0, 18000.0, 19000.0, 20000.0, 25000.0))),
        ("bases=50000, 1e4", replace(WHOLE, bases=(50000.0, 10000.0))),
        ("multipliers=2,0.5", replace(WHOLE, bases=(20000.0, 5000.0))),
        ("bases=20000.0001", replace(WHOLE, bases=(20000.0,))),
        ("native;prefill=exact", replace(WHOLE, prefill="exact")),
        ("native;prefill=shared;prefill-base=5000", replace(WHOLE, prefill="shared", prefill_base=5000.0)),
        ("native;prefill-base=0.1e5", replace(WHOLE, prefill_base=10000.0)),
        (" spread3 ; merge = mean ", replace(WHOLE, bases=SPREAD3, merge="mean")),
        ("spread3;merge=pool", replace(WHOLE, bases=SPREAD3, merge="pool")),
        (
            "bases=5000,10000;weights=1.5,-0.5;merge=pool",
            replace(WHOLE, bases=(5000.0, 10000.0), merge="pool", weights=(1.5, -0.5)),
        ),
        ("profile", replace(WHOLE, bases=SAMPLE.bases, merge="mean", prefill="shared", prefill_base=50000.0)),
        ("profile;prefill=exact", replace(WHOLE, bases=SAMPLE.bases, merge="mean", prefill="exact")),
        ("profile=mine", replace(WHOLE, bases=POOLED.bases, merge="pool", weights=POOLED.weights)),
        ("profile = mine;merge=max", replace(WHOLE, bases=POOLED.bases, merge="max")),
        ("profile=mine;weights=1,0,0", replace(WHOLE, bases=POOLED.bases, merge="pool", weights=(1.0, 0.0, 0.0))),
    ],
)
def test_what_is_written_is_what_is_compared(text: str, expected: Configuration) -> None:
    assert parse(text) == replace(expected, name=text)


@pytest.mark.parametrize("rule", MERGE_RULES)
def test_every_merge_rule_has_a_name(rule: str) -> None:
    assert parse(f"spread3;merge={rule}").merge == rule


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "''"),
        ("luck", "luck"),
        ("Native", "Native"),
        ("native=1", "native=1"),
        ("spread", "spread"),
        ("spread0", "0 buckets"),
        ("spread17", "17 buckets"),
        ("spread1000", "spread1000"),
        ("spread\u0663", "spread\u0663"),
        ("paper-1", "paper-1"),
        ("bases", "bases"),
        ("bases=", "''"),
        ("bases=1e4,", "''"),
        ("bases=1e4;;merge=mean", "''"),
        ("bases=nan", "nan"),
        ("bases=1", "base 1 "),
        ("bases=1_0000", "1_0000"),
        ("bases=" + ",".join(["20000"] * 17), "17 buckets"),
        ("multipliers=", "''"),
        ("multipliers=0", "multiplier 0"),
        ("multipliers=-1", "multiplier -1"),
        ("multipliers=1e-9", "base 1e-05"),
        ("profile=", "profile="),
        ("profile=;merge=mean", "profile="),
        ("native;", "no value"),
        ("native;merge", "no value"),
        ("native;merge=", "no value"),
        ("native;merge=luck", "luck"),
        ("native;merge=mean;merge=mean", "merge is given twice"),
        ("native;prefill=", "no value"),
        ("native;prefill=none", "none"),
        ("native;prefill-base=", "no value"),
        ("native;prefill-base=0", "base 0"),
        ("native;prefill-base=5000,6000", "2 prefill bases"),
        ("native;prefill-base=x", "x"),
        ("native;prefill-base=5000;prefill-base=6000", "prefill-base is given twice"),
        ("native;prefill=exact;prefill-base=5000", "exact prefill has no base"),
        ("native;prefill-base=5000;prefill=exact", "exact prefill has no base"),
        ("native;weights=1", "merge=pool"),
        ("spread3;merge=mean;weights=0.5,0.5,0", "merge=pool"),
        ("profile=mine;merge=max;weights=1,0,0", "merge=pool"),
        ("spread3;merge=pool;weights=", "no value"),
        ("spread3;merge=pool;weights=1", "1 weights"),
        ("spread3;merge=pool;weights=1,1,1", "sum to 3"),
        ("spread3;merge=pool;weights=inf,1,1", "inf"),
        ("native;size=3", "size"),
        ("native;bases=1e4", "bases"),
    ],
)
def test_what_makes_no_sense_is_refused(text: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert named in caught.value.message
    assert caught.value.hint


def test_a_profile_that_is_missing_is_reported_by_whoever_looks_for_it() -> None:
    with pytest.raises(ProfileError, match="unknown"):
        parse("profile=unknown")


@given(st.text("abeimnoprstuvw0123456789.,;=-_ \x00\u2028", max_size=40))
def test_whatever_is_written_is_a_configuration_or_an_error_of_ours(text: str) -> None:
    try:
        found = parse(text)
    except AbcliError:
        return
    assert found.name == text
    assert all(np.float32(base) == base for base in found.bases)


def test_a_long_text_is_cut_in_the_message() -> None:
    for text in ("x" * 10_000, "native;" + "x" * 10_000, "native;x=" + "y" * 10_000, "native;merge=" + "x" * 10_000):
        with pytest.raises(UsageError) as caught:
            parse(text)
        assert len(caught.value.message) < 500
