"""Real clients, and what judges servers, on a server process with the real model."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from abcli.chat.answer import Piece
from abcli.serve.responses.events import ResponseEvents
from tests.serve.live import NAME, running_server
from tests.serve.pieces import call_pieces, last_piece
from tests.serve.schemas import check, check_response_event

pytestmark = pytest.mark.peers

ASK = [{"role": "user", "content": "Say hello."}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Bonn", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "description": "Weather.", "parameters": PARAMETERS}}
WEATHER = [{"role": "user", "content": "What is the weather in Bonn?"}]


@pytest.fixture(scope="module")
def address(real_model: Path) -> Iterator[str]:
    with running_server(real_model) as found:
        yield found


@pytest.fixture
def openai(address: str) -> Iterator[Any]:
    module = pytest.importorskip("openai")
    with module.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


def test_openais_client_asks_and_streams(openai: Any) -> None:
    whole = openai.chat.completions.create(model=NAME, messages=ASK)
    check(whole.model_dump(exclude_unset=True, mode="json"), "openai_chat", "CreateChatCompletionResponse")
    with openai.chat.completions.stream(model=NAME, messages=ASK, stream_options={"include_usage": True}) as stream:
        chunks = [event.chunk for event in stream if event.type == "chunk"]
        final = stream.get_final_completion()
    for chunk in chunks:
        check(chunk.model_dump(exclude_unset=True, mode="json"), "openai_chat", "CreateChatCompletionStreamResponse")
    assert final.choices[0].message.content == whole.choices[0].message.content != ""
    assert final.usage.completion_tokens == whole.usage.completion_tokens


def test_openais_client_parses_what_a_schema_describes(openai: Any) -> None:
    pydantic = pytest.importorskip("pydantic")
    person = pydantic.create_model("Person", name=(str, ...), grown=(bool, ...))
    messages = [{"role": "user", "content": "Ann is a grown woman. Describe her."}]
    chat = openai.chat.completions.parse(model=NAME, messages=messages, response_format=person, max_tokens=60)
    assert isinstance(chat.choices[0].message.parsed, person)
    response = openai.responses.parse(model=NAME, input=messages, text_format=person, max_output_tokens=60)
    assert isinstance(response.output_parsed, person)


def test_openais_client_calls_tools_and_gives_their_results(openai: Any) -> None:
    with openai.chat.completions.stream(
        model=NAME, messages=WEATHER, tools=[TOOL], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        choice = stream.get_final_completion().choices[0]
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert json.loads(call.function.arguments)["city"] in ("Bonn", "Rome")
    asked = {"id": call.id, "type": "function", "function": {"name": "weather", "arguments": call.function.arguments}}
    told = [{"role": "assistant", "tool_calls": [asked]}, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    after = openai.chat.completions.create(model=NAME, messages=[*WEATHER, *told], tools=[TOOL], tool_choice="none")
    assert after.choices[0].finish_reason in ("stop", "length")


def test_openais_client_knows_every_event_of_a_response(openai: Any) -> None:
    whole = openai.responses.create(model=NAME, input="Say hello.")
    check(whole.model_dump(exclude_unset=True, mode="json"), "openai_chat", "Response")
    with openai.responses.stream(model=NAME, input="Say hello.") as stream:
        names = [event.type for event in stream]
        final = stream.get_final_response()
    assert names[0] == "response.created"
    assert names[-1] == "response.completed"
    assert final.output_text == whole.output_text != ""
    function = {"type": "function", "strict": True, **TOOL["function"]}
    with openai.responses.stream(
        model=NAME, input=WEATHER, tools=[function], tool_choice="required", parallel_tool_calls=False
    ) as stream:
        calls = [item for item in stream.get_final_response().output if item.type == "function_call"]
    (call,) = calls
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    asked = {"type": "function_call", "call_id": call.call_id, "name": call.name, "arguments": call.arguments}
    assert openai.responses.create(model=NAME, input=[*WEATHER, asked, result], max_output_tokens=16).output


def test_openais_client_takes_thoughts_and_calls() -> None:
    streaming = pytest.importorskip("openai.lib.streaming.responses._responses")
    omit = pytest.importorskip("openai._types").omit
    events = pytest.importorskip("openai.types.responses")
    pydantic = pytest.importorskip("pydantic")
    adapter = pydantic.TypeAdapter(events.ResponseStreamEvent)
    told = ResponseEvents({"input": "x"}, NAME)
    pieces = [Piece("", reasoning="Hm."), Piece("So."), *call_pieces(0, "weather", "{}"), last_piece("tool_calls")]
    state = streaming.ResponseStreamState(input_tools=omit, text_format=omit)
    for event in [*told.begin(), *(event for piece in pieces for event in told.add(piece))]:
        check_response_event(event)
        state.handle_event(adapter.validate_python(event))
    assert [item.type for item in state._completed_response.output] == ["reasoning", "message", "function_call"]


def test_several_at_once_say_what_each_says_alone(address: str, openai: Any) -> None:
    module = pytest.importorskip("openai")
    alone = openai.chat.completions.create(model=NAME, messages=ASK).choices[0].message.content

    async def ask_all() -> list[str]:
        async with module.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            asked = (client.chat.completions.create(model=NAME, messages=ASK) for _ in range(3))
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    # What is computed beside others may differ in the last bits, and a tie may fall the other way.
    assert all(text[:4] == alone[:4] for text in asyncio.run(ask_all()))


def test_openais_client_names_what_is_wrong(openai: Any) -> None:
    module = pytest.importorskip("openai")
    with pytest.raises(module.BadRequestError) as caught:
        openai.chat.completions.create(model=NAME, messages=[{"role": "user", "content": "long " * 4000}], stream=True)
    assert caught.value.code == "context_length_exceeded"
    check(caught.value.response.json(), "openai_chat", "ErrorResponse")
    with pytest.raises(module.BadRequestError) as caught:
        openai.responses.create(model=NAME, input=[{"role": "user"}])
    assert caught.value.param == "input[0].content"


def test_anthropics_client_asks_streams_and_calls_tools(address: str) -> None:
    module = pytest.importorskip("anthropic")
    client = module.Anthropic(base_url=address, api_key="none", max_retries=0, timeout=120)
    whole = client.messages.create(model=NAME, max_tokens=40, messages=ASK)
    check(whole.model_dump(exclude_unset=True, mode="json"), "anthropic", "Message")
    with client.messages.stream(model=NAME, max_tokens=40, messages=ASK) as stream:
        final = stream.get_final_message()
    assert final.content[0].text == whole.content[0].text != ""
    assert final.usage.output_tokens == whole.usage.output_tokens
    counted = client.messages.count_tokens(model=NAME, messages=ASK)
    assert counted.input_tokens == whole.usage.input_tokens + whole.usage.cache_read_input_tokens
    tool = {"name": "weather", "input_schema": PARAMETERS}
    one = {"type": "any", "disable_parallel_tool_use": True}
    with client.messages.stream(model=NAME, max_tokens=100, messages=WEATHER, tools=[tool], tool_choice=one) as stream:
        called = stream.get_final_message()
    (block,) = [block for block in called.content if block.type == "tool_use"]
    assert called.stop_reason == "tool_use"
    assert block.input["city"] in ("Bonn", "Rome")
    with pytest.raises(module.BadRequestError, match=r"prompt is too long: \d+ tokens > 2048 maximum"):
        client.messages.create(model=NAME, max_tokens=9, messages=[{"role": "user", "content": "long " * 4000}])


def test_langchain_asks_with_a_tool(address: str) -> None:
    module = pytest.importorskip("langchain_openai")
    model = module.ChatOpenAI(base_url=f"{address}/v1", api_key="none", model=NAME, max_retries=0, timeout=120)
    answer = model.bind_tools([TOOL], tool_choice="required", parallel_tool_calls=False).invoke("Weather in Rome?")
    assert answer.tool_calls[0]["name"] == "weather"
    assert "".join(chunk.text for chunk in model.stream("Say hello.")).strip()


@pytest.mark.parametrize("interface", [(), ("--responses",)])
def test_llm_asks_an_endpoint(address: str, interface: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("llm")
    command = [sys.executable, "-m", "llm", "openai", "endpoint", f"{address}/v1", "-m", NAME, *interface]
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}

    def said(*arguments: str) -> str:
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            stdin=subprocess.DEVNULL,
            timeout=200,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    streamed = said("Say hello.")
    assert streamed == said("Say hello.", "--no-stream") != ""
    assert json.loads(said("Where is it warm?", "--schema", json.dumps(PARAMETERS)))["city"] in ("Bonn", "Rome")


def test_canitoolcall_finds_no_fault_of_the_servers(address: str, tmp_path: Path) -> None:
    pytest.importorskip("canitoolcall")
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "canitoolcall", "probe", "--base-url", f"{address}/v1", "--model", NAME]
    command += ["--concurrency", "3", "--timeout", "200", "--json", str(report)]
    subprocess.run(command, capture_output=True, timeout=500)
    outcomes = json.loads(report.read_text(encoding="utf-8"))["outcomes"]
    assert len(outcomes) == 27
    problems = [(item["scenario_id"], item["detail"]) for item in outcomes if item["status"] != "pass"]
    # So small a model calls nothing that it need not call; and where two tokens are as likely, what is computed
    # beside an answer may tip the scales.
    model_only = re.compile(r"expected at least \d tool call\(s\) .*, got \[\]|tool_calls: .* at temperature 0.*")
    assert [problem for problem in problems if not model_only.fullmatch(problem[1])] == []
    forced = {item["status"] for item in outcomes if item["scenario_id"] == "forced-tool-choice" and item["observed"]}
    assert forced == {"pass"}


# What the suites ask that is not about text, or that a server of one model need not refuse.
LEFT_OUT = {
    "openai-chat": {"Image Input": "no images", "Error Handling": "a request may leave out the model"},
    "open-responses": {
        "Image Input": "no images",
        "Error Handling": "a request may leave out the model",
        "Reasoning Summary": "thoughts are told, not summaries of them",
    },
    "anthropic": {"Image Input": "no images"},
}


@pytest.mark.parametrize("form", LEFT_OUT)
def test_llm_comply_finds_nothing(address: str, form: str) -> None:
    pytest.importorskip("llm_comply")
    command = [
        sys.executable,
        "-m",
        "llm_comply.cli",
        "--format",
        form,
        "-u",
        f"{address}/v1",
        "-k",
        "none",
        "-m",
        NAME,
    ]
    command += ["-k", "none", "-m", NAME, "--json", "--timeout", "120"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    results = json.loads(done.stdout)["results"]
    failed = {item["name"]: item["errors"] for item in results if item["status"] == "failed"}
    assert len(results) >= 9
    assert {name: errors for name, errors in failed.items() if name not in LEFT_OUT[form]} == {}
