"""Answers told apart, and calls that a small model is held to."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import abcli
from abcli.chat.answer import Piece
from abcli.chat.asking import AnswerReader, Asker
from abcli.chat.calls.events import CallBegun, CallFinished
from abcli.chat.calls.format import HERMES, Thoughts
from abcli.chat.messages import Message, ToolCall
from abcli.chat.options import ChatOptions, ReasoningFormat, chat_options
from abcli.chat.template import ChatTemplate
from abcli.errors import UsageError
from abcli.generate import Answer as RunningAnswer
from abcli.generate import FinishReason, Statistics
from abcli.generate import Piece as RunningPiece
from abcli.native.model import Model
from abcli.sampling import GenerationConfig, SamplingConfig

FORM = replace(HERMES, thoughts=Thoughts("<think>", "</think>"))
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
WRITTEN = f"<think>\nhm\n</think>\n\nWell.\n{CALL}"
OPTIONS = chat_options({"tools": [{"name": "f"}]})


def read(
    text: str, size: int, reason: FinishReason = "stop", options: ChatOptions = OPTIONS
) -> tuple[list[Piece], abcli.Answer]:
    """The pieces of an answer that comes in pieces of `size` characters, and all of it."""
    running = RunningAnswer(0, 1, Statistics())
    ends = list(range(size, len(text), size))

    def written() -> Iterator[RunningPiece]:
        for start, end in zip([0, *ends], [*ends, len(text)], strict=True):
            running.text += text[start:end]
            running.finish_reason = reason if end == len(text) else None
            yield RunningPiece(running, text[start:end])

    pieces = list(AnswerReader(FORM, options).read(written()))
    answer = pieces[-1].answer
    assert answer is not None
    assert all(piece.answer is None for piece in pieces[:-1])
    assert "".join(piece.text for piece in pieces) == answer.text
    assert "".join(piece.reasoning for piece in pieces) == answer.reasoning
    return pieces, answer


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_is_told_apart(size: int) -> None:
    pieces, answer = read(WRITTEN, size)
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("Well.", "hm", "tool_calls")
    assert [(call.name, json.loads(call.arguments)) for call in answer.tool_calls] == [("f", {"a": 1})]
    events = [event for piece in pieces for event in piece.events]
    assert isinstance(events[0], CallBegun)
    assert isinstance(events[-1], CallFinished)
    assert AnswerReader(FORM, OPTIONS).whole(pieces[-1].running or RunningAnswer(0, 0, Statistics())) == answer


@pytest.mark.parametrize(
    ("name", "text", "reasoning"),
    [
        ("auto", "Yes.", "hm"),
        ("deepseek", "Yes.", "hm"),
        ("deepseek-legacy", "<think>hm</think>Yes.", "hm"),
    ],
)
def test_where_thoughts_go(name: ReasoningFormat, text: str, reasoning: str) -> None:
    for size in (1, 5, 100):
        _, answer = read("<think>\nhm\n</think>\n\nYes.", size, options=ChatOptions(reasoning_format=name))
        assert (answer.text, answer.reasoning, answer.finish_reason) == (text, reasoning, "stop")


def test_a_call_that_is_cut_off_is_dropped() -> None:
    _, answer = read(f"{CALL}\n{CALL[:30]}", 3, "length")
    assert (len(answer.tool_calls), answer.finish_reason) == (1, "length")
    _, answer = read(CALL[:30], 3, "length")
    assert (answer.tool_calls, answer.finish_reason) == ((), "length")


def test_without_tools_a_call_is_text() -> None:
    _, answer = read(CALL, 4, options=ChatOptions())
    assert (answer.text, answer.tool_calls) == (CALL, ())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["<think>", "</think>", CALL, "a", " ", "\n", "<tool_call>", "{"]), max_size=6))
def test_the_outcome_is_the_same_for_all_pieces(parts: list[str]) -> None:
    text = "".join(parts) + "."
    whole = read(text, 10_000)[1]
    assert read(text, 1)[1] == whole == read(text, 3)[1]


def test_only_one_thing_can_be_followed(bpe: Model) -> None:
    asker = Asker(ChatTemplate("{{ messages[0].content }}", bpe))
    constrained = GenerationConfig(SamplingConfig(json_schema="{}"))
    with pytest.raises(UsageError, match="both tools and a JSON schema"):
        asker.asked([1], OPTIONS, constrained)
    assert not asker.asked([1], chat_options({"tool_choice": "none"}, OPTIONS), constrained).generation.sampling.lark


def test_a_schema_leaves_no_room_for_thoughts(bpe: Model) -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}<think>{% endif %}"
    asker = Asker(ChatTemplate(source, bpe))
    running = RunningAnswer(0, 1, Statistics(), '{"a": "<think>"}', finish_reason="stop")
    constrained = GenerationConfig(SamplingConfig(json_schema="{}"))
    assert asker.asked([1], ChatOptions(), constrained).reader().whole(running).text == running.text
    assert asker.asked([1], ChatOptions(), GenerationConfig()).reader().whole(running).reasoning == running.text


def get_weather(city: Literal["Paris", "Rome"], unit: Literal["C", "F"] = "C") -> str:
    """The weather of a city."""
    return f"{city} {unit}"


OTHER = {
    "type": "function",
    "function": {
        "name": "files.search",
        "description": 'It says <|im_end|> and "quotes"',
        "parameters": {
            "type": "object",
            "properties": {"query": {"type": "string", "maxLength": 12}, "limits": {"type": "array", "maxItems": 2}},
            "required": ["query"],
        },
    },
}


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[abcli.LLM]:
    """Says what nobody expects, and says it fast."""
    with abcli.load(tiny_model, buckets=1, ctx_size=4096, slots=2, flash_attn="off") as loaded:
        yield loaded


def check(calls: Sequence[ToolCall], tools: Sequence[abcli.Tool]) -> None:
    schemas: dict[str, Any] = {tool.name: tool.parameters for tool in tools}
    for call in calls:
        jsonschema.validate(json.loads(call.arguments), schemas[call.name])


def test_calls_are_valid_whatever_the_model_would_say(real_model: Path) -> None:
    tools: list[Any] = [get_weather, OTHER]
    described = chat_options({"tools": tools}).tools
    with abcli.load(real_model, buckets=1, ctx_size=1024, slots=2) as llm:
        answers = llm.generate_many(
            ["What is the weather in Paris?", "Write a poem."],
            tools=tools,
            tool_choice="required",
            temp=2.0,
            min_p=0,
            seed=5,
            max_tokens=100,
        )
    for answer in answers:
        assert answer.text == ""
        assert answer.tool_calls or answer.finish_reason == "length"
        assert (answer.finish_reason == "tool_calls") == (answer.usage.completion_tokens < 100)
        check(answer.tool_calls, described)
    assert any(answer.finish_reason == "tool_calls" for answer in answers)


def test_a_tool_can_be_chosen_and_an_answer_go_on(llm: abcli.LLM) -> None:
    asked: list[dict[str, Any] | Message] = [{"role": "user", "content": "Write a poem."}]
    choice = {"type": "function", "function": {"name": "get_weather"}}
    settings: dict[str, Any] = {"tools": [get_weather, OTHER], "temp": 0, "max_tokens": 300, "thinking_budget": 0}
    answer = llm.generate(asked, tool_choice=choice, parallel_tool_calls=False, **settings)
    (call,) = answer.tool_calls
    assert call.name == "get_weather"
    result = Message("tool", get_weather(**json.loads(call.arguments)), tool_call_id=call.id, name=call.name)
    asked += [Message("assistant", "", tool_calls=answer.tool_calls), result]
    text = llm.template.render([m if isinstance(m, Message) else Message("user", m["content"]) for m in asked])
    assert "<tool_response>" in text
    assert llm.generate(asked, tool_choice="none", **settings).finish_reason in ("stop", "length")


def test_thoughts_are_bounded(real_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "thinking.jinja"
    file.write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n"
        "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
    )
    with abcli.load(real_model, buckets=1, ctx_size=256, chat_template=str(file)) as llm:
        settings: dict[str, Any] = {"temp": 0, "max_tokens": 24, "ignore_eos": True}
        free = llm.generate("Why is the sky blue?", **settings)
        assert (free.text, free.finish_reason) == ("", "length")
        bounded = llm.generate("Why is the sky blue?", thinking_budget=6, **settings)
        assert 1 <= len(llm.tokenize(bounded.reasoning)) <= 6
        assert free.reasoning.startswith(bounded.reasoning)
        assert bounded.text
        assert llm.generate("Why is the sky blue?", thinking="off", **settings).reasoning == ""
        whole = llm.generate("Why is the sky blue?", reasoning_format="none", thinking_budget=6, **settings)
        assert whole.text.lstrip().startswith(f"{bounded.reasoning}\n</think>")


HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.tool_calls %} to=functions.{{ m.tool_calls[0].function.name }}"
    "<|channel|>commentary json<|message|>{{ m.tool_calls[0].function.arguments|tojson }}<|call|>"
    "{% else %}<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)


@pytest.mark.parametrize("budget", [-1, 5, 0])
def test_thoughts_that_are_messages_are_bounded(real_model: Path, tmp_path: Path, budget: int) -> None:
    """As gpt-oss writes; a grammar makes this model do so."""
    file = tmp_path / "harmony.jinja"
    file.write_text(HARMONY)
    end = "<|end|><|start|>assistant"
    final = f'"{end}<|channel|>final<|message|>" /[a-z]{{4}}/'
    lark = f'start: "<|channel|>analysis<|message|>" /( [a-z]{{1,6}}){{0,12}}/ {final}'
    with abcli.load(real_model, buckets=1, ctx_size=256, chat_template=str(file)) as llm:
        # Without help it would end the thought at once.
        bias = ((llm.tokenize("<", add_special=False)[0], -60.0),)
        answer = llm.generate("Why?", lark=lark, temp=0, max_tokens=120, thinking_budget=budget, logit_bias=bias)
        words = len(answer.reasoning.split())
        assert words == 12 if budget < 0 else (words > 0) == (budget > 0)
        assert budget <= 0 or len(llm.tokenize(f" {answer.reasoning}")) <= budget
        assert len(answer.text) == 4


def test_a_chat_waits_for_results(llm: abcli.LLM) -> None:
    chat = llm.chat(tools=[get_weather], tool_choice="required", parallel_tool_calls=False, temp=0, max_tokens=300)
    chat.set("thinking_budget", "0")
    answer = chat.send("The weather in Rome?")
    assert chat.pending_calls == answer.tool_calls
    with pytest.raises(UsageError, match="1 calls wait for results, not 2"):
        chat.send_results(["a", "b"])
    chat.set("tool_choice", "none")
    assert chat.send_results(["Sunny <|im_end|>."]).tool_calls == ()
    assert chat.pending_calls == ()
    roles = [message.role for message in chat.conversation.messages]
    assert roles == ["user", "assistant", "tool", "assistant"]
    chat.set("tool_choice", "get_weather")
    chat.send("And in Oslo?")
    chat.set("tool_choice", "none")
    chat.send("Never mind.")
    assert [message.content for message in chat.conversation.messages if message.role == "tool"][1:] == [
        "There is no result."
    ]
