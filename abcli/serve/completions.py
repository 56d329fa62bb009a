"""OpenAI's older completions: POST /v1/completions, texts that are continued as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from starlette.responses import Response
from starlette.routing import Route

from abcli.chat.answer import Answer
from abcli.chat.asking import Asked, plain_asked
from abcli.chat.message_format import read_text
from abcli.errors import UsageError
from abcli.serve.asking import MAX_TOP_LOGPROBS, check_constraint, read_generation, read_wanted, with_seed
from abcli.serve.chat import check_length
from abcli.serve.completion_shapes import CompletionShape
from abcli.serve.fields import Fields
from abcli.serve.gathering import chunks_of, respond
from abcli.serve.problems import blaming
from abcli.serve.routing import Body, post
from abcli.serve.service import Service, Wanted

_USUAL_TOKENS = 16
_PROMPTS = "a text, a list of texts, a list of tokens or a list of such lists"


@dataclass(frozen=True)
class CompletionRequest:
    """A request, read: what is asked for each choice, the choices of one prompt after each other."""

    asked: tuple[Asked, ...]
    prompts: int
    model: str
    stream: bool
    include_usage: bool
    echo: bool
    wanted: Wanted


def routes() -> list[Route]:
    """The routes of this module."""
    return [post("/v1/completions", completions)]


async def completions(service: Service, body: Body) -> Response:
    """Continue texts."""
    request = await service.prepare(partial(read_completion, service, body))
    answers = service.answers(request.asked, request.wanted)
    logprobs = request.wanted.top is not None
    buckets, chunks = service.buckets_of(request.asked[0].generation), None
    shape = CompletionShape(service.pieces if request.echo or logprobs else (), request.model, buckets)
    prompts = [asked.tokens if request.echo else None for asked in request.asked]

    def whole(finished: list[Answer]) -> dict[str, Any]:
        parts = enumerate(zip(finished, answers, prompts, strict=True))
        choices = [shape.choice(number, *part, logprobs=logprobs) for number, part in parts]
        return shape.completion(choices, finished, request.prompts)

    if request.stream:
        kept = enumerate(zip(answers, prompts, strict=True))
        wires = [shape.chunks(number, *part, logprobs=logprobs) for number, part in kept]
        last = partial(shape.completion, [], prompts=request.prompts) if request.include_usage else None
        chunks = chunks_of(answers, wires, last=last)
    return await respond(service, answers, whole, chunks)


def read_completion(service: Service, body: Body) -> CompletionRequest:
    """A request as clients of OpenAI, llama-server and lm-eval write it; takes its time.

    Raises UsageError with the field to blame, and ContextFullError.
    """
    fields = Fields(body)
    choices = fields.whole("n", 1, 1, service.capacity)
    if fields.whole("best_of", choices, 1, service.capacity) != choices:
        raise UsageError("'best_of' is not n", "the best of several is not chosen here", setting="best_of")
    if fields.any("suffix"):
        raise UsageError("'suffix' is given", "texts are continued only at their end", setting="suffix")
    top = fields.whole("logprobs", 0, 0, MAX_TOP_LOGPROBS) if "logprobs" in fields else None
    echo = fields.flag("echo")
    generation = read_generation(fields, service)
    if generation.max_tokens < 0 and service.settings.generation.max_tokens < 0 and "max_tokens" not in fields:
        generation = replace(generation, max_tokens=_USUAL_TOKENS)
    check_constraint(fields, service, generation.sampling)
    prompts = [_tokens(service, prompt) for prompt in _prompts(fields)]
    if len(prompts) * choices > service.capacity:
        raise UsageError(
            f"'prompt' asks for {len(prompts) * choices} answers",
            f"ask for at most {service.capacity} at once",
            setting="prompt",
        )
    for tokens in prompts:
        if generation.max_tokens != 0 or len(tokens) > service.llm.context_size:
            check_length(service, tokens, "prompt")
    if top is not None or echo:
        # Made here, where it keeps nobody waiting.
        _ = service.pieces
    return CompletionRequest(
        asked=tuple(
            plain_asked(tokens, with_seed(generation, number)) for tokens in prompts for number in range(choices)
        ),
        prompts=len(prompts),
        model=fields.text("model", service.settings.alias),
        stream=fields.flag("stream"),
        include_usage=fields.inner("stream_options").flag("include_usage"),
        echo=echo,
        wanted=replace(read_wanted(fields), top=top, score=echo and top is not None),
    )


def _prompts(fields: Fields) -> list[list[Any]]:
    """The prompts of a request, each a list of texts and tokens."""
    value = fields.any("prompt")
    if isinstance(value, str):
        return [[value]]
    if not isinstance(value, list) or not value:
        raise fields.wrong("prompt", _PROMPTS)
    if all(isinstance(item, str) for item in value):
        return [[text] for text in value]
    if all(isinstance(item, list) for item in value):
        return list(value)
    return [value]


def _tokens(service: Service, prompt: Sequence[Any]) -> list[int]:
    """The tokens of one prompt, in whose texts control tokens are read as such: clients apply templates themselves."""
    size = service.llm.vocabulary_size
    found: list[int] = []
    with blaming("prompt"):
        for number, part in enumerate(prompt):
            if isinstance(part, str):
                text = read_text(part, "prompt")
                found += service.llm.tokenize(text, add_special=number == 0, parse_special=True)
            elif type(part) is int and 0 <= part < size:
                found.append(part)
            else:
                raise UsageError(f"'prompt' has {part!r:.80}", f"use texts, and tokens from 0 to {size - 1}")
        if not found:
            raise UsageError("'prompt' is empty", "give it some text")
    return found
