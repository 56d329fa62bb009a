"""Structured answers as the commands give them: what stands on standard output and error, whatever asks for them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.cli.conftest import Command

SCHEMA = {
    "type": "object",
    "properties": {
        "reason": {"type": "string", "maxLength": 12},
        "answer": {"enum": ["yes", "no"]},
        "sure": {"type": "integer", "minimum": 0, "maximum": 100},
    },
    "required": ["reason", "answer"],
    "additionalProperties": False,
}
TEXT = json.dumps(SCHEMA)
# One thread: two that wait for each other by spinning crawl on a busy machine. The engine is named, not measured.
STEADY = ("-t", 1, "--engine", "contexts")
ONE = ("-t", 1, "-k", 1)


def check(text: str) -> None:
    made = json.loads(text)
    jsonschema.Draft202012Validator(SCHEMA).validate(made)
    assert list(made)[:2] == ["reason", "answer"]


def batch(abcli: Command, tmp_path: Path, model: Path, *lines: dict[str, Any], flags: tuple[object, ...] = ()) -> Any:
    """The results of a batch by their id, and the warnings on standard error."""
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    outcome = abcli("batch", model, prompts, "-o", output, "-k", 1, "-s", 1, *STEADY, *flags)
    results = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    warnings = [line for line in outcome.errors.decode().splitlines() if line.startswith("warning: ")]
    return {result.get("custom_id", result.get("id")): result for result in results}, warnings


@pytest.mark.parametrize(("buckets", "temperature"), [(1, 0), (3, 1)])
def test_run_with_the_real_model(real_model: Path, abcli: Command, buckets: int, temperature: int) -> None:
    flags = ("-k", buckets, "--temp", temperature, "-s", 3, "-n", 100, "-c", 256, *STEADY)
    outcome = abcli("run", "--json", real_model, "Is water wet? Give a reason, then answer.", "-j", TEXT, *flags)
    found = json.loads(outcome.output)
    assert found["finish_reason"] == "stop"
    check(found["text"])


def test_chat_with_the_real_model(real_model: Path, abcli: Command) -> None:
    script = (
        f"/set json_schema {TEXT}\nIs water wet?\n/set regex (yes|no)!\nIs ice wet?\n/set regex\n/set predict 3\nHi.\n"
    )
    flags = ("-k", 1, "-n", 100, "-s", 3, "-c", 512, "--no-save", *STEADY)
    outcome = abcli("chat", real_model, *flags, stdin=script.encode())
    assert outcome.code == 0
    text = outcome.output.decode()
    _, end = json.JSONDecoder().raw_decode(text)
    check(text[:end])
    assert text[end:].startswith(("\nyes!\n", "\nno!\n"))


def test_batch_with_the_real_model(real_model: Path, abcli: Command, tmp_path: Path) -> None:
    settings = {"max_tokens": 100, "json_schema": SCHEMA}
    lines = [
        {"id": "greedy", "prompt": "Is water wet?", "temperature": 0, **settings},
        {"id": "sampled", "prompt": "Is ice wet?", "temperature": 1.0, **settings},
        {"id": "pattern", "prompt": "Is ice wet?", "regex": "(yes|no)!", "max_tokens": 20},
    ]
    results, warnings = batch(abcli, tmp_path, real_model, *lines, flags=("-k", 3, "-c", 256))
    check(results["greedy"]["text"])
    check(results["sampled"]["text"])
    assert results["pattern"]["text"] in ("yes!", "no!")
    assert {result["finish_reason"] for result in results.values()} == {"stop"}
    assert warnings == []


def test_every_way_to_say_it_in_a_batch(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    lines = [
        {"id": "schema", "prompt": "x", "json_schema": {"enum": ["a", "b"]}},
        {"id": "text", "prompt": "x", "json_schema": '{"const": 5}'},
        {"id": "true", "prompt": "x", "json_schema": True, "max_tokens": 0},
        {"id": "regex", "prompt": "x", "regex": "[ab]{3}"},
        {"id": "lark", "prompt": "x", "lark": 'start: "n=" %json {"enum": [1, 2]}'},
        {"id": "gbnf", "prompt": "x", "grammar": 'root ::= "g"'},
        {"id": "refused", "prompt": "x", "json_schema": {"not": {}}},
        {"id": "lenient", "prompt": "x", "json_schema": {"const": 1, "not": {}}, "lenient": True},
        {"id": "again", "prompt": "y", "json_schema": {"const": 1, "not": {}}, "lenient": True},
        {"id": "two", "prompt": "x", "regex": "a", "lark": 'start: "a"'},
        {"id": "run's own", "prompt": "x"},
    ]
    results, warnings = batch(abcli, tmp_path, tiny_model, *lines, flags=("--regex", "own"))
    texts = {name: result.get("text") for name, result in results.items()}
    assert texts["schema"] in ('"a"', '"b"')
    assert texts["text"] == "5"
    assert texts["true"] == ""
    assert re.fullmatch("[ab]{3}", texts["regex"])
    assert texts["lark"] in ("n=1", "n=2")
    assert (texts["gbnf"], texts["lenient"], texts["run's own"]) == ("g", "1", "own")
    assert "$.not" in results["refused"]["error"]["message"]
    assert "both a regular expression and a Lark grammar" in results["two"]["error"]["message"]
    assert warnings == ["warning: $.not is not enforced"]


def test_openais_response_format(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    def line(name: str, form: object, **more: object) -> dict[str, Any]:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "response_format": form, **more}
        return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}

    named = {"name": "n", "strict": True, "schema": {"const": {"a": 1}}}
    lines = [
        line("object", {"type": "json_object", "schema": {"const": {}}}),
        line("schema", {"type": "json_schema", "json_schema": named}),
        line("both", {"type": "json_object"}, json_schema={"const": 1}),
    ]
    results, _ = batch(abcli, tmp_path, tiny_model, *lines)

    def content(name: str) -> Any:
        return json.loads(results[name]["response"]["body"]["choices"][0]["message"]["content"])

    assert content("object") == {}
    assert content("schema") == {"a": 1}
    assert "both response_format and json_schema" in json.dumps(results["both"]["error"])


def test_what_is_not_enforced_is_said_once(tiny_model: Path, abcli: Command) -> None:
    schema = json.dumps({"const": 1, "not": {"const": 2}, "format": "odd"})
    refused = abcli("run", *ONE, tiny_model, "x", "-j", schema)
    assert refused.code == 1
    message, hint = refused.problem()
    assert message == "the JSON schema asks for what cannot be enforced: $.not"
    assert hint == "leave it out, or enforce the rest with --schema-lenient"
    lenient = abcli("chat", *ONE, tiny_model, "-j", schema, "--schema-lenient", "--no-save", stdin=b"x\ny\n")
    assert lenient.output == b"1\n1\n"
    assert lenient.errors.decode().splitlines() == [
        "warning: $.not is not enforced",
        'warning: the format "odd" at $.format is not checked',
    ]


def test_a_schema_that_cannot_be_used_is_told_before_the_model_is_opened(abcli: Command, tmp_path: Path) -> None:
    for flags, what in (
        (("-j", '{"allOf": [{"type": "null"}, {"type": "string"}]}'), "allows nothing"),
        (("--regex", "a("), "the regular expression cannot be used"),
        (("--lark", "start: %json {"), "is not JSON"),
        (("--regex", "a", "-j", "{}"), "both a JSON schema and a regular expression"),
    ):
        for command in (("run",), ("chat",), ("batch", tmp_path / "none.txt", "-o", tmp_path / "out")):
            outcome = abcli(command[0], "-m", tmp_path / "no-model.gguf", *command[1:], *flags, stdin=b"x")
            assert what in outcome.problem()[0]


def test_an_answer_that_is_cut_off_says_so(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("run", "--json", *ONE, tiny_model, "x", "-j", '{"type": "array", "minItems": 50}', "-n", 5)
    found = json.loads(outcome.output)
    assert found["finish_reason"] == "length"
    assert found["text"].startswith("[")


def test_the_end_of_the_document_ends_the_answer_whatever_is_ignored(tiny_model: Path, abcli: Command) -> None:
    outcome = abcli("run", "--json", *ONE, tiny_model, "x", "-j", '{"const": {"a": 1}}', "--ignore-eos", "-n", 50)
    found = json.loads(outcome.output)
    assert (json.loads(found["text"]), found["finish_reason"]) == ({"a": 1}, "stop")


def test_files(tiny_model: Path, abcli: Command, tmp_path: Path) -> None:
    path = tmp_path / "grammar.lark"
    path.write_text('start: "from a file"\n', encoding="utf-8")
    assert abcli("run", *ONE, tiny_model, "x", "--lark-file", path).text == "from a file"
