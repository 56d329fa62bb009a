"""OpenAI's chat completions: POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from abcli.chat.answer import Answer
from abcli.chat.asking import Asked, check_tools
from abcli.chat.message_format import known_fields, read_messages
from abcli.chat.messages import Message
from abcli.chat.options import ChatOptions, chat_options
from abcli.errors import ContextFullError, UsageError
from abcli.sampling import GenerationConfig
from abcli.serve.asking import check_constraint, read_chat_wanted, read_generation, with_seed
from abcli.serve.chat_shapes import ChatShape
from abcli.serve.fields import Fields
from abcli.serve.gathering import chunks_of, respond
from abcli.serve.problems import RefusedError, blaming, problem_of
from abcli.serve.routing import Body, post
from abcli.serve.service import USUAL, Answering, Service, Wanted

MAX_MESSAGES = 10_000
MAX_CHOICES = 128


@dataclass(frozen=True)
class ChatRequest:
    """A chat request, read: what is asked for each of its choices, and how the answer is wanted."""

    asked: tuple[Asked, ...]
    model: str
    stream: bool = False
    include_usage: bool = False
    wanted: Wanted = USUAL


def routes() -> list[Route]:
    """The routes of this module."""
    return [post(path, chat_completions) for path in ("/v1/chat/completions", "/chat/completions")]


async def chat_completions(service: Service, body: Body) -> Response:
    """Answer a chat request."""
    request, answers = await ask_chat(service, body)
    shape, chunks = ChatShape(service, request.model, request.asked[0].generation), None
    if request.stream:
        wires = [shape.chunks(number, request.wanted) for number in range(len(answers))]
        last = shape.usage_chunk if request.include_usage else None
        chunks = chunks_of(answers, wires, [wire.first() for wire in wires], last)

    def whole(finished: list[Answer]) -> dict[str, Any]:
        return shape.completion(finished, [answering.chosen for answering in answers], request.wanted)

    return await respond(service, answers, whole, chunks)


async def ask_chat(service: Service, body: Mapping[str, Any]) -> tuple[ChatRequest, list[Answering]]:
    """Let a chat request be answered: the request, and an answer in progress for each of its choices; close each.

    Raises what is wrong with the request before anything is computed, and RefusedError where there is no room.
    """
    request = await service.prepare(partial(read_chat, service, body))
    return request, service.answers(request.asked, request.wanted)


def read_chat(service: Service, body: Mapping[str, Any]) -> ChatRequest:
    """A chat request as clients of OpenAI and llama-server write it; takes its time.

    Raises UsageError with the field to blame, PromptError, TemplateError, GrammarError and ContextFullError.
    """
    fields = Fields(body)
    stream_options = fields.inner("stream_options")
    choices = fields.whole("n", 1, 1, min(MAX_CHOICES, service.capacity))
    wanted = read_chat_wanted(fields)
    generation = read_generation(fields, service)
    options = read_options(fields, service.settings.options)
    if wanted.top is not None:
        # Made here, where it keeps nobody waiting.
        _ = service.pieces
    asked = ask_messages(service, body.get("messages"), options, generation, fields)
    return ChatRequest(
        asked=tuple(
            Asked(asked.tokens, with_seed(asked.generation, number), asked.reader) for number in range(choices)
        ),
        model=fields.text("model", service.settings.alias),
        stream=fields.flag("stream"),
        include_usage=stream_options.flag("include_usage"),
        wanted=wanted,
    )


def read_options(fields: Fields, base: ChatOptions) -> ChatOptions:
    """What a request says to the chat template. Raises UsageError with the field to blame."""
    names = ("tool_choice", "parallel_tool_calls", "reasoning_effort", "reasoning_format", "chat_template_kwargs")
    found = {name: fields.any(name) for name in names if name in fields}
    budgets = ("thinking_budget", "thinking_budget_tokens", "reasoning_budget_tokens")
    if fields.any(*budgets) is not None:
        found["thinking_budget"] = fields.any(*budgets)
    if "enable_thinking" in fields:
        found["thinking"] = fields.flag("enable_thinking")
    if "tools" in fields:
        with blaming("tools"):
            tools = chat_options({"tools": fields.any("tools")}).tools
            check_tools(tools)
            found["tools"] = tools
    if not found.get("tools") and found.get("tool_choice") in ("auto", "none"):
        del found["tool_choice"]
    return chat_options(found, base)


def read_conversation(value: Any) -> tuple[Message, ...]:
    """The messages of a request; fields of theirs that are not known are passed over. Raises UsageError."""
    with blaming("messages"):
        if isinstance(value, list):
            if len(value) > MAX_MESSAGES:
                raise UsageError(f"there are {len(value):,} messages", f"send at most {MAX_MESSAGES:,}")
            value = list(map(known_fields, value))
        return read_messages(value)


def ask_messages(
    service: Service, value: Any, options: ChatOptions, generation: GenerationConfig, fields: Fields
) -> Asked:
    """What is asked with messages. Raises UsageError for the messages, ContextFullError."""
    messages = read_conversation(value)
    continues = read_continuing(fields, messages)
    with blaming("messages"):
        asked = service.llm.ask(messages, options, generation, continues=continues)
    check_constraint(fields, service, asked.generation.sampling)
    check_length(service, asked.tokens)
    return asked


def read_continuing(fields: Fields, messages: Sequence[Message]) -> bool:
    """Whether the last message is the beginning of the answer: where it is the assistant's, unless told otherwise."""
    is_answer = messages[-1].role == "assistant" and not messages[-1].tool_calls
    opens = fields.flag("add_generation_prompt")
    continues = fields.flag("continue_final_message", default=is_answer and not opens)
    if continues and (opens or not is_answer):
        wrong = "excludes 'add_generation_prompt'" if opens else "needs an answer to continue"
        raise UsageError(
            f"'continue_final_message' {wrong}",
            "let the last message be the assistant's, without calls, and set only one of both",
            setting="continue_final_message",
        )
    if continues and len(messages) > 1 and messages[-2].role == "assistant":
        raise UsageError("two messages of the assistant end the conversation", "join them", setting="messages")
    return continues


def check_length(service: Service, tokens: Sequence[int], field: str = "messages") -> None:
    """Raise RefusedError, which names the field, for a prompt that leaves no room for a token of an answer."""
    size = service.llm.context_size
    if len(tokens) >= size:
        raise RefusedError(replace(problem_of(ContextFullError(len(tokens), size)), param=field))
