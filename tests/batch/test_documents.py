"""An input that is one JSON document: arrays and objects over several lines, and what only looks like one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.batch import documents
from abcli.batch.jobs import BadLine
from abcli.batch.reading import InputParts, JobReader, count_jobs
from abcli.batch.templates import parse_template
from abcli.errors import PromptError
from tests.batch.inputs import OTHER, OWN, RUN, jobs, openai, prompts, write

INDENTS = (None, 0, 2)


@pytest.mark.parametrize("name", ["input", "input.json", "input.jsonl"])
@pytest.mark.parametrize("indent", INDENTS)
def test_an_array_of_texts_and_objects(tmp_path: Path, name: str, indent: int | None) -> None:
    path = write(tmp_path, json.dumps(["one", {**OWN, "max_tokens": 3}, "two\nlines"], indent=indent), name)
    found = jobs(path)
    assert prompts(found) == ["one", "p", "two\nlines"]
    assert [item.identifier for item in found] == ["1", "a", "3"]
    assert [item.line for item in found] == [1, 2, 3]
    assert found[1].generation.max_tokens == 3  # type: ignore[union-attr]
    assert count_jobs(path, InputParts()) == 3


@pytest.mark.parametrize("name", ["input", "input.json"])
def test_objects_over_several_lines(tmp_path: Path, name: str) -> None:
    one = json.dumps({"id": "a", "messages": [{"role": "user", "content": "Hi"}]}, indent=2)
    assert prompts(jobs(write(tmp_path, one, name))) == ["Hi"]
    both = b"\xef\xbb\xbf" + one.encode() + b"\r\n\n" + one.replace('"a"', '"b"').encode()
    assert [item.identifier for item in jobs(write(tmp_path, both, name))] == ["a", "b"]


def test_an_array_of_openais_requests(tmp_path: Path) -> None:
    path = write(tmp_path, json.dumps([openai(), {**openai(), "custom_id": "r2"}, "text"]))
    with JobReader(path, InputParts(), RUN) as reader:
        assert reader.format == "openai"
        found = list(reader)
    assert [item.identifier for item in found] == ["r1", "r2", "3"]
    assert isinstance(found[2], BadLine)


def test_an_array_for_a_template(tmp_path: Path) -> None:
    template = parse_template("Q: {{question}}")
    path = write(tmp_path, json.dumps([OTHER, "text", OTHER]), "input.json")
    assert prompts(jobs(path, template=template)) == ["Q: q", "! the item is a text, not an object", "Q: q"]


def test_bad_items_do_not_stop_the_rest(tmp_path: Path) -> None:
    path = write(tmp_path, '[{"prompt": "a"}, 7, {"prompt": "b", "prompt": "c"}, [], null, "", "d"]', "input.json")
    found = jobs(path)
    assert [type(item) is BadLine for item in found] == [False, True, True, True, True, True, False]
    assert "given twice" in found[2].message  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ('["a", "b"', "line 1, column 10"),
        ('[\n  {"prompt": "a"},\n  {"prompt": }\n]', "line 3, column 14"),
        ('{\n  "prompt": "a"\n  "id": 1\n}', "line 3, column 3"),
        ('["a"] and', "line 1, column 7"),
        ('[\n{"prompt": "a"}\n{"prompt": "b"}\n]', "line 3, column 1"),
        ("[" + '{"a":' * 100_000, "nests too deep"),
    ],
)
def test_a_damaged_document_is_one_error(tmp_path: Path, content: str, place: str) -> None:
    with pytest.raises(PromptError, match="begins like one JSON document") as caught:
        jobs(write(tmp_path, content, "input.json"))
    assert place in caught.value.message


@pytest.mark.parametrize(
    "content",
    [
        "[1] What is a river?\n[2] What is a hill?\n",
        '["Paris"] is what?\nNext line\n',
        '["one"]\n["two"]\n',
        "[]\n",
        '{"what"\nis this}\n',
        "[\n",
    ],
)
def test_text_that_begins_like_a_document_stays_text(tmp_path: Path, content: str) -> None:
    assert prompts(jobs(write(tmp_path, content))) == content.splitlines()


@pytest.mark.parametrize("first", ['{"prompt": "a",', '{"prompt":', '["a"]', "[{}]", '{"prompt": "a'])
def test_one_bad_line_is_no_document(tmp_path: Path, first: str) -> None:
    found = jobs(write(tmp_path, f'{first}\n{{"prompt": "b"}}\n', "input.jsonl"))
    assert [type(item) is BadLine for item in found] == [True, False]


def test_a_document_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_TEXT_BYTES", 1 << 20)
    long = json.dumps(["x" * 600_000] * 2)
    with pytest.raises(PromptError, match="more than 1 MiB"):
        jobs(write(tmp_path, long, "input.json"))
    assert len(jobs(write(tmp_path, f"{long}\nnext line"))) == 2


ITEMS = st.lists(st.text() | st.dictionaries(st.text(), st.text(), max_size=3), min_size=1, max_size=5)


@settings(deadline=None)
@given(items=ITEMS, indent=st.sampled_from(INDENTS), ascii_only=st.booleans())
def test_any_array_is_read_as_it_was_written(items: list[Any], indent: int | None, ascii_only: bool) -> None:
    text = json.dumps(items, indent=indent, ensure_ascii=ascii_only)
    if "\0" in text:
        return
    records, rest = documents.read_document(iter([text.encode()]), "input", is_json=True)
    assert records is not None
    assert [record.value for record in records] == items
    assert b"".join(rest) == text.encode()
