"""`abcli serve`: a model with its buckets for everything that speaks OpenAI's protocol."""

from __future__ import annotations

import logging
import sys
from asyncio import CancelledError
from contextlib import closing
from functools import partial
from typing import Annotated

import typer

from abcli.chat.sandbox import CompiledTemplate
from abcli.chat.template import template_source
from abcli.cli._options import ProfiledBucketOptions, RunningOptions
from abcli.cli._serve_options import AddressOptions, ServingOptions, UsualSampling, UsualThoughts
from abcli.cli._served_models import Loading, ServedModelOptions
from abcli.errors import UsageError
from abcli.ui.terminal import Terminal


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="Files or names of models (default: the default model)."),
    ] = None,
    *,
    address_options: AddressOptions,
    serving_options: ServingOptions,
    served_models: ServedModelOptions,
    running_options: RunningOptions,
    bucket_options: ProfiledBucketOptions,
    sampling: UsualSampling,
    thoughts: UsualThoughts,
) -> None:
    """Serve models: parse, load, listen, answer until told to end."""
    try:
        from abcli.serve.app import make_app
        from abcli.serve.models import Models
        from abcli.serve.run import address_of, listen
        from abcli.serve.run import serve as serve_on
    except ModuleNotFoundError as error:
        if error.name not in ("starlette", "uvicorn"):
            raise
        raise UsageError(
            f"abcli serve needs {error.name}, which is not installed", "pip install 'abcli[serve]'"
        ) from None

    terminal = Terminal()
    keys = address_options.keys()
    settings = serving_options.settings(sampling.config(bucket_options.threshold()), thoughts.options())
    slots = serving_options.wanted_slots()
    names = served_models.names(models or ())
    listening = listen(address_options.host, address_options.port)
    with closing(listening):
        found = served_models.found(names, running_options)
        loading = Loading(terminal, running_options, bucket_options, slots, served_models.pooling, settings)
        openers = {name: partial(loading.loaded, name, config) for name, config in found.items()}
        _log(requests=serving_options.log_requests)
        with closing(Models(settings, openers, served_models.models_max)) as held:
            if names or served_models.models_max is None:
                held.load()
            elif running_options.chat_template is not None:
                # What is wrong with it is not to be found when the first model is loaded.
                CompiledTemplate(template_source(running_options.chat_template))
            app = make_app(held, keys=keys, access=address_options.access())
            place = f"{', '.join(found)} is served at {address_of(listening)}"
            serve_on(app, held, listening, lambda: terminal.note(place))


def _log(*, requests: bool) -> None:
    """Let the server's lines go to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    # Requests that a second signal cuts off are no fault.
    handler.addFilter(lambda record: not (record.exc_info and isinstance(record.exc_info[1], CancelledError)))
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    for name, level in (("abcli.serve", logging.INFO if requests else logging.WARNING), ("uvicorn", logging.ERROR)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
