"""A real model behind the server says what it says in the library."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from starlette.testclient import TestClient

import abcli
from abcli.sampling import GenerationConfig, SamplingConfig
from abcli.serve.app import make_app
from abcli.serve.service import Service, Settings

PATH = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Name three rivers of Europe, and say which of them is the longest."}]
TOKENS = 16
CITY = {"type": "string", "enum": ["Bonn", "Rome"]}
PARAMETERS = {"type": "object", "properties": {"city": CITY}, "required": ["city"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": PARAMETERS}}


class Both(NamedTuple):
    """A model, and a client of a server of it."""

    llm: abcli.LLM
    client: TestClient


@pytest.fixture(scope="module", params=[1, 6])
def both(real_model: Path, common_home: Path, request: pytest.FixtureRequest) -> Iterator[Both]:
    engine = "contexts" if request.param == 1 else "fused"
    greedy = GenerationConfig(SamplingConfig(temperature=0), max_tokens=TOKENS)
    with (
        abcli.load(real_model, buckets=request.param, slots=2, ctx_size=1024, threads=1, engine=engine) as llm,
        closing(Service(llm, Settings("smol", greedy))) as service,
        TestClient(make_app(service), base_url="http://localhost") as client,
    ):
        yield Both(llm, client)


def asked(client: TestClient, **fields: Any) -> Any:
    response = client.post(PATH, json={"messages": MESSAGES, "cache_prompt": False, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_greedy_answer_is_the_librarys(both: Both) -> None:
    expected = both.llm.generate(MESSAGES, temperature=0, max_tokens=TOKENS)
    answer = asked(both.client)
    assert answer["choices"][0]["message"]["content"] == expected.text != ""
    assert answer["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert answer["usage"]["completion_tokens"] == expected.usage.completion_tokens
    assert answer["abcli"]["bases"] == list(both.llm.bases)
    assert answer["abcli"]["agreement"] == pytest.approx(expected.agreement, abs=1e-6)


def test_log_probabilities_are_those_of_the_merged_distribution(both: Both) -> None:
    told = asked(both.client, logprobs=True, top_logprobs=1)["choices"][0]["logprobs"]["content"]
    tokens = [item["id"] for item in told]
    prompt = both.llm.tokenize(both.llm.render(MESSAGES), add_special=False, parse_special=True)
    (scores,) = both.llm.score([(prompt, tokens)])
    assert len(tokens) == TOKENS
    assert [item["logprob"] for item in told] == pytest.approx([score.log_probability for score in scores], abs=1e-3)
    if len(both.llm.bases) > 1:
        alone = asked(both.client, logprobs=True, abcli={"buckets": 1})["choices"][0]["logprobs"]["content"]
        assert alone[0]["logprob"] != pytest.approx(told[0]["logprob"], abs=1e-2)


def test_a_call_that_is_required_can_be_read(both: Both) -> None:
    only = {"tool_choice": "required", "parallel_tool_calls": False}
    (choice,) = asked(both.client, tools=[TOOL], **only, max_tokens=120)["choices"]
    assert choice["finish_reason"] == "tool_calls"
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["city"] in CITY["enum"]
