"""What a calibration comes to, the profile it makes and the words for it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from abcli.calibrate.calibration import CALIBRATED, CalibrationSettings, calibrate
from abcli.calibrate.judgement import Judgement, Verdict, about, decide, judge, make_profile
from abcli.evals.configurations import Configuration
from abcli.evals.scores import Score
from abcli.evals.statistics import Estimate
from abcli.profiles.profile import decode, encode
from abcli.ui.calibration import choice_text, tried_lines, verdict_text
from tests.calibrate.planted import NATIVE_BASE, PlantedSubject

BETTER, WORSE = Estimate(-0.1, -0.2, -0.01, 0.05), Estimate(0.1, 0.01, 0.2, 0.05)
UNCLEAR, NOTHING = Estimate(-0.1, -0.3, 0.1, 0.1), Estimate(0.0, 0.0, 0.0, 0.0)
SETTINGS = CalibrationSettings("kv", 400, limit=40, held_out=100, depths=3, buckets=2, rules=("mean",))


def ends_are_good(multiple: float, _prefill: float, depth: float) -> float:
    return 6.0 if (multiple == 0.25 and depth < 0.6) or (multiple == 4 and depth >= 0.4) else 0.0


@pytest.fixture(scope="module")
def subject() -> PlantedSubject:
    return PlantedSubject(ends_are_good)


@pytest.fixture(scope="module")
def calibration(subject):
    return calibrate(SETTINGS, subject)


@pytest.mark.parametrize(
    ("to_native", "to_spread", "spread_to_native", "verdict"),
    [
        (BETTER, BETTER, BETTER, Verdict.CALIBRATED),
        (BETTER, BETTER, UNCLEAR, Verdict.CALIBRATED),
        (BETTER, BETTER, WORSE, Verdict.CALIBRATED),
        (BETTER, UNCLEAR, BETTER, Verdict.UNDECIDED),
        (BETTER, UNCLEAR, UNCLEAR, Verdict.UNDECIDED),
        (BETTER, WORSE, BETTER, Verdict.UNDECIDED),
        (BETTER, NOTHING, BETTER, Verdict.UNDECIDED),
        (UNCLEAR, BETTER, WORSE, Verdict.ONE_BUCKET),
        (UNCLEAR, UNCLEAR, BETTER, Verdict.SPREAD),
        (UNCLEAR, UNCLEAR, UNCLEAR, Verdict.ONE_BUCKET),
        (NOTHING, WORSE, BETTER, Verdict.SPREAD),
        (NOTHING, NOTHING, NOTHING, Verdict.ONE_BUCKET),
        (WORSE, BETTER, WORSE, Verdict.ONE_BUCKET),
        (WORSE, WORSE, BETTER, Verdict.SPREAD),
    ],
)
def test_the_verdict(to_native, to_spread, spread_to_native, verdict):
    assert decide(to_native, to_spread, spread_to_native, reliable=True) is verdict
    assert decide(to_native, to_spread, spread_to_native, reliable=False) is Verdict.TOO_FEW


def test_a_clear_gain_is_seen(calibration):
    found = judge(calibration)
    assert found.verdict is Verdict.CALIBRATED
    nll = {name: np.array([score.nll for score in of]) for name, of in calibration.held_out.scores.items()}
    assert found.to_native.value == pytest.approx((nll[CALIBRATED] - nll["native"]).mean(), abs=1e-5)
    assert found.to_spread.value == pytest.approx((nll[CALIBRATED] - nll["spread2"]).mean(), abs=1e-5)
    assert found.spread_to_native.value == pytest.approx((nll["spread2"] - nll["native"]).mean(), abs=1e-5)
    assert found.to_native.high < 0
    assert found.summary.baseline == "native"


def with_offsets(calibration, **offsets: float):
    """The same with scores that lie exactly so far above the native base's."""
    scores = {
        name: tuple(Score(score.nll + offsets.get(name, 0.0), False) for score in calibration.held_out.scores["native"])
        for name in calibration.held_out.scores
    }
    return replace(calibration, held_out=replace(calibration.held_out, scores=scores))


@pytest.mark.parametrize(
    ("offsets", "verdict"),
    [
        ({"calibrated": -0.2, "spread2": -0.1}, Verdict.CALIBRATED),
        ({"calibrated": -0.2, "spread2": -0.2}, Verdict.UNDECIDED),
        ({"calibrated": -0.1, "spread2": -0.2}, Verdict.UNDECIDED),
        ({"spread2": -0.2}, Verdict.SPREAD),
        ({"calibrated": 0.1, "spread2": 0.2}, Verdict.ONE_BUCKET),
        ({}, Verdict.ONE_BUCKET),
        ({"paper2": -0.5}, Verdict.ONE_BUCKET),
    ],
)
def test_the_verdict_on_scores(calibration, offsets, verdict):
    found = judge(with_offsets(calibration, **offsets))
    assert found.verdict is verdict
    sentence = verdict_text(found, "spread2")
    assert "spread2" in sentence
    assert "one bucket" in sentence


def test_few_contexts_tell_nothing():
    found = judge(calibrate(replace(SETTINGS, held_out=20), PlantedSubject(ends_are_good)))
    assert found.verdict is Verdict.TOO_FEW
    assert verdict_text(found, "spread2").startswith(f"{found.summary.groups} contexts held out: too few")


def test_the_sentences_carry_their_own_numbers(calibration):
    first = Judgement(judge(calibration).summary, Verdict.CALIBRATED, BETTER, UNCLEAR, WORSE)
    numbers = {
        Verdict.CALIBRATED: ("-0.200..-0.010", "-0.300..+0.100"),
        Verdict.UNDECIDED: ("-0.200..-0.010", "-0.300..+0.100"),
        Verdict.SPREAD: ("+0.010..+0.200", "-0.200..-0.010"),
        Verdict.ONE_BUCKET: ("-0.200..-0.010", "+0.010..+0.200"),
    }
    sentences = {verdict: verdict_text(replace(first, verdict=verdict), "spread2") for verdict in numbers}
    assert len(set(sentences.values())) == len(numbers)
    for verdict, (before, after) in numbers.items():
        assert sentences[verdict].index(before) < sentences[verdict].index(after)


def test_the_profile_has_the_choice_and_its_evidence(calibration, subject):
    found = judge(calibration)
    profile = make_profile("kv-400", calibration, found, subject)
    assert decode(encode(profile), "the profile") == profile
    assert (profile.bases, profile.merge, profile.weights) == (calibration.chosen.bases, "mean", ())
    assert (profile.task, profile.length, profile.native_base) == ("kv", 400, NATIVE_BASE)
    assert (profile.fingerprint, profile.model) == (subject.checked.fingerprint, "planted.gguf")
    # What was asked with a prompt of abcli's own is called "tools".
    called = replace(calibration, settings=replace(calibration.settings, task="tools"))
    assert make_profile("tools-400", called, found, subject).task == "tools in the model's own format"
    evidence = profile.evidence
    assert evidence.questions == len(calibration.held_out.questions)
    assert [score.configuration for score in evidence.scores] == ["native", "spread2", "paper2", CALIBRATED]
    assert evidence.scores[0].difference is None
    own = evidence.own
    assert own.mean_nll == pytest.approx(
        np.mean([item.nll for item in calibration.held_out.scores[CALIBRATED]]), abs=1e-5
    )
    assert own.accuracy == pytest.approx(np.mean([item.exact for item in calibration.held_out.scores[CALIBRATED]]))
    assert own.worst_depth_nll >= own.mean_nll
    assert own.difference is not None
    assert (own.difference.mean, own.difference.low, own.difference.high) == (
        *(found.to_native.value, found.to_native.low, found.to_native.high),
    )


def test_the_report_says_what_was_tried(calibration):
    values = json.loads(json.dumps(about(calibration, judge(calibration)), allow_nan=False))
    assert (values["verdict"], values["questions"]) == ("calibrated", calibration.questions)
    assert tuple(values["chosen"]["bases"]) == calibration.chosen.bases
    assert [item["cross_validated_nll"] for item in values["tried"]] == [item.mean for item in calibration.tried]
    assert [item["base"] for item in values["prefill_bases"]] == [item.base for item in calibration.prefills]


def test_the_lines_say_what_was_tried_and_chosen(calibration):
    lines = tried_lines(calibration)
    assert lines[0].startswith(f"tried on {calibration.questions} questions, {calibration.contexts} contexts")
    assert f"{calibration.tried[0].mean:.3f}" in lines[1]
    assert sum("prefill under base" in line for line in lines) == 2
    assert lines[-1] == "chosen: --bases 2500,40000 --merge mean"


def test_a_choice_in_the_flags_words():
    chosen = Configuration(CALIBRATED, (5000.0, 10_000.0), "pool", weights=(-0.25, 1.25), prefill_base=7071.0)
    text = "--bases 5000,10000 --merge pool --weights -0.2500,1.2500 --prefill-base 7071"
    assert choice_text(chosen) == text
    assert choice_text(Configuration(CALIBRATED, (5000.0,), prefill="exact")) == "--bases 5000"
