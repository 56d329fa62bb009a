"""The benchmark on contenders that take a known time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from abcli.bench.measure import Findings, benchmark
from abcli.bench.plan import ONE_BUCKET, BenchSettings, Contender
from abcli.bench.report import BenchReport, Row, as_json
from abcli.errors import NativeError, OutOfMemoryError, UnsupportedModelError
from tests.bench.standins import SETTINGS, FakeWorkshop, report_of, seconds_per_token


def run(workshop: FakeWorkshop, settings: BenchSettings = SETTINGS) -> BenchReport:
    """The report of a benchmark that may end early."""
    findings = Findings()
    try:
        benchmark(settings, workshop, findings, lambda *_: None, workshop.time)
    except (KeyboardInterrupt, NativeError):
        assert not findings.complete
    assert workshop.open_now == []
    return report_of(findings, settings)


def row(report: BenchReport, buckets: int, kind: Any) -> Row:
    """The row of a contender."""
    return next(row for row in report.rows if row.contender == Contender(buckets, kind))


def test_every_contender_has_its_speed_ratio_and_overhead() -> None:
    workshop = FakeWorkshop()
    report = run(workshop)
    assert report.complete
    assert [row.contender for row in report.rows] == list(SETTINGS.contenders)
    assert len(report.rows) == 9
    for found in report.rows:
        contender = found.contender
        assert found.decode is not None
        assert len(found.decode.seconds) == 4
        assert found.decode.speed.median == pytest.approx(1 / seconds_per_token(contender))
        if contender == ONE_BUCKET:
            assert found.decode.ratio is None
        else:
            assert found.decode.ratio is not None
            assert found.decode.ratio.median == pytest.approx(seconds_per_token(contender) / 1.5)
        if contender.kind == "raw":
            assert (found.decode.overhead, found.memory, found.bases) == (None, None, ())
        else:
            assert found.decode.overhead is not None
            assert found.decode.overhead.median == pytest.approx({"contexts": 1.5, "fused": 1.25}[contender.kind])
            assert found.memory is not None
            assert found.memory.resident == 1000 * contender.buckets
            assert len(found.bases) == contender.buckets


def test_prompts_are_shared_and_exact_in_fewer_rounds() -> None:
    report = run(FakeWorkshop())
    for buckets in (2, 3):
        for kind in ("contexts", "fused"):
            found = row(report, buckets, kind)
            assert found.shared is not None
            assert found.exact is not None
            assert (len(found.shared.seconds), len(found.exact.seconds)) == (2, 1)
            assert found.shared.ratio is not None
            assert found.exact.ratio is not None
            assert found.shared.ratio.median == pytest.approx(1)
            assert found.exact.ratio.median == pytest.approx(buckets)
            assert found.prompt_note == "shared prefill"
            assert found.turning_note == ("rows are turned somehow" if kind == "fused" else "")
        raw = row(report, buckets, "raw")
        assert raw.shared is None
        assert raw.exact is not None
    assert row(report, 1, "contexts").shared is None


def test_only_what_belongs_together_is_open() -> None:
    workshop = FakeWorkshop()
    run(workshop)
    assert workshop.most_open == 4


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), NativeError("it failed")], ids=["Ctrl-C", "a failure"])
def test_what_was_measured_before_the_end_stays(failure: BaseException) -> None:
    whole = FakeWorkshop()
    run(whole)
    seen = []
    for moment in range(1, whole.spent, 7):
        workshop = FakeWorkshop()
        workshop.fail_after, workshop.failure = moment, failure
        report = run(workshop)
        assert not report.complete
        assert not as_json(report)["complete"]
        for found in report.rows:
            if found.decode is not None:
                assert found.decode.speed.median == pytest.approx(1 / seconds_per_token(found.contender))
        seen.append(len(report.rows))
    assert seen == sorted(seen)
    assert (seen[0], seen[-1]) == (0, 9)


def test_a_refusal_leaves_rows_out_with_the_reason() -> None:
    workshop = FakeWorkshop()
    workshop.refusals = {Contender(count, "fused"): "M-RoPE" for count in (1, 2, 3)}
    report = run(workshop)
    assert {found.contender.kind for found in report.rows} == {"raw", "contexts"}
    assert dict(report.left_out) == workshop.refusals
    assert report.complete
    assert dict(workshop.asked)[3] == {"contexts": pytest.approx(3.0)}


def test_a_contender_that_cannot_be_made_is_left_out() -> None:
    workshop = FakeWorkshop()
    workshop.broken = {Contender(3, "fused")}
    report = run(workshop)
    assert dict(report.left_out) == {Contender(3, "fused"): "it broke"}
    assert len(report.rows) == 8


def test_one_bucket_has_to_be_possible() -> None:
    workshop = FakeWorkshop()
    workshop.broken = {ONE_BUCKET}
    with pytest.raises(UnsupportedModelError, match="it broke"):
        run(workshop)
    workshop = FakeWorkshop()
    workshop.largest = 0
    with pytest.raises(OutOfMemoryError):
        run(workshop)


def test_where_nothing_else_can_be_measured_one_bucket_is_not_measured_again() -> None:
    workshop = FakeWorkshop()
    workshop.refusals = {contender: "recurrent" for count in (2, 3) for contender in SETTINGS.group(count)}
    report = run(workshop)
    assert {found.contender.buckets for found in report.rows} == {1}
    alone = FakeWorkshop()
    run(alone, replace(SETTINGS, buckets=(1,)))
    assert workshop.spent == alone.spent
    workshop = FakeWorkshop()
    workshop.broken = {contender for count in (2, 3) for contender in SETTINGS.group(count)}
    assert len(dict(run(workshop).left_out)) == 6
    assert workshop.spent == alone.spent


def test_numbers_of_buckets_without_room_are_left_out() -> None:
    workshop = FakeWorkshop()
    workshop.largest = 2
    report = run(workshop)
    assert {contender for contender, _ in report.left_out} == set(SETTINGS.group(3))
    assert {found.contender.buckets for found in report.rows} == {1, 2}
    assert report.complete


def test_an_engine_that_cannot_share_says_why_and_has_exact_prompts() -> None:
    workshop = FakeWorkshop()
    workshop.not_sharing = {Contender(count, "fused") for count in (2, 3)}
    report = run(workshop)
    assert row(report, 3, "fused").shared is None
    assert row(report, 3, "fused").exact is not None
    assert row(report, 3, "fused").prompt_note == "exact prefill: there is a reason"
    assert row(report, 3, "contexts").shared is not None


@pytest.mark.parametrize(
    ("changes", "phases"),
    [
        ({"prompt_tokens": 0}, ["decode"]),
        ({"new_tokens": 0}, ["shared", "exact"]),
        ({"prompts": ("shared",)}, ["decode", "shared"]),
        ({"prompts": ("exact",)}, ["decode", "exact"]),
    ],
    ids=str,
)
def test_only_what_is_asked_for_is_measured(changes: Any, phases: list[str]) -> None:
    settings = replace(SETTINGS, memory=False, **changes)
    report = run(FakeWorkshop(settings), settings)
    found = row(report, 3, "contexts")
    assert [name for name in ("decode", "shared", "exact") if getattr(found, name) is not None] == phases
    assert found.memory is None


def test_one_engine_is_compared_with_one_bucket_in_a_context() -> None:
    report = run(FakeWorkshop(), replace(SETTINGS, engines=("fused",)))
    kinds = [(found.contender.buckets, found.contender.kind) for found in report.rows]
    assert kinds == [(1, "raw"), (1, "contexts"), (1, "fused"), (2, "raw"), (2, "fused"), (3, "raw"), (3, "fused")]
    assert [buckets for buckets, _ in report.choices] == [1]


def test_the_object_is_as_documented() -> None:
    found = as_json(run(FakeWorkshop()))
    assert set(found) == {
        *(
            "schema",
            "abcli",
            "llama_cpp",
            "devices",
            "model",
            "settings",
            "complete",
            "rows",
            "left_out",
            "auto",
            "other_cores",
        )
    }
    assert found["settings"]["rounds"] == {"decode": 4, "shared": 2, "exact": 1}
    assert found["auto"][1:] == [
        {"buckets": count, "engine": "fused", "reason": "it is faster", "remembered": False} for count in (2, 3)
    ]
    last = found["rows"][-1]
    assert set(last) == {
        *(
            "buckets",
            "engine",
            "bases",
            "decode",
            "prompt_shared",
            "prompt_exact",
            "prompt_note",
            "turning_note",
            "memory",
        )
    }
    assert (last["buckets"], last["engine"]) == (3, "fused")
    assert last["decode"] == {
        "tokens_per_second": {"median": 0.4, "low": 0.4, "high": 0.4},
        "ms_per_token": 2500.0,
        "ratio_to_one_bucket": {"median": 1.6667, "low": 1.6667, "high": 1.6667},
        "ratio_to_raw_batch": {"median": 1.25, "low": 1.25, "high": 1.25},
        "seconds_per_token": [2.5] * 4,
    }
    assert last["memory"] == {"resident_bytes": 3000, "device_bytes": 0, "predicted_bytes": 6000}
    one = next(row for row in found["rows"] if (row["buckets"], row["engine"]) == (1, "contexts"))
    assert one["decode"]["ratio_to_one_bucket"] is None
