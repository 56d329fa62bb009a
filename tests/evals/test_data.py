"""Reading JSON lines without trust, and filling contexts: never too long, the needed passage where it was asked for."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.errors import AbcliError, EvaluationDataError, UsageError
from abcli.evals import data
from abcli.evals.data import ContextFiller, Record, read_records, shuffled, take_turns
from abcli.evals.questions import Question, TaskSettings

# Values that JSON and UTF-8 can hold.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(TEXTS, JSON, max_size=4)
OPEN = "["
# How long an example takes says nothing about the code on a busy machine.
relaxed = settings(deadline=None)


def read(path: Path | None) -> list[Record]:
    return list(read_records(path, "a file is needed", "give one with --data FILE"))


def words(text: str) -> int:
    return len(text.split())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@relaxed
@given(objects=st.lists(OBJECTS, min_size=1, max_size=5), packed=st.booleans(), escaped=st.booleans())
def test_what_was_written_is_read(place: Path, objects: list[dict[str, Any]], packed: bool, escaped: bool) -> None:
    content = "".join(f"{json.dumps(value, ensure_ascii=escaped)}\n" for value in objects).encode()
    path = place / "any-name"
    path.write_bytes(gzip.compress(content) if packed else content)
    assert [record.fields for record in read(path)] == objects


@relaxed
@given(content=st.binary(max_size=60), packed=st.booleans())
def test_any_bytes_are_read_or_refused(place: Path, content: bytes, packed: bool) -> None:
    path = place / "bytes"
    path.write_bytes(gzip.compress(content) if packed else content)
    try:
        read(path)
    except EvaluationDataError as error:
        assert str(path) in error.message  # noqa: PT017


@relaxed
@given(cut=st.integers(1, 200))
def test_a_gzip_file_that_breaks_off_is_never_taken_for_whole(place: Path, cut: int) -> None:
    packed = gzip.compress(b"".join(b'{"number": %d}\n' % (number * 7919) for number in range(200)))
    path = place / "broken.gz"
    path.write_bytes(packed[: -min(cut, len(packed) - 2)])
    with pytest.raises(EvaluationDataError, match=r"line \d+: the gzip file breaks off"):
        read(path)


def test_blank_lines_a_byte_order_mark_and_a_missing_end_of_line_are_no_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": 2}')
    assert [(record.line, record.fields) for record in read(tmp_path / "file")] == [(1, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "not JSON"),
        (b"what", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b"null", "not a JSON object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": 1e999}', "too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": "\xff"}', "byte 8 is not UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"a\\uDFFF": 1}', "surrogate"),
        (OPEN.encode() * 200_000, "nested too deeply"),
        (b'{"a": "x"}\x00', "not JSON"),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, message: str, packed: bool) -> None:
    content = b'{"a": "fine \\ud83d\\ude00 \\\\ud800"}\n\n' + line + b"\n"
    path = tmp_path / "data.jsonl"
    path.write_bytes(gzip.compress(content) if packed else content)
    with pytest.raises(EvaluationDataError) as caught:
        read(path)
    assert caught.value.message.startswith(f"{path}, line 3: ")
    assert message in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize("content", [b"", b"\n \n", gzip.compress(b"")], ids=["nothing", "blank", "packed"])
def test_an_empty_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "empty").write_bytes(content)
    with pytest.raises(EvaluationDataError, match="is empty"):
        read(tmp_path / "empty")


def test_damaged_gzip_data_is_an_error(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(b'{"a": 1}\n' * 3))
    packed[-8] ^= 255
    (tmp_path / "checksum").write_bytes(packed)
    (tmp_path / "header").write_bytes(b"\x1f\x8b" + bytes(40))
    (tmp_path / "content").write_bytes(bytes(packed[:10]) + b"\xff" * 40)
    for name in ("checksum", "header", "content"):
        with pytest.raises(EvaluationDataError, match=r"line \d+: the gzip file is damaged"):
            read(tmp_path / name)


def test_reading_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MAX_LINE_BYTES", 1000)
    monkeypatch.setattr(data, "MAX_FILE_BYTES", 5000)
    path = tmp_path / "bomb.gz"
    longest = b'{"a": "' + b"x" * 990 + b'"}\n'
    path.write_bytes(gzip.compress(longest[:-2] + b"\n"))
    with pytest.raises(EvaluationDataError, match="line 1: not JSON"):
        read(path)
    path.write_bytes(gzip.compress(longest))
    assert len(read(path)) == 1
    path.write_bytes(gzip.compress(b"{}\n" + longest[:-1] + b" \n"))
    with pytest.raises(EvaluationDataError, match="line 2: it is longer"):
        read(path)
    path.write_bytes(gzip.compress(b"\n" * 5001))
    with pytest.raises(EvaluationDataError, match="line 5001: the file is larger"):
        read(path)


def test_no_file_is_wrong_usage_with_the_hint(tmp_path: Path) -> None:
    for path in (None, tmp_path / "missing", Path("a\0b")):
        with pytest.raises(UsageError) as caught:
            read(path)
        assert caught.value.hint == "give one with --data FILE"


def test_a_directory_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(EvaluationDataError, match="cannot be read"):
        read(tmp_path)


def record(**fields: Any) -> Record:
    return Record(Path("file"), 7, fields)


def test_fields_are_what_they_are_asked_for_as() -> None:
    inner = record(parts=[{"text": "a"}, {"text": "b"}]).records("parts")
    assert [part.text("text") for part in inner] == ["a", "b"]
    assert record(names=["x", "y"]).texts("names") == ["x", "y"]
    assert record(right=True).truth("right")
    assert not record(right=None).truth("right", default=False)
    assert record(inner={"deep": {"text": "c"}}).record("inner").record("deep").text("text") == "c"


@pytest.mark.parametrize("value", [None, 1, True, "", " \n", [], ["a", 1], ["a", ""], {}, [None], [["a"]], "missing"])
def test_fields_of_another_type_are_refused_by_name(value: Any) -> None:
    outer = record(inner={} if value == "missing" else {"field": value})
    inner = outer.record("inner")
    accepted = 0
    for take in (inner.text, inner.texts, inner.records, inner.truth):
        try:
            take("field")
            accepted += 1
        except EvaluationDataError as error:
            assert error.message.startswith("file, line 7: inner.field")  # noqa: PT017
    assert accepted == (1 if value is True else 0)


PASSAGES = st.lists(st.integers(1, 30), min_size=1, max_size=30)


def render(passages: Sequence[tuple[int, int]]) -> str:
    """A passage is a number and a size in words; the text says both."""
    return "\n".join(f"{number} " + "w " * (size - 1) for number, size in passages)


@relaxed
@given(sizes=PASSAGES, length=st.integers(1, 200), depth=st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]))
def test_a_context_is_full_and_not_too_long(sizes: list[int], length: int, depth: float) -> None:
    needed, *others = enumerate(sizes)
    filled = ContextFiller(render, words, length).fill(needed, others, depth, "seed")
    if filled is None:
        # No second passage fits: the smallest one tried is too large.
        assert needed[1] + min((size for _, size in others[:10]), default=length) > length
        return
    assert words(filled.context) <= length
    assert filled.context == render(filled.passages)
    assert len(set(filled.passages)) == len(filled.passages) >= 2
    assert set(filled.passages) <= set(enumerate(sizes))
    position = filled.passages.index(needed)
    assert filled.depth == position / (len(filled.passages) - 1)
    assert abs(filled.depth - depth) <= 0.5 / (len(filled.passages) - 1) + 1e-9
    if len(others) <= 10:
        left = length - words(filled.context)
        assert all(size > left for number, size in others if (number, size) not in filled.passages)


def test_preferred_passages_come_in_first_but_stand_anywhere() -> None:
    others = [(number, 10) for number in range(1, 40)]
    filler = ContextFiller(render, words, 100)
    contexts = [filler.fill((0, 10), others, 0.0, f"seed {number}") for number in range(20)]
    orders = {filled.passages[1:] for filled in contexts if filled}
    assert {frozenset(order) for order in orders} == {frozenset(others[:9])}
    assert len(orders) > 15


def test_filling_ends_after_ten_long_passages_in_a_row_and_no_sooner() -> None:
    short, long = [(number, 5) for number in (1, 2, 3)], [(number, 900) for number in range(10, 30)]
    filler = ContextFiller(render, words, 100)
    apart = filler.fill((0, 10), [*long[:9], short[0], *long[9:18], short[1], *long[:10], short[2]], 0.0, "")
    assert apart is not None
    assert set(apart.passages) == {(0, 10), short[0], short[1]}


def test_passages_that_cost_more_together_are_dropped() -> None:
    def count(text: str) -> int:
        return words(text) + 5 * text.rstrip("\n").count("\n")

    filled = ContextFiller(render, count, 50).fill((0, 10), [(number, 10) for number in range(1, 9)], 1.0, "")
    assert filled is not None
    assert [number for number, _ in sorted(filled.passages)] == [0, 1, 2]
    assert filled.depth == 1.0


def test_each_passage_is_counted_once() -> None:
    calls: list[str] = []

    def count(text: str) -> int:
        calls.append(text)
        return words(text)

    filler = ContextFiller(render, count, 60)
    passages = [(number, 10) for number in range(6)]
    for needed in passages:
        filler.fill(needed, [other for other in passages if other != needed], 0.5, "")
    assert len(calls) == len(passages) + 6


@relaxed
@given(st.lists(st.integers()), st.text(max_size=5))
def test_shuffling_keeps_everything_and_depends_on_the_seed_alone(entries: list[int], seed: str) -> None:
    once = shuffled(entries, seed)
    assert sorted(once) == sorted(entries)
    assert once == shuffled(entries, seed)


def test_shuffling_is_the_same_on_every_machine() -> None:
    assert shuffled("abcdefgh", "a seed") == list("geacdhbf")


def plain_question(identifier: str, depth: float) -> Question:
    return Question(identifier, identifier, "", "", "", "", depth, 5)


def test_depths_are_taken_in_turn_whatever_is_left_out() -> None:
    settings = TaskSettings(length=5, limit=6, depths=3)
    questions = take_turns(
        "task", settings, range(12), lambda entry, depth, name: plain_question(name, depth) if entry % 2 else None
    )
    assert [question.depth for question in questions] == [0.0, 0.5, 1.0] * 2
    assert [question.identifier for question in questions] == [f"task/5/{number:04d}" for number in range(6)]


def test_one_depth_is_the_beginning() -> None:
    questions = take_turns(
        "task", TaskSettings(5, 2, depths=1), range(3), lambda entry, depth, name: plain_question(name, depth)
    )
    assert [question.depth for question in questions] == [0.0, 0.0]


def test_too_few_questions_are_an_error_that_says_how_many_there_are() -> None:
    settings = TaskSettings(length=5, limit=6, data=Path("file"))
    with pytest.raises(AbcliError, match=r"3 of the 4 questions in file .* 5 tokens, but 6"):
        take_turns(
            "task", settings, range(4), lambda entry, depth, name: plain_question(name, depth) if entry else None
        )
