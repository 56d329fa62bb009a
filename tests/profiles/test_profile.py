"""A profile survives its file, and nothing else is taken for one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.config import MAX_BUCKETS, MERGE_RULES, PREFILL_MODES, HeadNumbers
from abcli.errors import ProfileError, UsageError
from abcli.profiles.profile import (
    MAX_BYTES,
    MAX_GAIN,
    MAX_HEAD_MULTIPLIER,
    Difference,
    Evidence,
    Profile,
    Score,
    check_name,
    decode,
    encode,
    moment,
    utc_now,
)
from tests.profiles.samples import EVERYDAY, SAMPLE, profile

NUMBERS = st.floats(-1e6, 1e6)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
BASES = st.floats(2, 2**40, width=32)


def head_numbers(least: float, most: float) -> st.SearchStrategy[HeadNumbers]:
    layers = st.lists(st.lists(st.floats(least, most), min_size=1, max_size=4).map(tuple), max_size=3)
    return layers.map(tuple)


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    """Any profile that may be stored."""
    names = draw(st.lists(TEXTS, min_size=1, max_size=4, unique=True))
    scores = []
    for name in names:
        low, mean, high = sorted(draw(st.tuples(NUMBERS, NUMBERS, NUMBERS)))
        difference = draw(st.sampled_from([None, Difference(mean, low, high)]))
        scores.append(Score(name, draw(NUMBERS), draw(st.floats(0, 1)), draw(NUMBERS), difference))
    bases = tuple(draw(st.lists(BASES, min_size=1, max_size=MAX_BUCKETS)))
    merge = draw(st.sampled_from(MERGE_RULES))
    weights: tuple[float, ...] = ()
    if merge == "pool" and draw(st.booleans()):
        others = draw(st.lists(st.floats(-3, 3), min_size=len(bases) - 1, max_size=len(bases) - 1))
        weights = (*others, 1 - sum(others))
    return Profile(
        name=draw(st.from_regex(r"[a-z0-9_][a-z0-9_.-]{0,63}", fullmatch=True).filter(lambda name: name != "none")),
        fingerprint=draw(st.text("0123456789abcdef", min_size=64, max_size=64)),
        model=draw(TEXTS),
        architecture=draw(TEXTS),
        native_base=draw(BASES),
        bases=bases,
        merge=merge,
        weights=weights,
        prefill=draw(st.sampled_from(PREFILL_MODES)),
        prefill_base=draw(st.none() | BASES),
        task=draw(TEXTS),
        length=draw(st.integers(1, 2**31 - 1)),
        created=utc_now(),
        abcli_version=draw(TEXTS),
        evidence=Evidence(draw(st.integers(1, 2**31 - 1)), draw(st.sampled_from(names)), tuple(scores)),
        chosen=draw(st.sampled_from(["", utc_now()])),
        gains=draw(head_numbers(0, MAX_GAIN)),
        head_multipliers=draw(head_numbers(1 / MAX_HEAD_MULTIPLIER, MAX_HEAD_MULTIPLIER)),
        everyday=draw(st.none() | st.just(EVERYDAY)),
        gate=draw(st.none() | st.floats(0, 1, exclude_min=True)),
    )


@given(profiles())
def test_a_profile_survives_its_file(stored: Profile) -> None:
    assert decode(encode(stored), "it") == stored
    # Editors may put a byte order mark before what they save.
    assert decode(b"\xef\xbb\xbf" + encode(stored), "it") == stored


def test_the_file_is_as_documented() -> None:
    values = json.loads(encode(SAMPLE))
    assert values["format"] == 1
    assert values["bases"] == [50000.0, 100000.0, 150000.0]
    assert values["evidence"]["scores"][0] == {
        "configuration": "native",
        "mean_nll": 0.5,
        "accuracy": 0.34,
        "worst_depth_nll": 0.9,
        "difference": None,
    }
    assert SAMPLE.evidence.own == SAMPLE.evidence.scores[2]
    # Profiles of untuned models can be read by versions that know of none.
    assert not {"gains", "head_multipliers", "gate", "everyday"} & values.keys()
    assert json.loads(encode(profile(gate=0.8)))["gate"] == 0.8
    tuned = json.loads(encode(profile(gains=((0.5, 2.0),), head_multipliers=((1.5,),))))
    assert (tuned["gains"], tuned["head_multipliers"]) == ([[0.5, 2.0]], [[1.5]])


def test_bases_are_read_as_llama_cpp_will_use_them() -> None:
    (base,) = decode(encode(profile(bases=(54321.123456789,))), "it").bases
    assert base == float(np.float32(54321.123456789))


Change = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("format"), "not a profile"),
        (lambda v: v.update(format=2), "format 2, and this abcli reads 1"),
        (lambda v: v.update(format=True), "format True"),
        (lambda v: v.update(format="1"), "format '1'"),
        (lambda v: v.pop("merge"), "merge is missing"),
        (lambda v: v.update(colour="red"), "'colour' is unknown"),
        (lambda v: v.update(gains=[[1.0, -0.5]]), "gains is -0.5"),
        (lambda v: v.update(everyday=[]), "everyday has the wrong type"),
        (lambda v: v.update(everyday={**asdict(EVERYDAY), "equal": 51}), "equal is 51"),
        (lambda v: v.update(everyday={**asdict(EVERYDAY), "equal": -1}), "equal is -1"),
        (lambda v: v.update(everyday={**asdict(EVERYDAY), "equal": False}), "equal has the wrong type"),
        (lambda v: v.update(everyday={**asdict(EVERYDAY), "prompts": 0}), "prompts is 0"),
        (lambda v: v.update(everyday={**asdict(EVERYDAY), "tuned_loss": "3"}), "tuned_loss has the wrong"),
        (lambda v: v.update(everyday={"prompts": 3}), "everyday: equal is missing"),
        (lambda v: v.update(gains=[[1.0, 101.0]]), "gains is 101.0"),
        (lambda v: v.update(head_multipliers=[[0.0]]), "head_multipliers is 0.0"),
        (lambda v: v.update(head_multipliers=[[1001.0]]), "head_multipliers is 1001.0"),
        (lambda v: v.update(head_multipliers=1.0), "head_multipliers has the wrong type"),
        (lambda v: v.update(gate=0), "gate is 0"),
        (lambda v: v.update(gate=1.5), "gate is 1.5"),
        (lambda v: v.update(gate="auto"), "gate has the wrong type"),
        (lambda v: v.update(gains=[1.0]), "gains has the wrong type"),
        (lambda v: v.update(gains=[["1"]]), "gains has the wrong type"),
        (lambda v: v.update(name="../x"), "name"),
        (lambda v: v.update(name="none"), "name"),
        (lambda v: v.update(name=7), "name has the wrong type"),
        (lambda v: v.update(fingerprint="12"), "fingerprint is '12'"),
        (lambda v: v.update(fingerprint="A" * 64), "fingerprint is"),
        (lambda v: v.update(model=""), "model has 0 characters"),
        (lambda v: v.update(model="x" * 501), "model has 501 characters"),
        (lambda v: v.update(model="\ud800"), "model is not valid Unicode"),
        (lambda v: v.update(merge="sum"), "merge is 'sum'"),
        (lambda v: v.update(merge=["mean"]), "merge has the wrong type"),
        (lambda v: v.update(weights=[1.0]), "1 weights are given for 0 buckets"),
        (lambda v: v.update(merge="pool", weights=[0.5, 0.5]), "2 weights are given for 3 buckets"),
        (lambda v: v.update(merge="pool", weights=[0.5, 0.5, 0.5]), "sum to 1.5"),
        (lambda v: v.update(merge="pool", weights=[0.5, 0.5, "0"]), "weights has the wrong type"),
        (lambda v: v.update(prefill="none"), "prefill is 'none'"),
        (lambda v: v.update(prefill_base=0.5), "prefill_base: the RoPE base 0.5"),
        (lambda v: v.update(prefill_base="1e4"), "prefill_base has the wrong type"),
        (lambda v: v.update(native_base=0), "RoPE base of 0"),
        (lambda v: v.update(native_base=True), "native_base has the wrong type"),
        (lambda v: v.update(bases=[]), "bases is empty"),
        (lambda v: v.update(bases=5.0), "bases has the wrong type"),
        (lambda v: v.update(bases=[1e4, "2e4"]), "bases has the wrong type"),
        (lambda v: v.update(bases=[1e4, 1.0]), "RoPE base 1 is not possible"),
        (lambda v: v.update(bases=[1e39]), "bases"),
        (lambda v: v.update(bases=[10**400]), "bases is not a finite number"),
        (lambda v: v.update(bases=[-1e4]), "bases"),
        (lambda v: v.update(bases=[1e4] * (MAX_BUCKETS + 1)), "17 buckets are not possible"),
        (lambda v: v.update(length=0), "length is 0"),
        (lambda v: v.update(length=1.5), "length has the wrong type"),
        (lambda v: v.update(created="yesterday"), "created is 'yesterday'"),
        (lambda v: v.update(created=""), "created has 0 characters"),
        (lambda v: v.update(created="2025-01-02T03:04:05"), "not a time in UTC"),
        (lambda v: v.update(created="2025-01-02T03:04:05+02:00"), "not a time in UTC"),
        (lambda v: v.update(chosen="soon"), "chosen is 'soon'"),
        (lambda v: v.update(chosen=None), "chosen has the wrong type"),
        (lambda v: v.update(evidence=[]), "evidence has the wrong type"),
        (lambda v: v["evidence"].pop("questions"), "evidence: questions is missing"),
        (lambda v: v["evidence"].update(questions=0), "questions is 0"),
        (lambda v: v["evidence"].update(configuration="paper6"), "its own configuration 'paper6'"),
        (lambda v: v["evidence"].update(scores={}), "scores has the wrong type"),
        (lambda v: v["evidence"].update(scores=[3]), "scores has the wrong type"),
        (lambda v: v["evidence"]["scores"].append(v["evidence"]["scores"][0]), "two scores"),
        (lambda v: v["evidence"].update(scores=v["evidence"]["scores"] * 40), "120 scores"),
        (lambda v: v["evidence"]["scores"][0].update(accuracy=1.5), "accuracy is 1.5"),
        (lambda v: v["evidence"]["scores"][0].pop("difference"), "scores: difference is missing"),
        (lambda v: v["evidence"]["scores"][2].update(difference=-1.0), "difference has the wrong type"),
        (lambda v: v["evidence"]["scores"][2]["difference"].update(low=1.0), "low is 1.0"),
    ],
)
def test_what_is_wrong_is_named(change: Change, message: str) -> None:
    values = json.loads(encode(SAMPLE))
    change(values)
    with pytest.raises(ProfileError) as caught:
        decode(json.dumps(values).encode(), "/some/file.json")
    assert caught.value.message.startswith("/some/file.json ")
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("old", ["100000.0", "0.34", "-0.125"])
def test_no_number_may_be_infinite(number: str, old: str) -> None:
    text = encode(SAMPLE).decode()
    assert old in text
    with pytest.raises(ProfileError, match="number"):
        decode(text.replace(old, number).encode(), "it")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged"),
        (b"{", "damaged"),
        (b"[" * 100_000, "damaged"),
        (b"[]", "not a profile"),
        (b"null", "not a profile"),
        (b"\xff{}", "not UTF-8"),
        (b'{"format": ' + b"9" * 5000 + b"}", "it "),
        (b" " * (MAX_BYTES + 1), "larger than 1,048,576 bytes"),
    ],
)
def test_other_files_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        decode(data, "it")


@given(st.data())
def test_damage_never_ends_in_anything_but_our_error(data: st.DataObject) -> None:
    content = bytearray(encode(SAMPLE))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position : position + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    found = None
    with contextlib.suppress(ProfileError):
        found = decode(bytes(content), "it")
    assert found is None or decode(encode(found), "it") == found


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "Needle"},
        {"bases": ()},
        {"native_base": float("nan")},
        {"model": "\ud800"},
        {"task": 7},
        {"evidence": replace(SAMPLE.evidence, configuration="other")},
        {"length": np.int64(3)},
    ],
)
def test_nothing_is_written_that_could_not_be_read(changes: dict[str, Any]) -> None:
    with pytest.raises(ProfileError):
        encode(replace(SAMPLE, **changes))


@pytest.mark.parametrize("name", ["a", "needle-1024", "_x", "0", "a.b", "x" * 64])
def test_names(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize("name", ["", "none", ".x", "-x", "A", "a/b", "a\\b", "a b", "a\n", "ä", "x" * 65, "a\0"])
def test_impossible_names(name: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_name(name)
    assert "'none'" in caught.value.hint


def test_never_is_before_any_time() -> None:
    assert moment("") < moment("1970-01-01T00:00:00+00:00") < moment(utc_now())
