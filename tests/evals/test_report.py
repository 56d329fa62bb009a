"""Reports: what they hold, that they are read as they were written, and what is refused."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.errors import EvaluationDataError
from abcli.evals.configurations import Configuration
from abcli.evals.questions import Question
from abcli.evals.report import (
    EvaluationReport,
    RecordedCost,
    RecordedModel,
    data_file,
    decode_report,
    encode_report,
    read_report,
    record,
    write_report,
)
from abcli.evals.scores import Score

CONFIGURATIONS = (
    Configuration("native", (1e4,)),
    Configuration("bases=5000,10000;merge=mean", (5000.0, 1e4), "mean", "shared", 1e4, (), ((0.5, 2.0),), ((1.5,),)),
)


def question(number: int, length: int = 1024) -> Question:
    group = f"kv/{length}/{number // 2}"
    return Question(
        f"{group}/{number % 2}",
        group,
        f"context {number // 2} of é",
        "Which?",
        "It is",
        f" {number}",
        number / 7,
        length,
    )


def made_up(scores: dict[str, tuple[Score, ...]] | None = None, **changes: Any) -> EvaluationReport:
    """A report of two configurations on eight questions at each of two lengths."""
    questions = tuple(record(question(number, length)) for length in (512, 1024) for number in range(8))
    report = EvaluationReport(
        task="kv",
        lengths=(512, 1024),
        depths=5,
        limit=8,
        seed=3,
        data=(),
        model=RecordedModel("tiny.gguf", "ab" * 32, "llama", 1e4),
        about={"versions": {"abcli": "1.2"}},
        configurations=CONFIGURATIONS,
        questions=questions,
        scores=scores
        or {
            item.name: tuple(Score(0.1 * at + index, at % 3 == 0, at % 2) for at in range(16))
            for index, item in enumerate(CONFIGURATIONS)
        },
    )
    return replace(report, **changes)


def written(report: EvaluationReport, path: Path) -> Path:
    write_report(path, report, report.summaries())
    return path


def test_a_report_is_read_as_it_was_written(tmp_path: Path) -> None:
    costs = {item.name: RecordedCost(10.5, 9.25, 11.0, 2**30) for item in CONFIGURATIONS}
    report = made_up(contexts={"kv/1024/0": "context 0 of é"}, costs=costs)
    # Numbers lose what is behind the sixth decimal, and nothing else.
    rounded = {name: tuple(replace(s, nll=round(s.nll, 6)) for s in of) for name, of in report.scores.items()}
    path = written(report, tmp_path / "report.json")
    assert read_report(path) == replace(report, scores=rounded)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_report(path) == replace(report, scores=rounded)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 30), st.booleans(), st.none() | st.integers(0, 40)), min_size=32, max_size=32),
)
def test_the_statistics_of_a_report_are_those_of_the_evaluation(rows) -> None:
    scores = [Score(*row) for row in rows]
    report = made_up({"native": tuple(scores[:16]), CONFIGURATIONS[1].name: tuple(scores[16:])})
    summaries = report.summaries()
    data = encode_report(report, summaries)
    again = decode_report(data, "report")
    assert again.summaries() == summaries
    assert encode_report(again, again.summaries()) == data


def test_what_is_in_the_file(tmp_path: Path) -> None:
    report = made_up()
    text = written(report, tmp_path / "report.json").read_text("utf-8")
    values = json.loads(text)
    assert set(values) == {
        *("format", "version", "task", "lengths", "depths", "limit", "seed", "data", "model", "about"),
        *("configurations", "summaries", "questions", "contexts", "costs"),
    }
    assert values["contexts"] == {}
    assert "context 0" not in text
    assert values["questions"][1] == {
        "identifier": "kv/512/0/1",
        "group": "kv/512/0",
        "length": 512,
        "depth": 0.142857,
        "sha256": hashlib.sha256(json.dumps(["context 0 of é", "Which?", "It is", " 1"]).encode("ascii")).hexdigest(),
        "text": "Which?",
        "answer_start": "It is",
        "answer": " 1",
        "scores": {
            "native": {"nll": 0.1, "exact": False, "rank": 1},
            CONFIGURATIONS[1].name: {"nll": 1.1, "exact": False, "rank": 1},
        },
    }
    assert [summary["length"] for summary in values["summaries"]] == [512, 1024]
    native, other = values["summaries"][0]["summaries"]
    assert native["measures"]["nll"]["value"] == pytest.approx(0.35)
    assert native["difference"] is None
    assert other["difference"]["nll"] == {"value": 1.0, "low": 1.0, "high": 1.0, "error": 0.0}


def test_the_digest_tells_questions_apart() -> None:
    plain = question(1)
    others = [
        replace(plain, context="context"),
        replace(plain, text="What?"),
        replace(plain, answer_start="It isn't"),
        replace(plain, candidates=(" 1", " 2")),
        # The same characters, divided otherwise.
        replace(plain, answer_start="It is ", answer="1"),
    ]
    assert len({record(item).sha256 for item in [plain, *others]}) == len(others) + 1
    assert record(replace(plain)).sha256 == record(plain).sha256


def test_data_is_known_by_its_bytes_and_last_name(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_bytes(b"one\n")
    found = data_file("--data", file)
    assert (found.flag, found.name, found.sha256) == ("--data", "data.jsonl", hashlib.sha256(b"one\n").hexdigest())
    essays = tmp_path / "essays"
    essays.mkdir()
    (essays / "a.txt").write_text("first")
    (essays / "b.txt").write_text("second")
    (essays / "notes.md").write_text("ignored")
    first = data_file("--data", essays)
    assert first.name == "essays"
    (essays / "notes.md").write_text("still ignored")
    assert data_file("--data", essays) == first
    (essays / "a.txt").write_text("firsts")
    (essays / "b.txt").write_text("econd")
    assert data_file("--data", essays).sha256 != first.sha256
    with pytest.raises(EvaluationDataError, match="cannot be read") as caught:
        data_file("--answers", tmp_path / "none")
    assert "--answers" in caught.value.hint


def test_a_report_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = written(made_up(), tmp_path / "report.json")
    before = path.read_bytes()
    broken = made_up(about={"versions": {1, 2}})
    with pytest.raises(TypeError):
        write_report(path, broken, ())
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_half_a_character_does_not_stop_a_report(tmp_path: Path) -> None:
    report = made_up(model=RecordedModel("caf\udce9.gguf", "ab", "llama", 1e4))
    assert read_report(written(report, tmp_path / "report.json")).model.name == "caf?.gguf"


def broken(values: dict[str, object], *path: object, value: object = None) -> bytes:
    """The report `values` with `value` at `path`, or nothing there if it is None."""
    copy = json.loads(json.dumps(values))
    place = copy
    for key in path[:-1]:
        place = place[key]
    if value is None:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return json.dumps(copy).encode()


NO_SPEED = {"tokens_per_second": 0, "low": 0, "high": 1, "memory": 1}
DAMAGE = {
    "no format": (("format",), None, "is not a report of `abcli eval`"),
    "another format": (("format",), "abcli-session", "is not a report of `abcli eval`"),
    "a later version": (("version",), 2, "report format 2"),
    "a version that is no number": (("version",), True, "report format True"),
    "no task": (("task",), None, "task is missing"),
    "no model": (("model",), None, "model is missing"),
    "a native base that is no number": (("model", "native_base"), "1e4", "native_base has the wrong type"),
    "data that is no list": (("data",), {}, "data has the wrong type"),
    "no configurations": (("configurations",), [], "configurations are not distinct"),
    "a configuration that is no object": (("configurations", 0), "native", "configurations has the wrong type"),
    "the same name twice": (("configurations", 1, "name"), "native", "configurations are not distinct"),
    "an unknown merge rule": (("configurations", 1, "merge"), "luck", "merge is 'luck'"),
    "too many bases": (("configurations", 1, "bases"), [1e4] * 17, "has 17 bases"),
    "no bases": (("configurations", 1, "bases"), [], "has 0 bases"),
    "a base that is no number": (("configurations", 1, "bases", 0), "1e4", "bases has the wrong type"),
    "no questions": (("questions",), [], "no questions"),
    "a length of 0": (("questions", 0, "length"), 0, "length is 0"),
    "a depth outside": (("questions", 0, "depth"), 1.5, "depth is 1.5"),
    "a depth that is no number": (("questions", 0, "depth"), True, "depth has the wrong type"),
    "an infinite likelihood": (("questions", 0, "scores", "native", "nll"), 10**400, "nll is not a finite number"),
    "an enormous likelihood": (("questions", 0, "scores", "native", "nll"), 1e300, "1e\\+300"),
    "a missing score": (("questions", 0, "scores", "native"), None, "scores of all configurations"),
    "a score too many": (("questions", 0, "scores", "third"), {}, "scores of all configurations"),
    "an exactness that is no truth value": (
        ("questions", 0, "scores", "native", "exact"),
        1,
        "exact has the wrong type",
    ),
    "a negative rank": (("questions", 0, "scores", "native", "rank"), -1, "rank is -1"),
    "too many depths": (("depths",), 10**9, "depths is 1000000000"),
    "no depths": (("depths",), 0, "depths is 0"),
    "a negative seed": (("seed",), -1, "seed is -1"),
    "an enormous seed": (("seed",), 10**30, "seed is"),
    "contexts that are no object": (("contexts",), [], "contexts has the wrong type"),
    "a context that is no text": (("contexts", "a"), 1, "contexts has the wrong type"),
    "costs that are no object": (("costs",), [], "costs has the wrong type"),
    "costs of some": (("costs", "native"), {}, "costs are not those of all"),
    "a cost that is no object": (
        ("costs",),
        dict.fromkeys((one.name for one in CONFIGURATIONS), 1),
        "costs has the wrong type",
    ),
    "a speed of 0": (("costs",), {one.name: NO_SPEED for one in CONFIGURATIONS}, "decodes 0 tokens per second"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_report_is_refused(tmp_path: Path, case: str) -> None:
    place, value, message = DAMAGE[case]
    path = written(made_up(), tmp_path / "report.json")
    path.write_bytes(broken(json.loads(path.read_bytes()), *place, value=value))
    with pytest.raises(EvaluationDataError, match=message) as caught:
        read_report(path)
    assert str(path) in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is damaged"),
        (b"[]", "is not a report"),
        (b'{"format": NaN}', "NaN is not a number"),
        (b"\xff", "not UTF-8"),
        (b"[" * 100_000, "is damaged"),
        (b'{"format": ' + b"9" * 5000 + b"}", "is damaged"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(data)
    with pytest.raises(EvaluationDataError, match=message):
        read_report(path)


def test_a_truncated_report_is_refused(tmp_path: Path) -> None:
    path = written(made_up(), tmp_path / "report.json")
    data = path.read_bytes()
    for size in (1, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:size])
        with pytest.raises(EvaluationDataError, match="is damaged"):
            read_report(path)


def test_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none.json", tmp_path, Path("nul\0")):
        with pytest.raises(EvaluationDataError, match="cannot be read"):
            read_report(path)
    large = written(made_up(), tmp_path / "report.json")
    monkeypatch.setattr("abcli.evals.report.MAX_BYTES", 100)
    with pytest.raises(EvaluationDataError, match="larger than 100 bytes"):
        read_report(large)
