"""What a line asks for: settings, messages, OpenAI's requests; and why one is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.batch.jobs import BadLine, Job
from abcli.batch.reading import seed_for
from abcli.chat.options import ChatOptions, chat_options
from abcli.sampling import NATIVE_RANDOM_SEED, GenerationConfig, SamplingConfig
from tests.batch.inputs import OWN, job, jobs, openai, write


def test_settings_of_a_line(tmp_path: Path) -> None:
    record = {
        **OWN,
        "temperature": 0,
        "top_k": 3,
        "seed": 11,
        "max_tokens": 5,
        "stop": "END",
        "logit_bias": {"5": -1, "6": False},
        "dry_breakers": ["x"],
        "ignore_eos": True,
        "gate": 0.5,
        "min_p": None,
        "metadata": {"any": ["thing"]},
    }
    defaults = GenerationConfig(SamplingConfig(seed=7, min_p=0.2, grammar='root ::= "x"'), stop=("Q",))
    generation = job(write(tmp_path, [record]), defaults=defaults).generation
    assert generation.sampling == SamplingConfig(
        seed=11,
        temperature=0.0,
        top_k=3,
        min_p=0.2,
        logit_bias=((5, -1.0), (6, -float("inf"))),
        dry_breakers=("x",),
        grammar='root ::= "x"',
    )
    assert type(generation.sampling.temperature) is float
    assert (generation.max_tokens, generation.stop, generation.ignore_eos) == (5, ("END",), True)
    assert generation.gate == 0.5


def test_a_schema_of_a_line_takes_the_place_of_the_runs_grammar(tmp_path: Path) -> None:
    defaults = GenerationConfig(SamplingConfig(seed=7, grammar='root ::= "x"'))
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "null"}}}
    for value in (schema, json.dumps(schema)):
        sampling = job(write(tmp_path, [{**OWN, "json_schema": value}]), defaults=defaults).generation.sampling
        assert json.loads(sampling.json_schema) == schema
        assert list(json.loads(sampling.json_schema)["properties"]) == ["b", "a"]
        assert sampling.grammar == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"temperature": "hot"}, 'temperature is "hot"'),
        ({"temperature": True}, "temperature is true"),
        ({"temperature": 10**400}, "cannot be used"),
        ({"top_p": 2}, "`top_p` 2"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"max_tokens": -2}, "max_tokens is -2"),
        ({"max_tokens": True}, "max_tokens is true"),
        ({"gate": 2}, "`gate` 2"),
        ({"gate": True}, "`gate` True"),
        ({"stop": [1]}, "stop is 1"),
        ({"stop": [""]}, "stop string is empty"),
        ({"stop": {}}, "stop is {}"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"400": 1}}, "token 400"),
        ({"logit_bias": {"4": True}}, "bias of token 4 is true"),
        ({"json_schema": {"type": "nonsense"}}, "JSON schema"),
        ({"json_schema": "{"}, "JSON schema is not JSON"),
        ({"grammar": "root ::= missing"}, "grammar"),
        ({"grammar": 'root ::= "x"', "json_schema": {"type": "object"}}, "both a grammar and"),
        ({"prompt": ""}, "empty"),
        ({"prompt": 5}, "prompt is 5"),
        ({"prompt": "\ud800"}, "half a character"),
        ({"prompt": "a\0"}, "NUL"),
        ({"messages": []}, "both prompt and messages"),
        ({"temprature": 1}, '"temprature" is not known'),
        ({"temperature\n": 1}, "is not known"),
    ],
)
def test_lines_that_cannot_be_answered_say_why(tmp_path: Path, changes: Any, words: str) -> None:
    path = write(tmp_path, [{**OWN, **changes}, {"id": "b", "prompt": "fine"}])
    bad, good = jobs(path, vocabulary_size=300)
    assert isinstance(bad, BadLine)
    assert isinstance(good, Job)
    assert words in bad.message
    assert bad.identifier == "a"
    assert bad.hint


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "messages is []"),
        ("Hi", 'messages is "Hi"'),
        ([5], "message 1 is 5"),
        ([{"role": "user"}], "content of message 1 is missing"),
        ([{"role": "robot", "content": "x"}], 'role "robot"'),
        ([{"role": ["user"], "content": "x"}], "role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], '"image_url"'),
        ([{"role": "user", "content": ["x"]}], "part of type"),
        ([{"role": "assistant", "content": None, "tool_calls": [{}]}], "message 1 has a call"),
    ],
)
def test_messages_that_cannot_be_read_say_why(tmp_path: Path, messages: Any, words: str) -> None:
    for record in ({"messages": messages}, openai(messages=messages)):
        (bad,) = jobs(write(tmp_path, [record]))
        assert isinstance(bad, BadLine)
        assert words in bad.message


def test_an_openai_request(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    record = openai(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
                "name": "x",
            },
            {"role": "assistant", "content": "yes", "refusal": None, "tool_calls": None},
            {"role": "user", "content": "more"},
        ],
        temperature=1,
        top_p=0.5,
        max_completion_tokens=4,
        stop=["a", "b"],
        seed=3,
        frequency_penalty=0.5,
        presence_penalty=-1,
        logit_bias={"5": 2},
        response_format={"type": "json_schema", "json_schema": {"name": "n", "strict": True, "schema": schema}},
        n=1,
        stream=False,
        user="me",
        metadata={"a": "b"},
        store=True,
        logprobs=False,
        tools=[],
        tool_choice="none",
        prompt_cache_retention="24h",
        top_k=9,
    )
    found = job(write(tmp_path, [record]), defaults=GenerationConfig(SamplingConfig(seed=1)))
    assert found.identifier == "r1"
    assert found.extra == {"model": "m"}
    assert [(message.role, message.content) for message in found.messages] == [
        ("system", "Be brief."),
        ("user", "one\ntwo"),
        ("assistant", "yes"),
        ("user", "more"),
    ]
    assert found.generation == GenerationConfig(
        SamplingConfig(
            seed=3,
            temperature=1.0,
            top_p=0.5,
            top_k=9,
            frequency_penalty=0.5,
            presence_penalty=-1.0,
            logit_bias=((5, 2.0),),
            json_schema=json.dumps(schema),
        ),
        max_tokens=4,
        stop=("a", "b"),
    )


def test_openai_response_formats(tmp_path: Path) -> None:
    def schema(value: Any) -> str:
        return job(write(tmp_path, [openai(response_format=value)])).generation.sampling.json_schema

    assert schema({"type": "text"}) == ""
    assert json.loads(schema({"type": "json_object"})) == {"type": "object"}
    assert json.loads(schema({"type": "json_schema", "schema": {"const": 1}})) == {"const": 1}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (openai(n=2), "n is 2"),
        (openai(n=True), "n is true"),
        (openai(stream=True), "stream is true"),
        (openai(logprobs=True), "logprobs is true"),
        (openai(tools=[{"type": "function"}]), "tools[0].function is missing"),
        (openai(tool_choice="required"), "tool_choice=required needs tools"),
        (openai(reasoning_effort=1), "reasoning_effort is 1"),
        (openai(max_tokens=1, max_completion_tokens=2), "differ"),
        (openai(response_format={"type": "xml"}), "response_format"),
        (openai(response_format={"type": "json_schema"}), "response_format"),
        (openai(response_format="json"), '`response_format.type` is "json"'),
        (openai(model=5), "model is 5"),
        ({**openai(), "url": "/v1/embeddings"}, "/v1/embeddings"),
        ({**openai(), "method": "GET"}, "GET"),
        ({**openai(), "other": 1}, '"other" is not known'),
        ({**openai(), "body": []}, "no body"),
        ({**openai(), "body": {"model": "m"}}, "no messages"),
        ({**openai(), "custom_id": None}, "no custom_id"),
    ],
)
def test_openai_requests_that_would_be_answered_wrongly_are_refused(tmp_path: Path, record: Any, words: str) -> None:
    (bad,) = jobs(write(tmp_path, [record]), format="openai")
    assert isinstance(bad, BadLine)
    assert words in bad.message


@pytest.mark.parametrize(
    ("seed", "expected"),
    [(-1, seed_for(7, "r1")), (0, 0), (5, 5), (2**32 - 2, 2**32 - 2), (2**32 - 1, 0), (2**63 - 1, 2147483647)],
)
def test_seeds_of_openai(tmp_path: Path, seed: int, expected: int) -> None:
    assert job(write(tmp_path, [openai(seed=seed)])).generation.sampling.seed == expected


@given(seed=st.integers(-(2**63), 2**63 - 1).filter(lambda seed: seed != -1))
def test_a_seed_is_always_the_same_one_and_never_random(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    path = write(tmp_path_factory.getbasetemp(), [openai(seed=seed)], "seed")
    first, again = job(path), job(path, defaults=GenerationConfig(SamplingConfig(seed=8)))
    assert first.generation.sampling.seed == again.generation.sampling.seed
    assert 0 <= first.generation.sampling.seed < NATIVE_RANDOM_SEED


def test_texts_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path, [{"prompt": "\ufeffp", "json_schema": '\ufeff{"const": 1}'}, {"prompt": "p\ufeff"}])
    first, second = jobs(path)
    assert isinstance(first, Job)
    assert isinstance(second, Job)
    assert (first.messages[0].content, second.messages[0].content) == ("p", "p\ufeff")
    assert first.generation.sampling.json_schema == '{"const": 1}'


def test_lines_may_have_tools(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    choice = {"type": "function", "function": {"name": "f"}}
    body = {"tools": [tool], "tool_choice": choice, "parallel_tool_calls": False, "reasoning_effort": "low"}
    options = job(write(tmp_path, [openai(**body)])).options
    assert options == chat_options(body)
    assert (options.tools[0].name, options.tool_choice, options.parallel_tool_calls) == ("f", "f", False)
    assert job(write(tmp_path, [openai(**dict.fromkeys(body))])).options == ChatOptions()
    (plain,) = jobs(write(tmp_path, [{"prompt": "a", "thinking": "off"}]), options=options)
    assert isinstance(plain, Job)
    assert plain.options == replace(options, thinking="off")
