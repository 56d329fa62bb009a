"""What `run` and `chat` do before the first prompt."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

from abcli.config import BucketConfig, EngineConfig
from abcli.engine.opening import Opened, open_engine
from abcli.generate import Generator
from abcli.native.library import echo_log
from abcli.native.sampler import SamplerChain
from abcli.ui.terminal import Terminal


@dataclass(frozen=True)
class Ready:
    """A loaded model and the loop that decodes with it."""

    opened: Opened
    generator: Generator
    buckets: BucketConfig


@contextmanager
def ready(terminal: Terminal, config: EngineConfig, buckets: BucketConfig, *, verbose: bool = False) -> Iterator[Ready]:
    """Load the model with a spinner, say what --verbose asks for, and free everything after the block."""
    if verbose:
        echo_log(sys.stderr.write)
    with ExitStack() as stack:
        with terminal.working(f"loading {config.model.name}"):
            opened = stack.enter_context(open_engine(config, buckets, terminal.warn))
        engine, model = opened.engine, opened.model
        if engine.context_size > model.trained_context:
            terminal.warn(
                f"a context of {engine.context_size} tokens is longer than the {model.trained_context} "
                "the model was trained with"
            )
        if verbose:
            bases = ", ".join(f"{base:g}" for base in engine.bases)
            terminal.note(f"{model.description}; bases {bases}; merge {buckets.merge}; {engine.prefill_note}")
        if config.prefill == "shared" and len(engine.bases) > 1 and not engine.prefill_note.startswith("shared"):
            terminal.warn(f"--prefill shared is not possible: {engine.prefill_note}")
        make_sampler = partial(SamplerChain, model, context_size=engine.context_size)
        generator = stack.enter_context(Generator(engine, model, make_sampler, buckets.merge))
        yield Ready(opened, generator, buckets)
