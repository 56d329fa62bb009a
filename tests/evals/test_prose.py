"""Prose is read sentence by sentence, or generated; files that cannot be used are named."""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.errors import EvaluationDataError
from abcli.evals import prose
from abcli.evals.needle import ADJECTIVES, ANIMALS
from abcli.evals.prose import MAX_SENTENCE_CHARACTERS, filler, passage, read_sentences, split_sentences


def test_filler_holds_no_digits_and_no_word_of_a_fact() -> None:
    sentences = list(islice(filler(Random(1)), 5000))
    words = set(re.findall(r"[a-z]+", " ".join(sentences).lower()))
    assert not words & {*ADJECTIVES, *ANIMALS, "secret", "code", "codes"}
    assert all(re.fullmatch(r"[A-Z][a-z, ]+\.", sentence) for sentence in sentences)
    assert not any(re.search(r"\b(\w+) \1\b|  | ,|\ba [aeiou]", sentence) for sentence in sentences)


def test_filler_is_varied() -> None:
    sentences = list(islice(filler(Random(2)), 500))
    assert len(set(sentences)) > 450
    assert len({sentence.split()[-1] for sentence in sentences}) > 60


def test_every_sentence_of_filler_is_split_off_as_one() -> None:
    sentences = list(islice(filler(Random(3)), 300))
    assert split_sentences(" ".join(sentences)) == sentences


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("One.", ["One."]),
        ("One. Two!  Three?\nFour\u2026 Five.", ["One.", "Two!", "Three?", "Four\u2026", "Five."]),
        ('He said "Go." She went. (So did I.) Why?!', ['He said "Go."', "She went.", "(So did I.)", "Why?!"]),
        ("Dr. Ho met J. S. Bach, e.g. in St. Ives. All.", ["Dr. Ho met J. S. Bach, e.g. in St. Ives.", "All."]),
        ("It costs 3.14 in U.S. shops. Cheap.", ["It costs 3.14 in U.S. shops.", "Cheap."]),
        ("The end.Then more. See a.B or x.txt.", ["The end.", "Then more.", "See a.B or x.txt."]),
        ("A heading\n\nA sentence\nover lines. Cut off\n \nAnother.", ["A sentence over lines.", "Another."]),
        ("A heading\r\n\r\nText.\r\n", ["Text."]),
        ("\u4eca\u65e5\u3002\u660e\u65e5\uff01", ["\u4eca\u65e5\u3002", "\u660e\u65e5\uff01"]),
        ("x" * MAX_SENTENCE_CHARACTERS + ". Short.", ["Short."]),
        ("x" * (MAX_SENTENCE_CHARACTERS - 1) + ".", ["x" * (MAX_SENTENCE_CHARACTERS - 1) + "."]),
    ],
)  # fmt: skip
def test_sentences_are_split(text: str, expected: list[str]) -> None:
    assert split_sentences(text) == expected


@given(st.text(alphabet="ab. !?\n\"'\u3002\u2026\t\r", max_size=200))
def test_sentences_stand_in_the_text_in_order(text: str) -> None:
    flat = " ".join(text.split())
    position = 0
    for sentence in split_sentences(text):
        assert sentence == " ".join(sentence.split()) != ""
        position = flat.index(sentence, position) + len(sentence)


def test_a_long_text_without_sentence_ends_is_split_in_linear_time() -> None:
    assert split_sentences("Mr. " * 200_000) == []


@given(st.lists(st.text(max_size=3), min_size=1, max_size=20), st.integers())
def test_a_passage_is_a_rotation_of_the_text(sentences: list[str], seed: int) -> None:
    found = list(passage(sentences, Random(seed)))
    rotations = [sentences[start:] + sentences[:start] for start in range(len(sentences))]
    assert found in rotations
    assert found == list(passage(sentences, Random(seed)))


def test_passages_begin_in_many_places() -> None:
    sentences = [str(number) for number in range(50)]
    assert len({next(passage(sentences, Random(seed))) for seed in range(200)}) > 40


def test_a_directory_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, text in (("b.txt", "Second."), ("a.txt", "\ufeffFirst."), ("c.md", "Not this."), ("d.txt", "")):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "e.txt").mkdir()
    assert read_sentences(tmp_path) == ("First.", "Second.")


def test_paragraphs_end_with_their_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One. Cut off", encoding="utf-8")
    (tmp_path / "b.txt").write_text("Two.", encoding="utf-8")
    assert read_sentences(tmp_path) == ("One.", "Two.")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"One.\nTwo.\nTh\xe9.\n", "line 3: byte 0xe9 is not UTF-8"),
        (b"\xef\xbb\xbfOne.\nT\xff.", "line 2: byte 0xff is not UTF-8"),
        ("One.".encode("utf-16"), "line 1: byte 0xff is not UTF-8"),
        (b"One.\nT\0wo.", "line 2: a NUL byte"),
        (b"", "holds no sentences"),
        (b"no end", "holds no sentences"),
        (b"One.", None),
    ],
)
def test_what_is_no_prose_is_named_by_file_and_line(tmp_path: Path, data: bytes, message: str | None) -> None:
    path = tmp_path / "prose.txt"
    path.write_bytes(data)
    if message is None:
        assert read_sentences(path) == ("One.",)
        return
    with pytest.raises(EvaluationDataError, match=message) as raised:
        read_sentences(path)
    assert str(path) in raised.value.message
    assert raised.value.hint


def test_missing_and_unreadable_files_are_errors(tmp_path: Path) -> None:
    with pytest.raises(EvaluationDataError, match="there is no file"):
        read_sentences(tmp_path / "missing.txt")
    with pytest.raises(EvaluationDataError, match=r"no \.txt file"):
        read_sentences(tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(EvaluationDataError, match="cannot read"):
        read_sentences(tmp_path / "file" / "below.txt")
    with pytest.raises(EvaluationDataError, match="cannot read"):
        read_sentences(Path("a\0b"))


def test_all_files_together_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_bytes(b"One. Two.")
    (tmp_path / "b.txt").write_bytes(b"Three.")
    monkeypatch.setattr(prose, "MAX_PROSE_BYTES", 15)
    assert len(read_sentences(tmp_path)) == 3
    monkeypatch.setattr(prose, "MAX_PROSE_BYTES", 14)
    with pytest.raises(EvaluationDataError, match=r"b\.txt the prose is larger than 14 bytes"):
        read_sentences(tmp_path)
