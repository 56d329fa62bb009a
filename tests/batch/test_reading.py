"""From a file to jobs: recognised formats, ids, seeds, shared text, and bad lines that do not stop the rest."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from abcli.batch.jobs import BadLine, Job
from abcli.batch.reading import (
    InputFormat,
    InputParts,
    JobReader,
    count_jobs,
    in_shard,
    input_digest,
    parse_shard,
    seed_for,
)
from abcli.batch.shapes import Shape
from abcli.batch.templates import Template, parse_template
from abcli.chat.messages import Message
from abcli.errors import AbcliError, PromptError, UsageError
from abcli.sampling import NATIVE_RANDOM_SEED
from tests.batch.inputs import OTHER, OWN, RUN, job, jobs, openai, prompts, write

relaxed = settings(deadline=None)


def test_text_lines_are_jobs(tmp_path: Path) -> None:
    first, second = jobs(write(tmp_path, "one\n\n two \n"))
    assert first == Job(0, 1, "1", (Message("user", "one"),), first.generation if isinstance(first, Job) else RUN)
    assert isinstance(second, Job)
    assert (second.index, second.line, second.identifier) == (1, 3, "3")
    assert second.messages == (Message("user", " two "),)
    assert second.generation.max_tokens == 9
    assert second.generation.sampling.temperature == 0.5
    assert second.generation.sampling.seed == seed_for(7, "3")


@pytest.mark.parametrize(
    ("content", "name", "format"),
    [
        ("Hello\n", "input", "text"),
        ("", "input", "text"),
        ("\n\n" + json.dumps(OWN), "input", "jsonl"),
        ("\ufeff" + json.dumps(OWN), "input.txt", "jsonl"),
        (json.dumps({"messages": []}), "input", "jsonl"),
        (json.dumps(openai()), "input.jsonl", "openai"),
        (json.dumps(OTHER), "input", "text"),
        (json.dumps(OTHER), "input.jsonl", "jsonl"),
        ("not JSON", "input.ndjson", "jsonl"),
        ('{"prompt": "open', "input", "text"),
        ("[1]", "input", "text"),
        ("[1]", "input.json", "jsonl"),
        (b"\xff\xf0", "input", "text"),
    ],
)
def test_formats_are_recognised(tmp_path: Path, content: str | bytes, name: str, format: InputFormat) -> None:
    path = write(tmp_path, content, name)
    with JobReader(path, InputParts(), RUN) as reader:
        assert reader.format == format
    packed = write(tmp_path, gzip.compress(path.read_bytes()), f"{name}.gz")
    with JobReader(packed, InputParts(), RUN) as reader:
        assert reader.format == format


@pytest.mark.parametrize(
    ("content", "name", "format"),
    [
        ("question\nx\n", "input", "csv"),
        (json.dumps(OTHER), "input", "jsonl"),
        (json.dumps(OTHER), "input.jsonl", "jsonl"),
        ("question,b\nx,y\n", "input.csv", "csv"),
    ],
)
def test_templates_go_with_tables_and_objects(tmp_path: Path, content: str, name: str, format: InputFormat) -> None:
    parts = InputParts(template=parse_template("Q: {{question}}"))
    reader = JobReader(write(tmp_path, content, name), parts, RUN)
    assert reader.format == format
    (found,) = reader
    assert isinstance(found, Job)
    assert found.messages[0].content in ("Q: x", "Q: q")


def test_a_named_format_wins(tmp_path: Path) -> None:
    path = write(tmp_path, [OWN], "input.jsonl")
    assert prompts(jobs(path, format="text")) == [json.dumps(OWN)]
    (bad,) = jobs(path, format="openai")
    assert isinstance(bad, BadLine)
    assert "custom_id" in bad.message


@pytest.mark.parametrize(
    ("options", "name", "words"),
    [
        ({"format": "jsonl", "separator": "-"}, "input", "`separator`"),
        ({"format": "csv"}, "input", "by a template"),
        ({}, "input.csv", "by a template"),
        ({"format": "text", "template": parse_template("{{a}}")}, "input", "`template`"),
        ({"template": parse_template("{{missing}}")}, "input.csv", "{{missing}}"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, options: Any, name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        jobs(write(tmp_path, "a,b\n1,2\n", name), **options)


@pytest.mark.parametrize(
    ("content", "name", "words"),
    [
        ("Hi\n".encode("utf-16"), "input", "UTF-16"),
        (b"plain", "input.gz", "not gzip data"),
        (gzip.compress(b"one line that is never whole", mtime=0)[:20], "input.gz", "ends within"),
    ],
)
def test_an_input_that_cannot_be_read_at_all_is_refused(tmp_path: Path, content: bytes, name: str, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        jobs(write(tmp_path, content, name))
    with pytest.raises(PromptError, match="no file"):
        jobs(tmp_path / "missing")
    with pytest.raises(PromptError, match="directory"):
        jobs(tmp_path)


def test_a_missing_end_is_a_bad_line(tmp_path: Path) -> None:
    texts = [hashlib.sha512(str(number).encode()).hexdigest() for number in range(1500)]
    content = "".join(f"{text}\n" for text in texts).encode()
    for suffix, packed in ((".gz", gzip.compress(content)), (".zst", zstandard.ZstdCompressor().compress(content))):
        found = jobs(write(tmp_path, packed[:-6], f"input{suffix}"))
        *good, last = found
        assert isinstance(last, BadLine)
        assert "ends within" in last.message
        assert prompts(good) == texts[: len(good)]
        assert good
        assert (last.line, last.index) == (len(good) + 1, len(good))


def test_ids(tmp_path: Path) -> None:
    records: list[Any] = [
        {"id": 7, "prompt": "a"},
        {"id": "x", "prompt": "b"},
        {"prompt": "c"},
        {"id": "7", "prompt": "d"},
        {"id": "3", "prompt": "e"},
        {"id": "x", "prompt": ""},
        *({"id": value, "prompt": "f"} for value in ("", True, 1.5, ["x"], "\ud800")),
        {"id": "bad", "prompt": 1},
        {"id": "bad", "prompt": "g"},
    ]
    found = jobs(write(tmp_path, records))
    assert [item.identifier for item in found] == ["7", "x", "3", "7", "3", "x", *[None] * 5, "bad", "bad"]
    assert [type(item) for item in found] == [Job] * 3 + [BadLine] * 10
    assert found[0].extra == {"id": 7}
    assert "the id '7' is that of line 1" in found[3].message  # type: ignore[union-attr]
    assert "the id '3' is that of line 3" in found[4].message  # type: ignore[union-attr]


def test_a_bad_line_keeps_its_id_as_it_was_written(tmp_path: Path) -> None:
    found = jobs(write(tmp_path, [{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}, {"id": 2, "prompt": ""}]))
    shape = Shape("jsonl")
    bad = [item for item in found if isinstance(item, BadLine)]
    assert [json.loads(shape.encode(item.result()))["id"] for item in bad] == [1, 2]
    requests = [openai(), openai()]
    again = jobs(write(tmp_path, requests))[1]
    assert isinstance(again, BadLine)
    assert json.loads(Shape("openai").encode(again.result()))["custom_id"] == "r1"


def test_rows_have_ids_where_they_say_so(tmp_path: Path) -> None:
    path = write(tmp_path, "id,q\nx,1\n,2\nx,3\n", "input.csv")
    found = jobs(path, template=parse_template("{{q}}"))
    assert [item.identifier for item in found] == ["x", "3", "x"]


def test_shared_text(tmp_path: Path) -> None:
    records: list[Any] = [
        {"prompt": "one"},
        {"messages": [{"role": "system", "content": "own"}, {"role": "user", "content": "two"}]},
        {"messages": [{"role": "assistant", "content": "x"}]},
    ]
    first, second, third = jobs(write(tmp_path, records), context="The document.\n", system="Be kind.")
    assert isinstance(first, Job)
    assert isinstance(second, Job)
    assert isinstance(third, BadLine)
    assert first.messages == (Message("system", "Be kind."), Message("user", "The document.\n\none"))
    assert second.messages == (Message("system", "own"), Message("user", "The document.\n\ntwo"))


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (None, Path("-")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(gzip.compress(b"one\ntwo\n"))))
        assert prompts(list(JobReader(path, InputParts(), RUN))) == ["one", "two"]
        assert input_digest(path) is None
        assert count_jobs(path, InputParts()) is None


def test_a_pipe_is_read_as_it_fills(tmp_path: Path) -> None:
    end, start = os.pipe()
    with os.fdopen(start, "wb", 0) as writer, os.fdopen(end, "rb") as file:
        writer.write(b"one\n")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdin", type("Stdin", (), {"buffer": file}))
            reader = JobReader(None, InputParts(), RUN)
            # The writer has not closed the pipe: waiting for more would never end.
            assert prompts([next(reader)]) == ["one"]
    with pytest.raises(PromptError):
        input_digest(tmp_path / "missing")


@relaxed
@given(
    content=st.binary(max_size=60) | st.text(st.sampled_from('ab"\n,{}:[] 1'), max_size=40).map(str.encode),
    format=st.sampled_from(["auto", "text", "jsonl", "openai", "csv"]),
    separator=st.none() | st.sampled_from(["", "a"]),
    template=st.none() | st.just(parse_template("{{a}}")),
)
def test_any_bytes_become_jobs_and_bad_lines(
    tmp_path_factory: pytest.TempPathFactory,
    content: bytes,
    format: Any,
    separator: str | None,
    template: Template | None,
) -> None:
    path = write(tmp_path_factory.getbasetemp(), content, "any")
    try:
        found = jobs(path, format=format, separator=separator, template=template)
    except AbcliError:
        return
    assert [item.index for item in found] == list(range(len(found)))
    assert len({item.line for item in found}) == len(found)
    ids = [item.identifier for item in found if isinstance(item, Job)]
    assert len(set(ids)) == len(ids)
    assert count_jobs(path, InputParts(format, separator, template)) == len(found)


@given(seed=st.integers(0, NATIVE_RANDOM_SEED - 1), ids=st.lists(st.text(), unique=True, min_size=2, max_size=6))
def test_seeds_depend_on_the_run_and_the_id(seed: int, ids: list[str]) -> None:
    seeds = [seed_for(seed, identifier) for identifier in ids]
    assert all(0 <= value < NATIVE_RANDOM_SEED for value in seeds)
    assert seeds != [seed_for(seed + 1, identifier) for identifier in ids]


def test_seeds_are_what_they_were(tmp_path: Path) -> None:
    # Another value would break the resumption of every unfinished batch.
    expected = int.from_bytes(hashlib.blake2b(b"7\nx", digest_size=8).digest(), "big") % 0xFFFFFFFF
    assert seed_for(7, "x") == expected
    moved = jobs(write(tmp_path, [{"id": "y", "prompt": "p"}, {"id": "x", "prompt": "p"}]))
    assert isinstance(moved[1], Job)
    assert moved[1].generation.sampling.seed == expected
    own = job(write(tmp_path, [{"id": "x", "prompt": "p", "seed": 7}]))
    assert own.generation.sampling.seed == 7


@given(count=st.integers(1, 9), total=st.integers(0, 40))
def test_shards_divide_the_jobs(count: int, total: int) -> None:
    owners = [[shard for shard in range(1, count + 1) if in_shard(index, (shard, count))] for index in range(total)]
    assert all(len(found) == 1 for found in owners)
    assert all(in_shard(index, None) for index in range(total))


def test_shards_are_parsed() -> None:
    assert parse_shard("2/3") == (2, 3)
    for text in ("0/3", "4/3", "1", "1/0", "a/b", "-1/2", "1/2/3", "", "²/3", "1/99999999999"):
        with pytest.raises(UsageError, match="`shard`"):
            parse_shard(text)


def test_the_digest_is_that_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, b"x" * 3_000_000)
    assert input_digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()
