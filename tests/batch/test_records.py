"""Lines, blocks, JSON objects and tables: the same records however the bytes arrive, and bad ones by their line."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.batch import records
from abcli.batch.compression import DamagedError
from abcli.batch.records import TableReader, block_records, object_records, split_lines, text_records
from abcli.errors import PromptError, UsageError

relaxed = settings(deadline=None)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\n"))
CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\r"), max_size=8)


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    yield from (data[at : at + size] for at in range(0, len(data), size))


def values(found: Iterator[Any]) -> list[Any]:
    return [(record.line, record.value if record.problem is None else record.problem.message) for record in found]


def lines(text: str | bytes) -> Iterator[records.Line]:
    return split_lines([text.encode() if isinstance(text, str) else text])


@relaxed
@given(data=st.binary(max_size=200), size=st.integers(1, 40))
def test_lines_do_not_depend_on_how_they_arrive(data: bytes, size: int) -> None:
    expected = data.split(b"\n")
    if not expected[-1]:
        expected.pop()
    found = list(split_lines(chunks(data, size)))
    assert [line.data for line in found] == [line.removesuffix(b"\r") for line in expected]
    assert [line.number for line in found] == list(range(1, len(expected) + 1))


@relaxed
@given(sizes=st.lists(st.integers(0, 30), max_size=6), chunk=st.integers(1, 40))
def test_only_lines_over_the_limit_are_refused(sizes: list[int], chunk: int) -> None:
    data = b"".join(b"x" * size + b"\n" for size in sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "MAX_LINE_BYTES", 12)
        found = list(split_lines(chunks(data, chunk)))
    assert [(line.problem is not None, len(line.data)) for line in found] == [
        (size > 12, 0 if size > 12 else size) for size in sizes
    ]


def test_a_line_without_an_end_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 1 << 20)
    endless = (b"x" * (1 << 16) for _ in range(1 << 12))
    (line,) = split_lines(endless)
    assert line.problem is not None
    assert line.data == b""


def test_half_a_line_before_damage_is_no_line() -> None:
    def damaged() -> Iterator[bytes]:
        yield b"one\ntw"
        raise DamagedError("it ends")

    assert values(text_records(split_lines(damaged()))) == [(1, "one"), (2, "it ends")]
    assert values(block_records(split_lines(damaged()), "---")) == [(1, "it ends")]


def test_text_lines() -> None:
    data = b"\xef\xbb\xbfone\r\n\n  \ntwo\x0b\xc2\x85 words\nb\xffd\nnul \0\nlast"
    assert values(text_records(lines(data))) == [
        (1, "one"),
        (4, "two\x0b\x85 words"),
        (5, "the line is not UTF-8: byte 0xff at offset 1"),
        (6, "the line is not text: it has a NUL byte at offset 4"),
        (7, "last"),
    ]


BLOCK_LINES = st.lists(st.sampled_from(["", "  ", "a", " b", "---", "--- ", "----"]), max_size=12)


@relaxed
@given(content=BLOCK_LINES, separator=st.sampled_from(["---", ""]))
def test_blocks_are_what_splitting_the_lines_gives(content: list[str], separator: str) -> None:
    blocks: list[tuple[int, list[str]]] = [(1, [])]
    for number, line in enumerate(content, 1):
        if line.rstrip() == separator:
            blocks.append((number + 1, []))
        else:
            blocks[-1][1].append(line)
    expected = []
    for number, block in blocks:
        while block and not block[0].strip():
            number, block = number + 1, block[1:]
        if block:
            expected.append((number, "\n".join(block).rstrip()))
    assert values(block_records(lines("\n".join(content)), separator)) == expected


def test_blocks_over_the_limit_and_with_bad_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_LINE_BYTES", 10)
    found = values(
        block_records(lines(b"x\n123456\n123456\n123456\n---\nok\n---\ny\n12345678901\nz\n---\n\xff"), "---")
    )
    assert [line for line, _ in found] == [1, 6, 8, 12]
    assert found[0][1].startswith("the block is longer")
    assert found[1][1] == "ok"
    assert found[2][1].startswith("the line is longer")
    assert found[3][1].startswith("the line is not UTF-8")


@relaxed
@given(objects=st.lists(st.dictionaries(TEXTS, TEXTS | st.integers(), max_size=3), max_size=4))
def test_objects_are_read(objects: list[dict[str, Any]]) -> None:
    data = "\n\n".join(json.dumps(value, ensure_ascii=False) for value in objects)
    assert [value for _, value in values(object_records(lines(data)))] == objects


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON: Expecting property name"),
        ("[1]", "not an object"),
        ('"text"', "not an object"),
        ('{"a": NaN}', "NaN is not JSON"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' is given twice"),
        ("[" * 100_000, "nests too deep"),
        ('{"a": ' + "1" * 5000 + "}", "not usable JSON"),
        ('{"a": 1} {"b": 2}', "Extra data"),
    ],
)
def test_other_lines_are_refused(line: str, problem: str) -> None:
    ((number, message), (_, good)) = values(object_records(lines(f'\n{line}\n{{"ok": 1}}')))
    assert number == 2
    assert problem in message
    assert len(message) < 400
    assert good == {"ok": 1}


@relaxed
@given(
    rows=st.lists(st.tuples(CELLS, CELLS), max_size=5),
    delimiter=st.sampled_from(",;\t"),
    end=st.sampled_from(["\n", "\r\n"]),
)
def test_tables_are_what_python_writes(rows: list[tuple[str, str]], delimiter: str, end: str) -> None:
    file = io.StringIO()
    writer = csv.writer(file, delimiter=delimiter, lineterminator=end)
    writer.writerow(["question", "other name"])
    writer.writerows(rows)
    reader = TableReader(lines(file.getvalue()))
    expected: list[Mapping[str, str]] = [
        {"question": first, "other name": second} for first, second in rows if (first + second).strip()
    ]
    assert [record.value for record in reader] == expected


def test_rows_know_their_lines_and_their_faults() -> None:
    data = b'a,b\n1,2\n"x\ny",z\n\n1,2,3\n"q"r,1\n\xff,1\nend,"open\nto,the end'
    found = values(iter(TableReader(lines(data))))
    assert found[:2] == [(2, {"a": "1", "b": "2"}), (3, {"a": "x\ny", "b": "z"})]
    assert [line for line, _ in found[2:]] == [6, 7, 8, 9]
    for (_, message), part in zip(
        found[2:], ["3 fields, but the header 2", "not CSV", "UTF-8", "not CSV"], strict=True
    ):
        assert part in message


def test_one_field_is_one() -> None:
    ((_line, message),) = values(iter(TableReader(lines("a,b\nx"))))
    assert message == "the row has 1 field, but the header 2"


def test_large_cells_are_read() -> None:
    (record,) = TableReader(lines("a,b\n" + "x" * 300_000 + ",1\n"))
    assert isinstance(record.value, Mapping)
    assert len(record.value["a"]) == 300_000


@pytest.mark.parametrize("header", ["a,a\n", "a,,b\n"])
def test_ambiguous_columns_are_refused(header: str) -> None:
    with pytest.raises(UsageError, match="columns"):
        TableReader(lines(header))


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xff,a\n"])
def test_tables_without_a_header_are_refused(data: bytes) -> None:
    with pytest.raises(PromptError):
        TableReader(lines(data))
