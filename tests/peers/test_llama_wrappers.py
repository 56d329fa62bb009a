"""What others build on llama_cpp.Llama, with abcli's in its place: each library's own wrapper."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import abcli

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
QUESTION = "Say hello"
DOG = {
    "type": "object",
    "properties": {"name": {"enum": ["Rex", "Ada"]}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.fixture(autouse=True)
def in_place_of_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever imports llama_cpp.Llama gets abcli's."""
    import llama_cpp

    monkeypatch.setattr(llama_cpp, "Llama", abcli.Llama)


@pytest.fixture(scope="module")
def llama(real_model: Path) -> Iterator[abcli.Llama]:
    made = abcli.Llama(str(real_model), buckets=2, n_ctx=512, verbose=False)
    yield made
    made.close()


def test_langchain(real_model: Path) -> None:
    pytest.importorskip("langchain_community", reason="langchain-community is missing")
    from langchain_community.chat_models import ChatLlamaCpp
    from langchain_community.llms import LlamaCpp
    from langchain_core.tools import tool

    settings: dict[str, Any] = {"model_path": str(real_model), "n_ctx": 512, "temperature": 0, "max_tokens": 8}
    text = LlamaCpp(**settings, model_kwargs={"buckets": 2}, verbose=False)
    assert isinstance(text.client, abcli.Llama)
    assert len(text.client.llm.bases) == 2
    whole = text.invoke(QUESTION)
    assert "".join(text.stream(QUESTION)) == whole
    assert text.get_num_tokens("Hello world") > 0
    chat = ChatLlamaCpp(**settings, model_kwargs={"buckets": 2}, verbose=False)
    answer = chat.invoke([("system", "Be brief"), ("human", QUESTION)])
    assert answer.content
    assert "".join(str(piece.content) for piece in chat.stream([("human", QUESTION)]))

    @tool
    def add(number: int) -> int:
        """Add a number."""
        return number

    forced = {"type": "function", "function": {"name": "add"}}
    calling = ChatLlamaCpp(**{**settings, "max_tokens": 60}, model_kwargs={"buckets": 2}, verbose=False)
    called = calling.bind_tools([add], tool_choice=forced).invoke("Add three")
    assert called.tool_calls[0]["name"] == "add"


def test_llama_index(real_model: Path) -> None:
    pytest.importorskip("llama_index.llms.llama_cpp", reason="llama-index-llms-llama-cpp is missing")
    from llama_index.llms import llama_cpp as wrapper

    wrapper.base.Llama = abcli.Llama
    settings: dict[str, Any] = {"model_path": str(real_model), "context_window": 512, "max_new_tokens": 8}
    model = wrapper.LlamaCPP(**settings, model_kwargs={"buckets": 2}, temperature=0, verbose=False)
    assert isinstance(model._model, abcli.Llama)
    whole = model.complete(QUESTION).text
    assert whole
    assert [piece.text for piece in model.stream_complete(QUESTION)][-1] == whole


def test_haystack(real_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("haystack_integrations.components.generators.llama_cpp", reason="llama-cpp-haystack is missing")
    from haystack.dataclasses import ChatMessage
    from haystack.tools import Tool
    from haystack_integrations.components.generators.llama_cpp import LlamaCppChatGenerator
    from haystack_integrations.components.generators.llama_cpp.chat import chat_generator

    monkeypatch.setattr(chat_generator, "Llama", abcli.Llama)
    parameters = {"type": "object", "properties": {"number": {"type": "integer"}}, "required": ["number"]}
    add = Tool(name="add", description="Add a number", parameters=parameters, function=lambda number: number)
    settings = {"max_tokens": 60, "temperature": 0}
    generator = LlamaCppChatGenerator(
        model=str(real_model), n_ctx=512, model_kwargs={"buckets": 2, "verbose": False}, generation_kwargs=settings
    )
    generator.warm_up()
    assert generator.run([ChatMessage.from_user(QUESTION)])["replies"][0].text
    forced = {"tool_choice": {"type": "function", "function": {"name": "add"}}}
    reply = generator.run([ChatMessage.from_user("Add 3")], tools=[add], generation_kwargs=forced)["replies"][0]
    assert reply.tool_calls[0].tool_name == "add"


def test_outlines(llama: abcli.Llama) -> None:
    outlines = pytest.importorskip("outlines", reason="outlines is missing")
    from typing import Literal

    model = outlines.from_llamacpp(llama)
    assert model(QUESTION, Literal["yes", "no"], max_tokens=8, temperature=0) in ("yes", "no")
    assert model(QUESTION, max_tokens=8, temperature=0)
    assert "".join(model.stream(QUESTION, max_tokens=8, temperature=0))


def test_instructor(llama: abcli.Llama) -> None:
    instructor = pytest.importorskip("instructor", reason="instructor is missing")
    from typing import Literal

    from pydantic import BaseModel

    class Dog(BaseModel, extra="forbid"):
        name: Literal["Rex", "Ada"]

    create = instructor.patch(create=llama.create_chat_completion_openai_v1, mode=instructor.Mode.JSON_SCHEMA)
    messages = [{"role": "user", "content": "Invent a dog"}]
    dog = create(messages=messages, response_model=Dog, max_tokens=60, temperature=0)
    assert dog.name in ("Rex", "Ada")


def test_openais_own_objects(llama: abcli.Llama) -> None:
    types = pytest.importorskip("openai.types.chat", reason="openai is missing")
    messages = [{"role": "user", "content": QUESTION}]
    settings: dict[str, Any] = {"max_tokens": 40, "temperature": 0}
    whole = llama.create_chat_completion_openai_v1(messages, **settings)
    assert isinstance(whole, types.ChatCompletion)
    form = {"type": "json_object", "schema": DOG}
    chunks = list(llama.create_chat_completion_openai_v1(messages, response_format=form, stream=True, **settings))
    assert all(isinstance(chunk, types.ChatCompletionChunk) for chunk in chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert json.loads(text)["name"] in ("Rex", "Ada")
