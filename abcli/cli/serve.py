"""`abcli serve`: a model with its buckets for everything that speaks OpenAI's protocol."""

from __future__ import annotations

import logging
import sys
from contextlib import closing
from dataclasses import replace
from typing import Annotated

import typer

from abcli.batch.slots import plan_slots
from abcli.cli._options import ModelOptions, ProfiledBucketOptions
from abcli.cli._serve_options import AddressOptions, ServingOptions, UsualSampling, UsualThoughts
from abcli.cli._setup import opened, prepared
from abcli.errors import UsageError
from abcli.sampling import check_sampling
from abcli.ui.terminal import Terminal

_MOST_AUTOMATIC = 4


def serve(
    model_name: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Model file or name (default: the default model).")
    ] = None,
    *,
    address_options: AddressOptions,
    serving_options: ServingOptions,
    model_options: ModelOptions,
    bucket_options: ProfiledBucketOptions,
    sampling: UsualSampling,
    thoughts: UsualThoughts,
) -> None:
    """Serve a model: parse, load, listen, answer until told to end."""
    try:
        from abcli.serve.app import make_app
        from abcli.serve.guard import Access, is_loopback
        from abcli.serve.run import listen
        from abcli.serve.run import serve as serve_on
        from abcli.serve.service import Service, Settings
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise UsageError(
            f"abcli serve needs {error.name}, which is not installed", "pip install 'abcli[serve]'"
        ) from None

    terminal = Terminal()
    keys = address_options.keys()
    if not (is_loopback(address_options.host) or keys or address_options.allow_anyone):
        raise UsageError(
            f"--host {address_options.host} lets other machines ask",
            "give --api-key or --api-key-file, or --allow-anyone if that is meant",
        )
    generation = sampling.config(bucket_options.threshold())
    options = thoughts.options()
    wanted = serving_options.wanted_slots()
    listening = listen(address_options.host, address_options.port)
    with closing(listening):
        found = prepared(terminal, model_name, model_options, bucket_options)
        plan = plan_slots(wanted, found, _MOST_AUTOMATIC if wanted is None else None)
        terminal.note(plan.text(found.context.context_size, len(found.buckets.bases)))
        own = replace(found, context=replace(found.context, slots=plan.slots))
        with opened(terminal, own, model_options) as llm:
            check_sampling(generation.sampling, llm.vocabulary_size)
            settings = Settings(
                alias=address_options.alias or found.model.path.stem,
                generation=generation,
                options=options,
                queue=serving_options.queue,
                seconds=serving_options.timeout,
                ping_seconds=serving_options.sse_ping,
                show_slots=serving_options.slots,
                show_metrics=serving_options.metrics,
            )
            _log(requests=serving_options.log_requests)
            with closing(Service(llm, settings)) as service:
                names = (*(address_options.allowed_host or ()), address_options.host)
                access = Access(names, tuple(address_options.cors_origin or ()))
                app = make_app(service, keys=keys, access=access)
                host, port = listening.getsockname()[:2]
                place = f"http://{f'[{host}]' if ':' in host else host}:{port}"
                serve_on(
                    app, service.worker, listening, lambda: terminal.note(f"{settings.alias} is served at {place}")
                )


def _log(*, requests: bool) -> None:
    """Let the server's lines go to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("abcli.serve", logging.INFO if requests else logging.WARNING), ("uvicorn", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
