"""What users of other servers complain of most, and what this one does.

The numbers are those of the complaints as they are told in the issues of other servers. A client that goes (1) and
short requests beside long ones (16) are tested in test_process.py, one that goes while its prompt is computed (2) in
test_worker.py.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import abcli
from abcli.config import ContextConfig, ModelConfig
from abcli.embedder import Embedder
from abcli.errors import NativeError
from abcli.serve.app import make_app
from abcli.serve.embeddings import EmbeddingService
from abcli.serve.service import Service, Settings
from tests.serve.conftest import MESSAGES, USUAL
from tests.support.tiny_gguf import write_tiny_bert

PATH = "/v1/chat/completions"
TOOL = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {"at": {"type": "string", "enum": ["sky", "sea"]}},
            "required": ["at"],
            "additionalProperties": False,
        },
    },
}
CALLING = {
    "messages": MESSAGES,
    "tools": [TOOL],
    "tool_choice": "required",
    "parallel_tool_calls": False,
    "thinking_budget_tokens": 0,
    "max_tokens": 300,
    "ignore_eos": False,
}


# Opens the thought itself, and takes a system message at the beginning only, as templates of Qwen's do.
STRICT = """
{%- for message in messages -%}
{%- if message.role == 'system' and not loop.first -%}
{{ raise_exception('System message must be at the beginning.') }}
{%- endif -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n<think>\\n' }}
{%- if enable_thinking is defined and not enable_thinking -%}{{ '\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}
"""


@pytest.fixture(scope="module")
def strict(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A client of a server whose chat template is strict, and opens thoughts."""
    template = tmp_path_factory.mktemp("templates") / "strict.jinja"
    template.write_text(STRICT, encoding="utf-8")
    with (
        abcli.load(tiny_model, buckets=1, ctx_size=512, threads=1, chat_template=str(template)) as llm,
        closing(Service(llm, USUAL)) as service,
        TestClient(make_app(service), base_url="http://localhost") as client,
    ):
        yield client


@pytest.fixture(scope="module")
def roomy(tiny_model: Path) -> Iterator[TestClient]:
    """A client of a server with room for tools, whose tokens are letters here."""
    with (
        abcli.load(tiny_model, buckets=1, ctx_size=2048, threads=1) as llm,
        closing(Service(llm, USUAL)) as service,
        TestClient(make_app(service), base_url="http://localhost") as client,
    ):
        yield client


def chunks_of(client: TestClient, **request: Any) -> list[dict[str, Any]]:
    """The chunks of a stream, without what ends it."""
    text = client.post(PATH, json={"messages": MESSAGES, **request, "stream": True}).text
    values = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [json.loads(value) for value in values if value != "[DONE]"]


def call_deltas(client: TestClient) -> list[dict[str, Any]]:
    found = [chunk["choices"][0]["delta"] for chunk in chunks_of(client, **CALLING) if chunk["choices"]]
    return [call for delta in found for call in delta.get("tool_calls", [])]


def test_03_every_delta_of_a_call_has_its_index(roomy: TestClient) -> None:
    deltas = call_deltas(roomy)
    assert deltas
    assert {delta["index"] for delta in deltas} == {0}


def test_04_calls_are_the_same_streamed_and_whole(roomy: TestClient) -> None:
    (call,) = roomy.post(PATH, json=CALLING).json()["choices"][0]["message"]["tool_calls"]
    deltas = call_deltas(roomy)
    assert "".join(delta["function"].get("arguments", "") for delta in deltas) == call["function"]["arguments"]
    assert deltas[0]["function"]["name"] == call["function"]["name"] == "look"
    assert all(chunk["choices"][0]["delta"] for chunk in chunks_of(roomy, **CALLING)[:-1])


def test_05_a_calls_name_comes_once(roomy: TestClient) -> None:
    first, *others = call_deltas(roomy)
    assert {"id", "type"} <= first.keys()
    assert not any({"id", "type"} & delta.keys() or "name" in delta["function"] for delta in others)


def test_06_the_reason_is_calls_just_where_there_are_some(roomy: TestClient) -> None:
    assert roomy.post(PATH, json=CALLING).json()["choices"][0]["finish_reason"] == "tool_calls"
    assert chunks_of(roomy, **CALLING)[-1]["choices"][0]["finish_reason"] == "tool_calls"
    cut = roomy.post(PATH, json={**CALLING, "max_tokens": 2}).json()["choices"][0]
    assert (cut["finish_reason"], cut["message"].get("tool_calls")) == ("length", None)


def test_07_a_stream_tells_the_usage_where_it_is_wanted(client: TestClient) -> None:
    *others, last = chunks_of(client, stream_options={"include_usage": True})
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 8)
    assert not any(chunk.get("usage") for chunk in others)
    assert not any(chunk.get("usage") for chunk in chunks_of(client))


def test_08_agents_learn_that_the_context_is_full(client: TestClient) -> None:
    messages = [{"role": "user", "content": "long " * 600}]
    response = client.post(PATH, json={"messages": messages, "stream": True})
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["type"]) == ("context_length_exceeded", "exceed_context_size_error")
    assert error["n_ctx"] == 512 < error["n_prompt_tokens"]
    assert "maximum context length is 512 tokens" in error["message"]


def test_09_an_error_in_the_middle_is_told(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = client.app_state["service"].llm.generator
    step, steps = generator.step, iter(range(10_000))

    def failing() -> Any:
        if next(steps) == 3:
            raise NativeError("the device is gone")
        return step()

    monkeypatch.setattr(generator, "step", failing)
    text = client.post(PATH, json={"messages": MESSAGES, "stream": True}).text
    assert "[DONE]" not in text
    assert "the device is gone" in json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]["message"]
    monkeypatch.undo()
    assert client.post(PATH, json={"messages": MESSAGES}).status_code == 200


def test_10_a_silent_stream_is_kept_alive(serving: Callable[..., TestClient]) -> None:
    request = {"messages": MESSAGES, "stream": True}
    assert ": keep-alive\n\n" in serving(ping_seconds=1e-4).post(PATH, json=request).text
    assert ": keep-alive\n\n" not in serving(ping_seconds=0).post(PATH, json=request).text


@pytest.mark.parametrize("path", ["/v1/models", "/models"])
def test_11_clients_learn_how_long_the_context_is(client: TestClient, path: str) -> None:
    (model,) = client.get(path).json()["data"]
    assert model["context_length"] == model["max_model_len"] == model["meta"]["n_ctx"] == 512
    assert model["meta"]["n_ctx_train"] > 0
    assert client.get("/props").json()["default_generation_settings"]["n_ctx"] == 512


def test_12_pages_of_this_machine_may_ask_and_others_not(serving: Callable[..., TestClient]) -> None:
    client = serving(keys=("a-secret-key",))
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    own = client.options(PATH, headers={"Origin": "http://localhost:3000", **wanted})
    assert own.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "authorization" in own.headers["access-control-allow-headers"].lower()
    other = client.options(PATH, headers={"Origin": "https://evil.example", **wanted})
    assert "access-control-allow-origin" not in other.headers
    rebound = client.get("/health", headers={"Host": "evil.example"})
    assert rebound.status_code in (400, 403, 421)


def test_13_keys_are_asked_for_as_clients_expect(serving: Callable[..., TestClient]) -> None:
    client = serving(keys=("a-secret-key",))
    assert client.get("/health").status_code == 200
    refused = client.get("/v1/models")
    assert refused.status_code == 401
    assert {"message", "type", "param", "code"} <= refused.json()["error"].keys()
    for headers in ({"Authorization": "Bearer a-secret-key"}, {"X-Api-Key": "a-secret-key"}):
        assert client.get("/v1/models", headers=headers).status_code == 200
    assert serving().get("/v1/models", headers={"Authorization": "Bearer whatever"}).status_code == 200


def test_14_roles_in_any_order_are_understood(strict: TestClient) -> None:
    late = [*MESSAGES, {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Now?"}]
    told = strict.post("/apply-template", json={"messages": late})
    assert told.status_code == 200
    assert all(message["content"] in told.json()["prompt"] for message in late)
    assert strict.post(PATH, json={"messages": late}).status_code == 200
    told = strict.post("/apply-template", json={"messages": [{"role": "developer", "content": "Be brief."}, *MESSAGES]})
    assert told.json()["prompt"].startswith("<|im_start|>system\nBe brief.")
    wrong = strict.post(PATH, json={"messages": [*MESSAGES, {"role": "critic", "content": "x"}]})
    assert wrong.status_code == 400
    assert "message 2" in wrong.json()["error"]["message"]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_15_both_names_of_the_limit_count(client: TestClient, name: str) -> None:
    answer = client.post(PATH, json={"messages": MESSAGES, name: 3}).json()
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["finish_reason"] == "length"


def test_15_without_a_limit_an_answer_may_fill_the_context(serving: Callable[..., TestClient]) -> None:
    endless = replace(USUAL.generation, max_tokens=-1)
    answer = serving(generation=endless).post(PATH, json={"messages": MESSAGES}).json()
    assert answer["usage"]["total_tokens"] >= 512
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("thinks", "written", "reasoning", "content"),
    [
        (True, "I wonder.\n</think>\n\nSo be it.", "I wonder.", "So be it."),
        (True, "I wonder.</think>So be it.<think>Or not.</think>", "I wonder.Or not.", "So be it."),
        (False, "So be it.", None, "So be it."),
    ],
)
def test_17_thoughts_are_told_apart(
    strict: TestClient, thinks: bool, written: str, reasoning: str | None, content: str
) -> None:
    request = {
        "grammar": f"root ::= {json.dumps(written)}",
        "enable_thinking": thinks,
        "max_tokens": 200,
        "ignore_eos": False,
    }
    message = strict.post(PATH, json={"messages": MESSAGES, **request}).json()["choices"][0]["message"]
    assert (message.get("reasoning_content"), message["content"]) == (reasoning, content)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(strict, **request)]
    for name, whole in (("reasoning_content", reasoning), ("content", content)):
        assert "".join(delta.get(name) or "" for delta in deltas) == (whole or "")


def test_18_embeddings_come_in_base64_as_openais_client_wants_them(tmp_path: Path) -> None:
    path = write_tiny_bert(tmp_path / "bert.gguf")
    with (
        Embedder(ModelConfig(path), ContextConfig(threads=1, flash_attention="off")) as embedder,
        closing(EmbeddingService(embedder, Settings("bert"))) as service,
        TestClient(make_app(service), base_url="http://localhost") as client,
    ):
        plain, packed = (
            client.post("/v1/embeddings", json={"input": "hello world", "encoding_format": form}).json()
            for form in ("float", "base64")
        )
    numbers = np.frombuffer(base64.b64decode(packed["data"][0]["embedding"]), "<f4")
    assert numbers.tolist() == pytest.approx(plain["data"][0]["embedding"])
    assert packed["usage"]["prompt_tokens"] == packed["usage"]["total_tokens"] > 0


def test_19_a_prompts_tokens_are_told_with_how_likely_they_are(client: TestClient) -> None:
    request = {"prompt": "Hello", "echo": True, "logprobs": 1, "max_tokens": 1}
    answer = client.post("/v1/completions", json=request).json()
    logprobs = answer["choices"][0]["logprobs"]["token_logprobs"]
    assert len(logprobs) == answer["usage"]["prompt_tokens"] + 1
    assert logprobs[0] is None
    assert all(logprob < 0 for logprob in logprobs[1:])


def test_20_what_was_said_is_not_computed_again(client: TestClient) -> None:
    first = client.post(PATH, json={"messages": MESSAGES}).json()
    said = first["choices"][0]["message"]["content"]
    more = [*MESSAGES, {"role": "assistant", "content": said}, {"role": "user", "content": "And?"}]
    second = client.post(PATH, json={"messages": more}).json()
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] - 4
