"""What a server tells about itself and its model, and its tokenizer."""

from __future__ import annotations

from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from abcli.errors import TemplateError, UsageError
from abcli.serve.chat import read_conversation, read_options
from abcli.serve.completion_shapes import text_of
from abcli.serve.fields import Fields
from abcli.serve.metrics import metrics_text
from abcli.serve.models import Models
from abcli.serve.problems import blaming, refused
from abcli.serve.routing import Body, JsonResponse, about, get, post, written
from abcli.serve.service import Service
from abcli.version import __version__


def routes() -> list[Route]:
    """The routes of this module."""
    return [
        *(about(path, health, is_open=True) for path in ("/health", "/v1/health")),
        *(about(path, list_models) for path in ("/v1/models", "/models")),
        about("/v1/models/{model:path}", one_model),
        about("/metrics", metrics),
        get("/props", props),
        get("/slots", slots),
        get("/tokenizer_info", tokenizer_info),
        post("/tokenize", tokenize),
        post("/detokenize", detokenize),
        post("/apply-template", apply_template),
    ]


async def health(models: Models, _request: Request) -> Response:
    """Whether the server takes requests."""
    if models.accepts:
        return JsonResponse({"status": "ok"})
    raise refused(503, "unavailable_error", "the server is stopping")


async def list_models(models: Models, _request: Request) -> Response:
    """The models that can be asked."""
    return JsonResponse({"object": "list", "data": [_model(models, name) for name in models.names]})


async def one_model(models: Models, request: Request) -> Response:
    """One model."""
    name = request.path_params["model"]
    if name not in models.names:
        raise refused(404, "not_found_error", f"there is no model {name!r:.200}", code="model_not_found")
    return JsonResponse(_model(models, name))


def _model(models: Models, name: str) -> dict[str, Any]:
    served = models.loaded.get(name)
    return {
        "id": name,
        "object": "model",
        "created": models.started,
        "owned_by": "abcli",
        "status": {"value": models.status(name)},
        **(served.description if served is not None else {}),
    }


async def props(service: Service, _request: Request) -> Response:
    """llama-server's properties: what requests that say nothing get, and the template."""
    llm, settings = service.llm, service.settings
    sampling = settings.generation.sampling
    defaults = {
        name: getattr(sampling, name)
        for name in ("seed", "temperature", "top_k", "top_p", "min_p", "typical_p", "repeat_penalty", "mirostat")
    }
    return JsonResponse(
        {
            "default_generation_settings": {
                "n_ctx": llm.context_size,
                "params": {**defaults, "n_predict": settings.generation.max_tokens},
            },
            "total_slots": service.worker.slots,
            "model_alias": settings.alias,
            # Only its name: where it lies concerns nobody.
            "model_path": llm.model.path.name,
            "chat_template": await service.prepare(partial(_template_source, service)),
            "build_info": f"abcli {__version__}",
            "abcli": service.buckets,
        }
    )


def _template_source(service: Service) -> str:
    try:
        return service.llm.template.source
    except TemplateError:
        return ""


async def slots(service: Service, _request: Request) -> Response:
    """What each slot does; nothing of what it holds."""
    if not service.settings.show_slots:
        raise refused(501, "not_supported_error", "this server does not tell of its slots")
    running = service.worker.running
    found = []
    for slot in range(service.worker.slots):
        ticket = running.get(slot)
        statistics = ticket.running.statistics if ticket is not None and ticket.running is not None else None
        found.append(
            {
                "id": slot,
                "n_ctx": service.llm.context_size,
                "is_processing": ticket is not None,
                "n_prompt_tokens": statistics.prompt_tokens if statistics is not None else 0,
                "n_decoded": statistics.completion_tokens if statistics is not None else 0,
            }
        )
    return JsonResponse(found)


async def metrics(models: Models, _request: Request) -> Response:
    """Counters of the models that write and are loaded, in the text form of Prometheus."""
    if not models.settings.show_metrics:
        raise refused(501, "not_supported_error", "this server tells no metrics")
    workers = {name: served.worker for name, served in models.loaded.items() if isinstance(served, Service)}
    text = metrics_text(workers, named=len(models.names) > 1)
    return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def tokenizer_info(service: Service, _request: Request) -> Response:
    """What lm-eval asks of a tokenizer that is elsewhere."""
    begin, end = await service.prepare(lambda: service.llm.special_texts)
    source = await service.prepare(partial(_template_source, service))
    return JsonResponse({"bos_token": begin, "eos_token": end, "pad_token": end, "chat_template": source or None})


async def tokenize(service: Service, body: Body) -> Response:
    """The tokens of a text: llama-server's `content` and `add_special`, or vLLM's `prompt` and `add_special_tokens`."""
    fields = Fields(body)
    name = fields.present("content", "prompt")
    text = fields.text(name)
    special = fields.flag(fields.present("add_special", "add_special_tokens"), default=name == "prompt")
    parse = fields.flag("parse_special", default=True)
    with_pieces = fields.flag("with_pieces")

    def read() -> dict[str, Any]:
        with blaming(name):
            tokens = service.llm.tokenize(text, add_special=special, parse_special=parse)
        found: list[Any] = list(tokens)
        if with_pieces:
            found = [{"id": token, "piece": _piece(service.pieces[token])} for token in tokens]
        return {"tokens": found, "count": len(tokens), "max_model_len": service.llm.context_size}

    found = await service.prepare(read)
    return await written(lambda: found)


def _piece(data: bytes) -> str | list[int]:
    """A text, or the bytes of what is none."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)


async def detokenize(service: Service, body: Body) -> Response:
    """The text of tokens."""

    def read() -> dict[str, Any]:
        tokens = body.get("tokens")
        size = service.llm.vocabulary_size
        if not isinstance(tokens, list) or not all(type(token) is int and 0 <= token < size for token in tokens):
            raise UsageError(f"'tokens' is no list of numbers from 0 to {size - 1}", "make it one", setting="tokens")
        text = text_of(tokens, service.pieces)
        return {"content": text, "prompt": text}

    found = await service.prepare(read)
    return await written(lambda: found)


async def apply_template(service: Service, body: Body) -> Response:
    """The text that the chat template makes of messages."""

    def render() -> str:
        messages = read_conversation(body.get("messages"))
        fields = Fields(body)
        options = read_options(fields, service.settings.options)
        opens = fields.flag("add_generation_prompt", default=True)
        with blaming("messages"):
            return service.llm.render(messages, options, add_generation_prompt=opens)

    return JsonResponse({"prompt": await service.prepare(render)})
